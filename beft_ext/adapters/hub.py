"""An adapter on the Hugging Face hub: uploaded and downloaded as transformers does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from beft_ext.adapters.contents import CONFIG, WEIGHTS, AdapterError


@dataclass(frozen=True)
class Upload:
    """Where to upload, in the words of transformers.

    Attributes:
        repo_id: "user/name".
        token: by default that of ``hf auth login`` or HF_TOKEN.
        private: of a repository that is made anew.
        revision: a branch; it is made where there is none.
        create_pr: upload as a pull request.
    """

    repo_id: str
    token: str | bool | None = None
    private: bool | None = None
    commit_message: str = "Upload adapter"
    revision: str | None = None
    create_pr: bool = False

    def check(self) -> None:
        """Raise AdapterError for what can be known to fail without asking the hub."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise AdapterError(f"repo_id '{self.repo_id}' is no name of a repository") from error
        if not isinstance(self.token, str) and (self.token is False or get_token() is None):
            raise AdapterError(
                "the hub needs a token to upload: run 'hf auth login', set HF_TOKEN, or pass token="
            )

    def send(self, folder: Path, files: Sequence[str]) -> str:
        """Upload ``files`` of ``folder``, and nothing else of it, as one commit.

        Returns:
            The commit's address.
        Raises:
            AdapterError: the hub did not take them; ``folder`` stays whole.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=self.token)
        try:
            repo = api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            if self.revision is not None and not self.revision.startswith("refs/pr"):
                api.create_branch(repo, branch=self.revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=list(files),
                commit_message=self.commit_message,
                revision=self.revision,
                create_pr=self.create_pr,
            )
        except Exception as error:  # the hub's client raises many unrelated types
            raise AdapterError(
                f"the upload to '{self.repo_id}' failed ({_reason(error)}); {folder} holds it whole"
            ) from error
        return str(commit)


def located(
    source: str | Path, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder of an adapter: ``source``, or the hub's files of that name in its local cache.

    Raises:
        AdapterError: a revision is given for a folder that is here; the hub does not give the
            files, and the cache does not hold them.
    """
    named = isinstance(source, str) and "/" in source and names_repository(source)
    if not named or Path(source).is_dir():
        if revision is not None:
            raise AdapterError(f"revision='{revision}' is for the hub, but {source} names a folder")
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        files = [WEIGHTS, CONFIG]
        found = snapshot_download(str(source), revision=revision, token=token, allow_patterns=files)
        return Path(found)
    except Exception as error:  # the hub's client raises many unrelated types
        raise AdapterError(
            f"'{source}' is no folder here, and the hub does not give it ({_reason(error)}): check "
            "the name, the revision and, for a private one, token="
        ) from error


def names_repository(text: str) -> bool:
    """Whether ``text`` may be a repository's: "name" or "user/name"."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

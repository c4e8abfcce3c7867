"""Uploading an adapter to the Hugging Face hub, as transformers' ``push_to_hub`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from beft_ext.adapters.contents import AdapterError


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
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AdapterError(
                f"the upload to '{self.repo_id}' failed ({reason}); {folder} holds it whole"
            ) from error
        return str(commit)

"""The hub, by its own client: three files up as one commit, two down; never the network here."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import close, logits, tiny, train

from beft_ext import AdapterError, load_adapter, prepare, save_adapter
from beft_ext.adapters.contents import CONFIG, FILES, WEIGHTS

COMMIT = "https://hub.example/user/name/commit/1"


@pytest.fixture
def model():
    made = tiny("bert")
    prepare(made)
    return made


@pytest.fixture
def calls(monkeypatch):
    """What the hub is asked for, in order; ``fail`` names a call that raises."""
    made = SimpleNamespace(asked=[], fail=None, error=None, files=None)

    def stand_in(name, answer):
        def call(api, *args, **kwargs):
            made.asked.append((name, args, {"token": api.token, **kwargs}))
            if made.fail == name:
                raise made.error
            if name == "upload_folder":
                made.files = sorted(os.listdir(kwargs["folder_path"]))
            return answer

        monkeypatch.setattr(huggingface_hub.HfApi, name, call)

    stand_in("create_repo", SimpleNamespace(repo_id="user/name"))
    stand_in("create_branch", None)
    stand_in("upload_folder", COMMIT)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    return made


def test_one_commit_of_the_three_files_and_no_other(model, calls, tmp_path):
    (tmp_path / "private.txt").write_text("stays here")
    options = {"repo_id": "user/name", "token": "hf_x", "private": True, "commit_message": "tuned"}
    assert save_adapter(model, tmp_path, push_to_hub=True, **options) == COMMIT
    (first, args, created), (second, _, sent) = calls.asked
    assert (first, args) == ("create_repo", ("user/name",)) and second == "upload_folder"
    assert created == {"token": "hf_x", "private": True, "exist_ok": True}
    assert sent["allow_patterns"] == list(FILES) and sent["commit_message"] == "tuned"
    assert sent["repo_id"] == "user/name" and sent["folder_path"] == tmp_path
    assert set(FILES) < set(calls.files) and not sent["create_pr"]
    load_adapter(tiny("bert"), tmp_path)


def test_the_folder_names_the_repository_and_a_branch_is_made(model, calls, tmp_path):
    save_adapter(model, tmp_path / "mine", push_to_hub=True, token="hf_x", revision="next")
    assert [name for name, _, _ in calls.asked] == ["create_repo", "create_branch", "upload_folder"]
    assert calls.asked[0][1] == ("mine",) and calls.asked[1][2]["branch"] == "next"
    assert calls.asked[2][2]["revision"] == "next"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": True, "repo_id": "user/name"}, "hf auth login"),
        ({"push_to_hub": True, "repo_id": "user/name", "token": False}, "hf auth login"),
        ({"push_to_hub": True, "repo_id": "a/b/c", "token": "hf_x"}, "'a/b/c' is no name"),
        ({"push_to_hub": True, "repo_id": "", "token": "hf_x"}, "'' is no name"),
        ({"repo_id": "user/name"}, "push_to_hub=True"),
    ],
)
def test_what_cannot_be_uploaded_is_said_before_anything_is_written(
    model, calls, tmp_path, options, message
):
    with pytest.raises(AdapterError, match=message) as caught:
        save_adapter(model, tmp_path / "new", **options)
    assert "\n" not in str(caught.value)
    assert not calls.asked and not (tmp_path / "new").exists()


@pytest.mark.parametrize("fail", ["create_repo", "upload_folder"])
def test_a_failed_upload_is_one_line_and_leaves_the_folder_whole(model, calls, tmp_path, fail):
    calls.fail, calls.error = fail, OSError("403 Forbidden\nRequest ID: 1")
    with pytest.raises(AdapterError, match=r"failed \(403 Forbidden\); .* holds it") as caught:
        save_adapter(model, tmp_path, push_to_hub=True, repo_id="user/name", token="hf_x")
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BEFT"
    load_adapter(tiny("bert"), tmp_path)


def test_without_a_network_the_clients_own_error_becomes_one_line(model, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", _nowhere(huggingface_hub.HfApi.__init__))
    with pytest.raises(AdapterError, match="the upload to 'user/name' failed") as caught:
        save_adapter(model, tmp_path, push_to_hub=True, repo_id="user/name", token="hf_x")
    assert "\n" not in str(caught.value)


def _nowhere(init):
    """A port on which nobody listens."""
    return lambda api, **options: init(api, endpoint="http://127.0.0.1:9", **options)


@pytest.fixture
def cached(model, tmp_path, monkeypatch):
    """A hub that cannot be reached, and its cache with 'user/name' at two revisions."""
    train(model)
    save_adapter(model, tmp_path / "made")
    home = tmp_path / "cache" / "models--user--name"
    for folder in ("blobs", "refs", "snapshots"):
        (home / folder).mkdir(parents=True)
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (home / "refs" / revision).write_text(commit)
        (home / "snapshots" / commit).mkdir()
        for file in (WEIGHTS, CONFIG):
            shutil.copy(tmp_path / "made" / file, home / "blobs" / f"{commit[0]}-{file}")
            link = home / "snapshots" / commit / file
            link.symlink_to(f"../../blobs/{commit[0]}-{file}")
    (home / "snapshots" / ("b" * 40) / WEIGHTS).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return logits(model)


def test_a_name_on_the_hub_loads_as_a_folder_does(cached):
    """With the hub's own client, from its cache."""
    model = tiny("bert")
    assert load_adapter(model, "user/name") is model
    close(logits(model), cached)
    with pytest.raises(AdapterError, match=f"has no {WEIGHTS}"):
        load_adapter(model, "user/name", revision="v1")
    with pytest.raises(AdapterError, match="'user/other' is no folder here, and the hub") as caught:
        load_adapter(model, "user/other")
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_the_two_files_of_a_revision_alone(model, tmp_path, monkeypatch):
    save_adapter(model, tmp_path / "made")
    asked = []

    def snapshot(*args, **options):
        asked.append((args, options))
        return str(tmp_path / "made")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    load_adapter(tiny("bert"), "user/name", revision="v1", token="hf_x", trainable=True)
    (args, options), *others = asked
    assert args == ("user/name",) and not others
    assert options == {"revision": "v1", "token": "hf_x", "allow_patterns": [WEIGHTS, CONFIG]}


def test_a_folder_goes_before_the_hub_and_a_path_is_never_a_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    save_adapter(model, "user/name")
    load_adapter(tiny("bert"), "user/name", token="hf_x")
    with pytest.raises(AdapterError, match="revision='v1' is for the hub, but user/name names a"):
        load_adapter(tiny("bert"), "user/name", revision="v1")
    for nowhere in (Path("user/other"), "other", "./user/other", "a/b/c", str(tmp_path / "a")):
        with pytest.raises(AdapterError, match="no adapter folder at"):
            load_adapter(tiny("bert"), nowhere)

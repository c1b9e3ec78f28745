"""Adapters by hub id: read from the hub's cache on disk, pushed through the hub's client, which is replaced here."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from ldmole_ds.config import CONFIG_NAME, WEIGHTS_NAME
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.hub import adapter_folder
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model

COMMITS = {"main": "0123456789abcdef0123456789abcdef01234567", "v1": "89abcdef0123456789abcdef0123456789abcdef"}


def logits(model):
    return model.eval()(**ragged_batch()).logits.detach()


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """``acme/adapter`` in the hub's cache: main is softmax-routed, v1 plain LoRA."""
    repository = tmp_path / "models--acme--adapter"
    models = {"main": tiny_model(tiny_config(router="softmax")), "v1": tiny_model(tiny_config(router="lora"))}
    for revision, model in models.items():
        model.save_pretrained(repository / "snapshots" / COMMITS[revision])
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(COMMITS[revision])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return models


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMITS["v1"]])
def test_a_hub_id_and_its_revision(cached, revision):
    model = cached["v1" if revision in ("v1", COMMITS["v1"]) else "main"]
    loaded = LDMoLEModel.from_pretrained(tiny_llama(), "acme/adapter", revision=revision)
    assert torch.equal(logits(loaded), logits(model))


def test_what_cannot_be_had_is_one_sentence(cached, tmp_path):
    for name, revision, message in (
        ("acme/adapter", "v2", "acme/adapter is no folder here, and could not be had from the hub at revision 'v2'"),
        ("acme/other", None, "acme/other is no folder here, and could not be had from the hub: "),
        ("runs/none/here", None, "the adapter folder runs/none/here does not exist"),
        (tmp_path / "none", None, "does not exist: give the folder that holds"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            LDMoLEModel.from_pretrained(tiny_llama(), name, revision=revision)
        assert message in str(caught.value) and "or a hub id" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is a folder, which has no revision 'v1'"):
        adapter_folder(tmp_path, revision="v1")


def test_a_folder_comes_before_a_hub_id(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model(tiny_config(router="topk"))
    model.save_pretrained("acme/adapter")
    assert torch.equal(logits(LDMoLEModel.from_pretrained(tiny_llama(), "acme/adapter")), logits(model))


def test_only_two_files_are_fetched(cached, monkeypatch):
    """The hub's own client, up to the single download."""
    listed = [CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin", "training_args.bin", f"x/{WEIGHTS_NAME}", "README.md"]
    fetched = []

    def download(repo_id, filename, **kwargs):
        fetched.append((filename, kwargs["revision"]))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "repo_info", lambda self, **kwargs: SimpleNamespace(sha=COMMITS["main"]))
    files = [huggingface_hub.hf_api.RepoFile(path=path, size=1, oid="0" * 40) for path in listed]
    monkeypatch.setattr(api, "list_repo_tree", lambda self, **kwargs: files)
    monkeypatch.setattr("huggingface_hub._snapshot_download.hf_hub_download", download)
    adapter_folder("acme/adapter")
    assert sorted(fetched) == [(CONFIG_NAME, COMMITS["main"]), (WEIGHTS_NAME, COMMITS["main"])]


class FakeApi:
    """Keeps what it is told."""

    def __init__(self, log, *, has_card=False, fails=None):
        self.log, self.has_card, self.fails = log, has_card, fails

    def create_repo(self, repo_id, **kwargs):
        self.log.append(("create_repo", repo_id, kwargs))
        return SimpleNamespace(repo_id=f"user/{repo_id}")

    def create_branch(self, repo_id, **kwargs):
        self.log.append(("create_branch", repo_id, kwargs))

    def file_exists(self, repo_id, name, revision=None):
        return self.has_card

    def upload_folder(self, *, folder_path, **kwargs):
        if self.fails:
            raise self.fails
        self.log.append(("upload", {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}, kwargs))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def push(monkeypatch):
    def pushed(model, *args, api=None, **kwargs):
        log = []
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: FakeApi(log, **(api or {})))
        return model.push_to_hub("mine", *args, **kwargs), log

    return pushed


def test_push_uploads_the_adapter_and_a_card(push, tmp_path):
    model = tiny_model(tiny_config(router="topk", base_model_name_or_path="acme/base", base_model_revision="v3"))
    url, log = push(model, private=True, revision="dev")
    assert url == "https://hub/commit/1"
    assert log[0] == ("create_repo", "mine", {"private": True, "exist_ok": True})
    assert log[1] == ("create_branch", "user/mine", {"branch": "dev", "exist_ok": True})
    _, files, kwargs = log[2]
    assert sorted(files) == ["README.md", CONFIG_NAME, WEIGHTS_NAME]
    assert (kwargs["repo_id"], kwargs["revision"], kwargs["create_pr"]) == ("user/mine", "dev", False)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(LDMoLEModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))
    card = files["README.md"].decode()
    assert card.startswith("---\nbase_model: acme/base\n") and 'from_pretrained(base, "user/mine")' in card


def test_an_edited_card_stays(push):
    _, log = push(tiny_model(), api={"has_card": True}, create_pr=True)
    assert sorted(log[-1][1]) == [CONFIG_NAME, WEIGHTS_NAME] and log[-1][2]["create_pr"] is True


def test_a_failed_push_says_where_to(push):
    with pytest.raises(OSError, match="could not be pushed to user/mine: no write access"):
        push(tiny_model(), api={"fails": PermissionError("no write access")})

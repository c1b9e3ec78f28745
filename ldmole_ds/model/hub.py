"""Adapters on the Hugging Face hub: which folder a name stands for, and what is uploaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub

from ldmole_ds.config import CONFIG_NAME, WEIGHTS_NAME
from ldmole_ds.model import adapter_io
from ldmole_ds.model.model_card import CARD_NAME, HUB_ID, model_card

if TYPE_CHECKING:
    from ldmole_ds.model.ldmole_model import LDMoLEModel


def adapter_folder(name: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder that ``name`` stands for: itself, or a copy of a hub adapter's two files.

    Nothing but ``adapter_config.json`` and ``adapter_model.safetensors`` is fetched, both of one commit.

    Args:
        name: A folder (which comes first), or a hub id, ``user/adapter``.
        revision: Branch, tag or commit on the hub; default: the main branch.
        token: For private adapters; default: the one stored by ``hf auth login``.

    Raises:
        FileNotFoundError: Neither a folder nor an adapter that can be reached.
        ValueError: ``revision`` is given with a folder.
    """
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a folder, which has no revision {revision!r}: leave the revision out")
        return Path(name)
    give = f"give the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}, or a hub id"
    if not HUB_ID.fullmatch(str(name)):
        raise FileNotFoundError(f"the adapter folder {name} does not exist: {give}")
    try:
        files = [CONFIG_NAME, WEIGHTS_NAME]
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, token=token, allow_patterns=files))
    except (OSError, ValueError) as error:  # the hub's own errors are among these
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"the adapter {name} is no folder here, and could not be had from the hub{at}: {first} -- {give} that you "
            "can reach"
        ) from error


def push_adapter(
    model: LDMoLEModel,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> str | None:
    """See `LDMoLEModel.push_to_hub`. Collective: all ranks gather, rank 0 uploads, and all hear how it went."""
    url = error = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter_io.save_adapter(model, folder)
        if model.topology.rank == 0:
            try:
                api = huggingface_hub.HfApi(token=token)
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if revision is not None and not create_pr:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                # A card that is there already may have been edited: it stays.
                if not api.file_exists(repo_id, CARD_NAME, revision=revision):
                    (folder / CARD_NAME).write_text(model_card(model.adapter_config, repo_id), encoding="utf-8")
                url = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message,
                    create_pr=create_pr,
                ).commit_url
            except Exception as caught:  # whatever it was, the other ranks wait to hear of it
                error = f"the adapter could not be pushed to {repo_id}: {caught or type(caught).__name__}"
    adapter_io.raise_on_all_ranks(model.topology, error)
    return url

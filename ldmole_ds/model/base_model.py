"""Loads the frozen base model and its tokenizer: a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase


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
    quantization: str = "none",
    compute_dtype: str = "float32",
    revision: str = "main",
    token: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The causal language model, whole on the CPU (or partitioned, where ZeRO-3's ``zero.Init`` is active).

    A GGUF file is dequantised to float32 (or ``dtype``) while it is read; it then is an ordinary model. A quantised
    model is whole on every rank, on its current accelerator.

    Args:
        name: Hub id, folder or GGUF file.
        dtype: Of the parameters that are not quantised; auto takes the checkpoint's.
        attn_implementation: Of the model's attention; None takes its own.
        quantization: none, nf4 or int8: of every linear layer but the head, by bitsandbytes, while it is loaded.
        compute_dtype: In which nf4 layers multiply.
        revision, token, trust_remote_code: For the hub.

    Raises:
        ValueError: The model cannot be found or loaded; says what may be given.
    """
    folder, gguf = _location(name)
    kwargs: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if quantization != "none":
        if gguf:
            raise ValueError(
                f"--quantization {quantization} cannot quantise the GGUF file {name}: write it out once as a folder "
                "(load_base_model(file).save_pretrained(folder), and load_tokenizer likewise) and give that"
            )
        kwargs["quantization_config"] = _quantization_config(quantization, compute_dtype)
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


def _quantization_config(quantization: str, compute_dtype: str) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"--quantization {quantization} needs the package bitsandbytes, which is not installed: "
            "pip install bitsandbytes"
        )
    # It says for every call that int8 products cast their input to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _forget_quantisation(model: nn.Module) -> None:
    """A model read from GGUF still says it is quantised, although its weights are plain tensors."""
    for holder, names in ((model, ("hf_quantizer", "is_quantized", "quantization_method")), (model.config, ())):
        for name in (*names, "quantization_config"):
            if name in vars(holder):
                delattr(holder, name)

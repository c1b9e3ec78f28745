"""From a checkpoint or an adapter folder to an adapter folder fit to be shared: two files and a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ldmole_ds.config import CONFIG_NAME, WEIGHTS_NAME, LDMoLEConfig
from ldmole_ds.model.adapter_checks import check_against_config, check_values
from ldmole_ds.model.adapter_io import read_adapter, write_atomically
from ldmole_ds.model.model_card import CARD_NAME, model_card, recorded_results


def export_adapter(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    also: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write the adapter of ``source`` to ``target``, a new folder, which appears whole or not at all.

    Needs neither the base model nor DeepSpeed.

    Args:
        source: A checkpoint's or an adapter's folder.
        target: Must not exist, or be empty.
        dtype: float32, bfloat16 or float16, for weights and for computing with them; default: as they are.
        base_model, base_revision: Record these; default: what training recorded.
        also: Files to copy along.

    Returns:
        ``tensors``, ``parameters``, ``bytes`` of the weights, and ``base_model``.

    Raises:
        ValueError: The adapter is damaged, does not fit its settings, or overflows ``dtype``; no base is known.
        FileExistsError: ``target`` holds something.
        OSError: It cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} already exists: give a new folder")
    config = LDMoLEConfig.from_pretrained(source)
    if base_model is not None:
        config = replace(config, base_model_name_or_path=base_model, base_model_revision=base_revision)
    elif base_revision is not None:
        config = replace(config, base_model_revision=base_revision)
    if config.base_model_name_or_path is None:
        raise ValueError(f"{source} does not say which base model it belongs to: pass --model_name_or_path")
    state = read_adapter(source)
    check_against_config(config, state, source)
    if dtype is not None:
        config = replace(config, adapter_dtype=dtype)
        target_dtype = getattr(torch, dtype)
        state = {k: v.to(target_dtype) if v.is_floating_point() else v for k, v in state.items()}
        check_values(state, f"{source} as {dtype}")
    card = model_card(config, target.name, recorded_results(source))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_atomically(temporary / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
        texts = {CONFIG_NAME: json.dumps(config.to_dict(), indent=2) + "\n", CARD_NAME: card}
        for name, text in texts.items():
            write_atomically(temporary / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        for path in also:
            shutil.copyfile(path, temporary / path.name)
        size = (temporary / WEIGHTS_NAME).stat().st_size
        os.replace(temporary, target)  # an empty folder may be replaced
    except SafetensorError as error:  # of a full disk
        raise OSError(f"the adapter could not be written to {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "tensors": len(state),
        "parameters": sum(value.numel() for value in state.values()),
        "bytes": size,
        "base_model": config.base_model_name_or_path,
    }

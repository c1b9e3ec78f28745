"""``--adapter_name_or_path``: a run that starts from an adapter instead of fresh experts.

What the adapter is comes from the adapter; how it is trained further comes from the command line, and its layout over
ranks is free, as always.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.model.adapter_checks import check_against_config
from ldmole_ds.model.adapter_io import read_adapter
from ldmole_ds.model.hub import adapter_folder
from ldmole_ds.tasks.demo import EMBEDDED
from ldmole_ds.training.arguments import adapter_config

# Settings of training, not of the adapter: a flag may change them.
TRAINING_SETTINGS = frozenset(
    {
        "lora_dropout",
        "target_num_experts",
        "sparsity_loss_weight",
        "load_balancing_loss_weight",
        "router_z_loss_weight",
        "mask_padding",
        "balance_statistics",
    }
)


def start_from_adapter(flags: Namespace) -> tuple[LDMoLEConfig, dict[str, Tensor]]:
    """The adapter's settings, with the flags of training on top, and its weights; fills in its base model.

    The adapter's dtype is that of the new run. ``flags.model_name_or_path``, ``revision`` and ``quantization`` become
    the adapter's where ``model_name_or_path`` is not given.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: The adapter is damaged; a flag contradicts it; it does not say which base it belongs to.
    """
    name = flags.adapter_name_or_path
    folder = adapter_folder(name, revision=flags.adapter_revision, token=flags.token)
    held, asked = LDMoLEConfig.from_pretrained(folder), adapter_config(flags)
    state = read_adapter(folder)
    check_against_config(held, state, folder)
    _refuse_contradictions(name, held, asked, flags.given)
    _take_base(flags, held, folder)
    changes = {key: getattr(asked, key) for key in TRAINING_SETTINGS & flags.given}
    return replace(held, **changes, adapter_dtype=asked.adapter_dtype), state


def _refuse_contradictions(name: str, held: LDMoLEConfig, asked: LDMoLEConfig, given: frozenset[str]) -> None:
    fixed = {f.name for f in fields(LDMoLEConfig)} - TRAINING_SETTINGS - {"adapter_dtype"}
    pairs = {key: (getattr(asked, key), getattr(held, key)) for key in sorted(fixed & given)}
    wrong = [f"--{key} {ours} (the adapter has {theirs})" for key, (ours, theirs) in pairs.items() if ours != theirs]
    if wrong:
        raise ValueError(
            f"--adapter_name_or_path {name} contradicts {', '.join(wrong)}: leave that out, since the adapter brings "
            "its own settings, or start a fresh adapter without --adapter_name_or_path"
        )


def _take_base(flags: Namespace, held: LDMoLEConfig, folder: Path) -> None:
    """Fill in the adapter's base model; what is given on the command line stays."""
    if flags.model_name_or_path is None:
        base = held.base_model_name_or_path
        if base is None:
            raise ValueError(f"{folder} does not say which base model it belongs to: pass --model_name_or_path")
        # None is the embedded model.
        flags.model_name_or_path = None if base.startswith(EMBEDDED) else base
        if "revision" not in flags.given:
            flags.revision = held.base_model_revision or "main"
    if "quantization" not in flags.given:
        flags.quantization = held.base_model_quantization

"""What a saved adapter must be before anything is made of it: its values, and its tensors against its settings."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.layers.routers import build_router
from ldmole_ds.model.canonical import L1_EXPONENT
from ldmole_ds.model.grouping import group_name
from ldmole_ds.model.layer_experts import expert_counts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OWN_KEY = re.compile(r"^lambda_mlp\.|^adaptive_l1\.|\.(lora_A|lora_B|router)$")


def check_values(state: dict[str, Tensor], source: Any) -> None:
    """Refuse tensors that no training can have written: empty, of another dtype, or not finite.

    Args:
        state: A canonical state, see `ldmole_ds.model.adapter_io`.
        source: Where it is from, for the message.

    Raises:
        ValueError: Names the tensor and what to do.
    """
    remedy = "restore the adapter from a good copy"
    for key, value in state.items():
        if value.numel() == 0:
            raise ValueError(f"{source}: {key} has no values (shape {tuple(value.shape)}): {remedy}")
        # Router relu's control counts in whole numbers.
        allowed = (torch.int64,) if key == L1_EXPONENT else DTYPES
        if value.dtype not in allowed:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise ValueError(f"{source}: {key} is {str(value.dtype).removeprefix('torch.')}, not {names}: {remedy}")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{source}: {key} holds NaN or infinite values: take an earlier checkpoint, or {remedy}")


def check_against_config(config: LDMoLEConfig, state: dict[str, Tensor], source: Any) -> None:
    """Refuse a state that cannot be that of ``config``: what is known without the base model.

    Widths come from the tensors themselves, and which of the base's parameters ``modules_to_save`` brings is not known.

    Raises:
        ValueError: A tensor is missing, unknown, or of another shape.
    """
    if config.projection_groups is None:
        raise ValueError(f"{source}: the adapter's settings lack projection_groups: restore adapter_config.json")
    router = build_router(config.router, fixed_lambda=config.fixed_lambda, topk=config.topk)
    experts_of = expert_counts(config, [members[0] for members in config.projection_groups])
    known = set()

    def expect(key: str, *shape: int | None) -> Tensor:
        """The tensor ``key``; None in ``shape`` is any size."""
        if key not in state:
            raise ValueError(f"{source} lacks {key}: it was written for another adapter configuration")
        found = tuple(state[key].shape)
        if len(found) != len(shape) or any(s not in (None, f) for s, f in zip(shape, found, strict=True)):
            wanted = ", ".join("any" if s is None else str(s) for s in shape)
            raise ValueError(f"{source}: {key} has shape {found}, expected ({wanted})")
        known.add(key)
        return state[key]

    for members in config.projection_groups:
        experts, width = experts_of[members[0]], None
        for path in members:
            width = expect(f"{path}.lora_A", experts, config.r, width).shape[-1]
            expect(f"{path}.lora_B", experts, None, config.r)
            if router.uses_gate:
                expect(f"{path}.router", experts, width)
        if router.uses_lambda:
            mlp = f"lambda_mlp.{width if config.lambda_sharing == 'shared' else group_name(members)}"
            hidden = config.lambda_hidden_size
            shapes = {"weight_in": (hidden, width), "bias_in": (hidden,), "weight_out": (1, hidden), "bias_out": (1,)}
            for name, shape in shapes.items():
                expect(f"{mlp}.{name}", *shape)
    if config.router == "relu":
        expect(L1_EXPONENT)
    # Under which names modules_to_save are stored only the base model tells: tied weights have one of several.
    rest = sorted(state.keys() - known)
    unknown = [key for key in rest if not config.modules_to_save or _OWN_KEY.search(key)]
    if unknown:
        raise ValueError(f"{source} holds tensors that its settings have no place for: {unknown[:4]}")
    if config.modules_to_save and not rest:
        raise ValueError(f"{source} lacks the weights of modules_to_save {config.modules_to_save}")

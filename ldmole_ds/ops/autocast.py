"""Leaving autocast only where it is on: the context costs more than a small operation does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_is_on(x: Tensor) -> bool:
    """Whether operations on the device of x would change dtypes now."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context in which operations on the device of x keep the dtypes of what they are given."""
    return torch.autocast(x.device.type, enabled=False) if autocast_is_on(x) else nullcontext()

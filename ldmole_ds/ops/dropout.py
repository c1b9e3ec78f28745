"""Dropout with a cheap mask.

torch draws one Bernoulli number per value on a CPU, which takes longer than all else that an adapter does there. Here
one random 64-bit number serves four values, each of which is dropped if its 16 bits are below ``p * 2^16``. What is
kept is divided by the probability of exactly that, so the expectation stays the input. Accelerators use torch's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ldmole_ds.ops.planned import is_planned_gpu, on_gpu


def keep_mask(x: Tensor, dropped: int) -> Tensor:
    """``uint8``, the shape of the CPU tensor x: 0 with probability ``dropped / 2^16``, else 1. Default generator."""
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()]
    # Written as uint8: to float, that converts several times faster than bool.
    mask = torch.empty(x.numel(), dtype=torch.uint8)
    torch.ge(bits, dropped - 2**15, out=mask)
    return mask.view(x.shape)


@torch.library.custom_op("ldmole_ds::keep_mask", mutates_args=())
def _keep_mask_op(x: Tensor, dropped: int) -> Tensor:
    return keep_mask(x, dropped)


@_keep_mask_op.register_fake
def _(x: Tensor, dropped: int) -> Tensor:
    return torch.empty(x.shape, dtype=torch.uint8)


def _is_torchs(x: Tensor) -> bool:
    """Whether torch's own dropout serves this tensor."""
    return x.device.type != "cpu" or is_planned_gpu(x)


def _dropped_of(p: float) -> int:
    """How many of 2^16 numbers mean that a value is dropped."""
    return round(p * 2**16)


def _scale_of(dropped: int) -> float:
    return 2**16 / (2**16 - dropped) if dropped < 2**16 else 0.0


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        dropped = _dropped_of(p)
        # torch.compile cannot trace random bits and draws the same mask through an operator of its own.
        mask = _keep_mask_op(x, dropped) if torch.compiler.is_compiling() else keep_mask(x, dropped)
        ctx.save_for_backward(mask)
        ctx.scale = _scale_of(dropped)
        return mask.to(x.dtype).mul_(ctx.scale) * x  # not in place: torch 2.11 would lose the gradient when compiling

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return mask.to(grad.dtype).mul_(ctx.scale).mul_(grad), None


class Dropped(NamedTuple):
    """x after dropout, for who differentiates by itself.

    Attributes:
        values: In the shape of x, without graph.
        keep: bool or uint8, where x was kept.
        scale: What it was multiplied with there.
    """

    values: Tensor
    keep: Tensor
    scale: float

    def add_gradient_(self, grad_x: Tensor, grad_values: Tensor) -> Tensor:
        """The gradient of the values, added to that of x in place."""
        keep = self.keep if on_gpu(grad_x) else self.keep.to(grad_x.dtype)  # a GPU reads it as it is
        return grad_x.addcmul_(grad_values, keep, value=self.scale)


@torch.no_grad()
def with_mask(x: Tensor, p: float) -> Dropped:
    """`dropout`, and its mask."""
    if _is_torchs(x):
        values, keep = torch.native_dropout(x, p, True)
        return Dropped(values, keep, 1 / (1 - p) if p < 1 else 0.0)
    keep, scale = keep_mask(x, _dropped_of(p)), _scale_of(_dropped_of(p))
    return Dropped(keep.to(x.dtype).mul_(scale).mul_(x), keep, scale)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero with probability ``p`` (on a CPU rounded to a multiple of 2^-16), else ``x`` divided by ``1 - p``.

    Keeps one byte per value for backward.
    """
    if _is_torchs(x):
        return torch.native_dropout(x, p, True)[0]
    return _Dropout.apply(x, p)

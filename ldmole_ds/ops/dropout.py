"""Dropout with a cheap mask.

torch draws one Bernoulli number per value on a CPU, which takes longer than all else that an adapter does there. Here
one random 64-bit number serves four values, each of which is dropped if its 16 bits are below ``p * 2^16``. What is
kept is divided by the probability of exactly that, so the expectation stays the input. Accelerators use torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_mask(shape: torch.Size, p: float) -> tuple[Tensor, float]:
    """A CPU mask, uint8, 1 where the value is kept, from the default generator; and the probability of 1."""
    dropped = round(p * 2**16)
    numel = shape.numel()
    bits = torch.empty(-(-numel // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:numel]
    # Written as uint8: to float, that converts several times faster than bool.
    mask = torch.empty(numel, dtype=torch.uint8)
    torch.ge(bits, dropped - 2**15, out=mask)
    return mask.view(shape), 1 - dropped / 2**16


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        mask, kept = keep_mask(x.shape, p)
        ctx.save_for_backward(mask)
        ctx.scale = 1 / kept if kept else 0.0
        return mask.to(x.dtype).mul_(ctx.scale).mul_(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return mask.to(grad.dtype).mul_(ctx.scale).mul_(grad), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero with probability ``p`` (on a CPU rounded to a multiple of 2^-16), else ``x`` divided by ``1 - p``.

    Keeps one byte per value for backward.
    """
    if x.device.type != "cpu":
        return torch.native_dropout(x, p, True)[0]
    return _Dropout.apply(x, p)

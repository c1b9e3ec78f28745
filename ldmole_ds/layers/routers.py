"""Routers: from logits and lambda to routing weights. Adding one is adding a function and a row here.

A router is a plain object without parameters (the input group owns the gate), so that every router shares the same
dispatch, losses, checkpoints and reports. Tokens come last, so that what is done per expert runs along them. Shape
legend: T tokens, G projections, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmole_ds.ops import sparsegen


@dataclass(frozen=True)
class Router:
    """How routing weights are made.

    Attributes:
        weights: ``(logits (G, E, T) float32, lam (T,) float32 or None) -> probs (G, E, T) float32``.
        uses_gate: Whether there are router logits at all.
        uses_lambda: Whether the lambda MLP is needed.
    """

    weights: Callable[[Tensor, Tensor | None], Tensor]
    uses_gate: bool = True
    uses_lambda: bool = False


def _learned(logits: Tensor, lam: Tensor | None) -> Tensor:
    return sparsegen(logits, lam, dim=1)


def _fixed(fixed_lambda: float) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda logits, lam: sparsegen(logits, fixed_lambda, dim=1)


def _softmax(logits: Tensor, lam: Tensor | None) -> Tensor:
    return logits.softmax(1)


def _topk(k: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    def weights(logits: Tensor, lam: Tensor | None) -> Tensor:
        top, index = logits.topk(min(k, logits.shape[1]), dim=1)
        return torch.zeros_like(logits).scatter(1, index, top.softmax(1))

    return weights


def _relu(logits: Tensor, lam: Tensor | None) -> Tensor:
    return logits.relu()


def _ones(logits: Tensor, lam: Tensor | None) -> Tensor:
    return torch.ones_like(logits)


# Names and what makes them, from fixed_lambda and topk.
ROUTERS: dict[str, Callable[[float, int], Router]] = {
    "sparsegen": lambda fixed_lambda, topk: Router(_learned, uses_lambda=True),
    "sparsegen_fixed": lambda fixed_lambda, topk: Router(_fixed(fixed_lambda)),
    "softmax": lambda fixed_lambda, topk: Router(_softmax),
    "topk": lambda fixed_lambda, topk: Router(_topk(topk)),
    "relu": lambda fixed_lambda, topk: Router(_relu),
    "lora": lambda fixed_lambda, topk: Router(_ones, uses_gate=False),
}


def build_router(name: str, *, fixed_lambda: float = 0.0, topk: int = 2) -> Router:
    """The router of this name.

    sparsegen: LD-MoLE's, learned lambda. sparsegen_fixed: the same with one lambda for all tokens (0 is sparsemax).
    softmax: dense. topk: softmax over the k largest (MoLA). relu: positive logits as they are, which may leave a token
    without experts (ReMoLE; `ldmole_ds.model.adaptive_l1` keeps it sparse). lora: no router, every weight is 1.

    Raises:
        ValueError: There is no such router.
    """
    if name not in ROUTERS:
        raise ValueError(f"router={name!r} is not known: use one of {', '.join(ROUTERS)}")
    return ROUTERS[name](fixed_lambda, topk)

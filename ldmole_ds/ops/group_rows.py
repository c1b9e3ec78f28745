"""What an input group's node and the kernels between its products hand each other.

Shape legend: T tokens, G projections, E experts, r rank, H hidden units of the lambda MLP, N = G E r + G E + H rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GroupSizes(NamedTuple):
    """Numbers of a group and its batch, in the order in which the kernel in C takes them.

    Attributes:
        tokens, experts, members, r, units: T, E, G, r, H.
        target: k of the sparsity loss.
        mask_padding: Whether padding is not routed.
        scaling: ``lora_alpha / r``.
    """

    tokens: int
    experts: int
    members: int
    r: int
    units: int
    target: int
    mask_padding: bool
    scaling: float

    @property
    def of_experts(self) -> int:
        """Rows of h, the first."""
        return self.members * self.experts * self.r

    @property
    def of_routing(self) -> int:
        """Rows of router logits and hidden units, the others."""
        return self.members * self.experts + self.units


class BetweenProducts(NamedTuple):
    """What comes between the products with x and those with B.

    Attributes:
        lambda_logit: Of the lambda MLP, before logsigmoid, ``(T,)`` float32.
        live: uint8 ``(H,)``, hidden units that fired on some token.
        probs: Routing weights, ``(G, E, T)`` float32.
        lam: ``(T,)`` float32.
        sums: As `Routing.sums`.
        weighted: ``scaling * p * h``, ``(G, E r, T)``, in the dtype of the products with B.
    """

    lambda_logit: Tensor
    live: Tensor
    probs: Tensor
    lam: Tensor
    sums: Tensor
    weighted: Tensor

    @classmethod
    def empty(cls, rows: Tensor, sizes: GroupSizes, programs: int, dtype: torch.dtype) -> BetweenProducts:
        """To be written; ``live`` is zero."""
        t, e, g, r, units, *_ = sizes
        live = rows.new_zeros(units, dtype=torch.uint8)
        probs, sums = rows.new_empty(g, e, t), rows.new_empty(programs, g, 2 * e + 3)
        return cls(rows.new_empty(t), live, probs, rows.new_empty(t), sums, rows.new_empty(g, e * r, t, dtype=dtype))

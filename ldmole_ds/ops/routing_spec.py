"""What a routing pass is asked for, and what comes out of it: the words that the kernels and their users share.

Shape legend: T tokens, G projections, E experts, P = ep_size, B blocks of tokens, J projections of several groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# lambda = logsigmoid(.) + (1 - eps), eps = 1e-2, stays below this.
LAMBDA_TOP = 1 - 1e-2


@dataclass(frozen=True)
class RoutingSpec:
    """What a routing pass is asked for.

    Attributes:
        dtype: Of the routing weights: that of the experts' products.
        target_num_experts: k of the sparsity loss.
        mask_padding: Whether padding is not routed. The sums of weights leave it out in any case.
        ep_size: Ranks that a token may visit; 0 where no tokens travel, and no plan is needed.
        own_rank: The rank that a token need not visit.
    """

    dtype: torch.dtype
    target_num_experts: int
    mask_padding: bool = True
    ep_size: int = 0
    own_rank: int = 0


class Routing(NamedTuple):
    """What comes out.

    Attributes:
        probs_GET: Routing weights in the spec's dtype, 0 for tokens that are not routed, NaN for broken ones.
        lam_T: lambda, float32, without gradient (`sums` has it).
        sums: ``(B, G, 2 E + 3)`` float32; added up over B (`RoutingSums`) they are sums over tokens.
        destinations: ``(P + 1, T)`` uint8 or bool: where a token visits a rank; the last row, where its routing is not
            finite. None without a plan.
    """

    probs_GET: Tensor
    lam_T: Tensor
    sums: Tensor
    destinations: Tensor | None


@dataclass(frozen=True)
class RoutingSums:
    """`Routing.sums` added up, by name: sums over tokens for J projections, float64.

    Attributes:
        active_JE: Real tokens that give each expert a non-zero weight; no gradient.
        probs_JE: Routing weights of the real tokens.
        sparsity_J: ``relu(lower_k - lambda)`` of the routed tokens.
        router_z_J: ``logsumexp(u)^2`` of the routed tokens.
        broken_J: Tokens with a non-finite logit or lambda, padding included; no gradient.
    """

    active_JE: Tensor
    probs_JE: Tensor
    sparsity_J: Tensor
    router_z_J: Tensor
    broken_J: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> RoutingSums:
        """From ``(B, J, 2 E + 3)``."""
        total = sums.sum(0, dtype=torch.float64)
        num_experts = (sums.shape[-1] - 3) // 2
        active, probs, rest = total.split([num_experts, num_experts, 3], dim=-1)
        sparsity, router_z, broken = rest.unbind(-1)
        return cls(active.detach(), probs, sparsity, router_z, broken.detach())

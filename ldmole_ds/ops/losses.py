"""The auxiliary losses of LD-MoLE, as sums over local tokens and as plain single-process means.

Shape legend: T tokens, J projections, E experts, k target number of experts.

A loss must not depend on how a batch is spread over ranks and micro-steps, so the model adds *sums* and divides by
global counts (`ldmole_ds.model.aux_losses`). The functions without ``_sum`` are the one-process definition, used by
the tests as the reference and by anyone with a single process.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this many pairs of maximum and minimum over all tokens are quicker than a topk of each token's few experts.
INSERTION_MAX_STEPS = 64


def lower_lambda(logits: Tensor, k: int) -> Tensor:
    """Smallest lambda that leaves at most ``k`` experts active: ``1 - (U_k - k u_(k+1))``.

    Args:
        logits: ``(..., E)``; treated as constants.
        k: Target number of experts, below E.

    Returns:
        ``(...)`` in the dtype of ``logits``, no gradient.
    """
    if (k + 1) * logits.shape[-1] <= INSERTION_MAX_STEPS:
        *largest, next_one = largest_by_insertion(logits.detach(), k + 1)
        return 1 - (sum(largest) - k * next_one)
    top = logits.detach().topk(k + 1, dim=-1).values
    return 1 - (top[..., :k] - top[..., k:]).sum(-1)


def largest_by_insertion(values: Tensor, n: int) -> list[Tensor]:
    """The n largest along the last dimension, in falling order: what ``topk`` finds, without a sort of each row."""
    largest: list[Tensor] = []
    for value in values.unbind(-1):
        for i, kept in enumerate(largest):
            largest[i], value = torch.maximum(kept, value), torch.minimum(kept, value)
        if len(largest) < n:
            largest.append(value)
    return largest


def sparsity_sum(logits: Tensor, lam: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """Sum over tokens of ``relu(lower_k - lambda)``: ``(T, J, E), (T,) or (T, J) -> (J,)``. Zero where ``k >= E``."""
    if k >= logits.shape[-1]:
        return logits.new_zeros(logits.shape[1]) + 0.0 * lam.sum()
    lam = lam.unsqueeze(-1) if lam.dim() == 1 else lam
    gap = torch.relu(lower_lambda(logits, k) - lam)
    return gap.sum(0) if mask is None else torch.where(mask.unsqueeze(-1), gap, 0.0).sum(0)


def router_z_sum(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over tokens of ``logsumexp(u)^2``: ``(T, J, E) -> (J,)``."""
    z = torch.logsumexp(logits, dim=-1).square()
    return z.sum(0) if mask is None else torch.where(mask.unsqueeze(-1), z, 0.0).sum(0)


def _token_mean(total: Tensor, mask: Tensor | None, num_tokens: int) -> Tensor:
    count = num_tokens if mask is None else mask.sum()
    return (total / count).mean()


def sparsity_loss(logits: Tensor, lam: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens and projections of ``relu(lower_k - lambda)``; arguments as `sparsity_sum`."""
    return _token_mean(sparsity_sum(logits, lam, k, mask), mask, logits.shape[0])


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens and projections of ``logsumexp(u)^2`` (ST-MoE, arXiv 2202.08906, equation 5)."""
    return _token_mean(router_z_sum(logits, mask), mask, logits.shape[0])


def load_balancing_loss(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over projections of ``E sum_e f_e P_e``.

    ``f_e`` is the share of all activations (non-zero weights) that fall on expert e and carries no gradient;
    ``P_e`` the mean routing weight. Equal to 1 when balanced.

    Args:
        probs: Routing weights, ``(T, J, E)``.
        mask: ``(T,)`` bool, True for the tokens that count.
    """
    if mask is not None:
        probs = probs[mask]
    active = (probs > 0).sum(0).to(probs.dtype)
    share = active / active.sum(-1, keepdim=True).clamp(min=1)
    return (probs.shape[-1] * (share * probs.mean(0)).sum(-1)).mean()

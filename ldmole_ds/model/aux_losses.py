"""The auxiliary losses of one forward pass, independent of how the batch is laid out.

Every loss is a mean over tokens, or a product of two such means. Ranks and micro-steps hold different numbers of
tokens, so each rank adds its local sums and divides by global counts:

    sparsity, z    sum over local tokens / routed tokens of the whole optimizer step (all ranks, all micro-steps)
    balancing      E sum_e f_e P_e of this micro-step over all ranks, / accumulation steps: f_e (no gradient) is
                   reduced over ranks, and the local share of P_e is divided by the global token count

One all-reduce of a few counts per forward pass serves all layers. The share of each rank carries the factor W (number
of ranks) when gradients are averaged over ranks, and 1 when the caller multiplies by W itself, as the Hugging Face
Trainer does when it passes ``num_items_in_batch``.

Shape legend: T local tokens, J projections, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_ds.distributed.dispatch import raise_non_finite
from ldmole_ds.model.adaptive_l1 import AdaptiveL1, balanced_l1_sum
from ldmole_ds.model.routing_batch import FusedRoutingBatch, RoutingBatch

NAMES = ("sparsity", "load_balancing", "router_z")


@dataclass(frozen=True)
class Normalizer:
    """How local sums become shares of a global loss.

    Attributes:
        world_size: Data-parallel ranks, W.
        factor: W where gradients are averaged over ranks, 1 where the caller multiplies by W.
        num_routed_tokens: Of the whole optimizer step over all ranks; None for those of this forward pass.
        accumulation_steps: Micro-steps per optimizer step.
        global_statistics: Balance statistics over all ranks, or per rank.
        reduce: Whether counts are reduced over ranks (training); every rank must agree.
    """

    world_size: int = 1
    factor: float = 1.0
    num_routed_tokens: Tensor | float | None = None
    accumulation_steps: int = 1
    global_statistics: bool = True
    reduce: bool = False


def raise_where_broken(broken_J: Tensor, layers: list[str]) -> None:
    """The one device-to-host synchronisation of a model's forward pass where no token is dispatched."""
    if broken_J.any():
        raise_non_finite(layers[int(broken_J.nonzero()[0])])


def auxiliary_losses(
    batches: list[RoutingBatch | FusedRoutingBatch],
    normalizer: Normalizer,
    *,
    target_num_experts: int,
    mask_padding: bool,
    device: torch.device,
    adaptive_l1: AdaptiveL1 | None = None,
) -> dict[str, Tensor]:
    """Sparsity, load balancing and router z-loss, each the mean over all projections: float32 scalars with graph.

    With ``adaptive_l1`` (ReLU routing) the sparsity loss is its balanced L1 loss, and its weight's control is told how
    many experts were used.

    Raises:
        FloatingPointError: non-finite routing on any rank; names the layer, on every rank.
    """
    if not batches:
        return {name: torch.zeros((), device=device) for name in NAMES}
    active = [b.active for b in batches]
    num_tokens = torch.stack([b.num_tokens for b in batches])
    num_routed = num_tokens if mask_padding else torch.stack([b.num_rows for b in batches])
    broken = torch.cat([b.broken for b in batches])
    local = torch.cat([*(a.flatten() for a in active), num_tokens, num_routed, broken]).double()
    total = local.clone()
    if normalizer.reduce and normalizer.world_size > 1:
        dist.all_reduce(total)
    sizes = [a.numel() for a in active]
    *active_all, num_tokens_all, num_routed_all, broken_all = total.split(
        [*sizes, len(batches), len(batches), broken.numel()]
    )
    raise_where_broken(broken_all, [name for b in batches for name, _ in b.names])
    factor, per_rank_factor = normalizer.factor, normalizer.factor / normalizer.world_size
    sums = {name: torch.zeros((), device=device) for name in NAMES}
    for i, batch in enumerate(batches):
        routed = normalizer.num_routed_tokens
        routed = num_routed_all[i] if routed is None else routed
        if not isinstance(routed, Tensor):
            routed = torch.full((), routed, device=device)  # as_tensor() would wait for a GPU
        routed = routed.to(device, torch.float32).clamp(min=1)
        sparsity = batch.sparsity_sums(target_num_experts, mask_padding)
        if sparsity is not None:
            sums["sparsity"] = sums["sparsity"] + factor * (sparsity / routed).sum()
        if adaptive_l1 is not None:
            active_JE = active_all[i].view_as(active[i]).float()
            l1 = balanced_l1_sum(batch.prob_sums, active_JE, num_tokens_all[i].float(), target_num_experts)
            sums["sparsity"] = sums["sparsity"] + factor * (l1 / routed).sum()
        sums["router_z"] = sums["router_z"] + factor * (batch.router_z_sums(mask_padding) / routed).sum()

        counts, tokens, scale = active_all[i].view_as(active[i]).float(), num_tokens_all[i].float(), factor
        if not normalizer.global_statistics:
            counts, tokens, scale = active[i].float(), num_tokens[i].float(), per_rank_factor
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        mean_probs = batch.prob_sums / tokens.clamp(min=1)
        balance = batch.num_experts * (share * mean_probs).sum()
        sums["load_balancing"] = sums["load_balancing"] + scale / normalizer.accumulation_steps * balance
    if adaptive_l1 is not None and normalizer.reduce:
        slots = [len(b.names) * min(target_num_experts, b.num_experts) for b in batches]
        allowed = sum(n * tokens for n, tokens in zip(slots, num_tokens_all, strict=True))
        adaptive_l1.observe(sum(a.sum() for a in active_all), allowed, normalizer.accumulation_steps)
    num_projections = sum(len(b.names) for b in batches)
    return {name: value / num_projections for name, value in sums.items()}

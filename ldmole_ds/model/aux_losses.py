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

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_ds.distributed.dispatch import raise_non_finite
from ldmole_ds.layers import RoutingRecord
from ldmole_ds.model.adaptive_l1 import AdaptiveL1, balanced_l1_sum
from ldmole_ds.ops.losses import router_z_sum, sparsity_sum

NAMES = ("sparsity", "load_balancing", "router_z")


@dataclass
class RoutingBatch:
    """Records of groups with equal T and E, side by side, so that each statistic is one operation for all of them.

    As in the records the tokens are innermost in memory, where sums over them are quick. The routing weights of padding
    are zero (they already are where padding is not routed).
    """

    names: list[tuple[str, int]]
    logits_TJE: Tensor
    probs_TJE: Tensor
    lam_TJ: Tensor | None
    mask_T: Tensor | None

    @classmethod
    def collect(cls, records: Iterable[RoutingRecord]) -> list[RoutingBatch]:
        """Group records that can be put side by side; the order is that of the forward pass."""
        buckets: dict[tuple, list[RoutingRecord]] = {}
        for record in records:
            tokens, _, experts = record.logits_TGE.shape
            key = (tokens, experts, record.mask_T is None, record.lam_T is None)
            buckets.setdefault(key, []).append(record)
        return [cls._side_by_side(bucket) for bucket in buckets.values()]

    @classmethod
    def _side_by_side(cls, records: list[RoutingRecord]) -> RoutingBatch:
        names = [(r.group, j) for r in records for j in range(r.logits_TGE.shape[1])]
        lam = None
        if records[0].lam_T is not None:
            lam = torch.cat([r.lam_T.expand(r.logits_TGE.shape[1], -1) for r in records]).t()
        logits = torch.cat([r.logits_TGE.permute(1, 2, 0) for r in records]).permute(2, 0, 1)
        probs = torch.cat([r.probs_TGE.permute(1, 2, 0) for r in records]).permute(2, 0, 1)
        mask = records[0].mask_T
        if mask is not None:
            probs = torch.where(mask.view(-1, 1, 1), probs, 0.0)
        return cls(names, logits, probs, lam, mask)

    @cached_property
    def active(self) -> Tensor:
        """``(J, E)`` float32: real tokens that give each expert a non-zero weight."""
        # The sign of a weight is 1 or 0; on a CPU sums of floats are several times as fast as those of bool.
        return self.probs_TJE.detach().sign().sum(0)

    @cached_property
    def num_tokens(self) -> Tensor:
        """Real tokens."""
        return self.num_rows if self.mask_T is None else self.mask_T.sum()

    @cached_property
    def num_rows(self) -> Tensor:
        """Tokens with padding."""
        return torch.tensor(self.logits_TJE.shape[0], device=self.logits_TJE.device)

    @cached_property
    def broken(self) -> Tensor:
        """``(J,)`` bool: projections with a non-finite router logit or lambda on some token."""
        zero_J = self.logits_TJE.detach().mul(0).sum((0, 2))  # or NaN
        if self.lam_TJ is not None:
            zero_J = zero_J + self.lam_TJ.detach().mul(0).sum(0)
        return zero_J != 0


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


def auxiliary_losses(
    batches: list[RoutingBatch],
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
    # NOTE: the one device-to-host synchronisation of a forward pass where no token is dispatched.
    if broken_all.any():
        names = [name for b in batches for name in b.names]
        raise_non_finite(names[int(broken_all.nonzero()[0])][0])

    factor, per_rank_factor = normalizer.factor, normalizer.factor / normalizer.world_size
    sums = {name: torch.zeros((), device=device) for name in NAMES}
    for i, batch in enumerate(batches):
        routed_mask = batch.mask_T if mask_padding else None
        routed = normalizer.num_routed_tokens
        routed = (num_routed_all[i] if routed is None else routed) + 0.0
        routed = torch.as_tensor(routed, device=device, dtype=torch.float32).clamp(min=1)
        if batch.lam_TJ is not None:
            sparsity = sparsity_sum(batch.logits_TJE, batch.lam_TJ, target_num_experts, routed_mask)
            sums["sparsity"] = sums["sparsity"] + factor * (sparsity / routed).sum()
        if adaptive_l1 is not None:
            active_JE = active_all[i].view_as(active[i]).float()
            l1 = balanced_l1_sum(batch.probs_TJE, active_JE, num_tokens_all[i].float(), target_num_experts)
            sums["sparsity"] = sums["sparsity"] + factor * (l1 / routed).sum()
        sums["router_z"] = sums["router_z"] + factor * (router_z_sum(batch.logits_TJE, routed_mask) / routed).sum()

        counts, tokens, scale = active_all[i].view_as(active[i]).float(), num_tokens_all[i].float(), factor
        if not normalizer.global_statistics:
            counts, tokens, scale = active[i].float(), num_tokens[i].float(), per_rank_factor
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        mean_probs = batch.probs_TJE.sum(0) / tokens.clamp(min=1)
        balance = batch.logits_TJE.shape[-1] * (share * mean_probs).sum()
        sums["load_balancing"] = sums["load_balancing"] + scale / normalizer.accumulation_steps * balance
    if adaptive_l1 is not None and normalizer.reduce:
        slots = [len(b.names) * min(target_num_experts, b.logits_TJE.shape[-1]) for b in batches]
        allowed = sum(n * tokens for n, tokens in zip(slots, num_tokens_all, strict=True))
        adaptive_l1.observe(sum(a.sum() for a in active_all), allowed, normalizer.accumulation_steps)
    num_projections = sum(len(b.names) for b in batches)
    return {name: value / num_projections for name, value in sums.items()}

"""The records of one forward pass side by side: what the losses and the statistics need of all layers, at once.

Shape legend: T local tokens, J projections, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ldmole_ds.layers import RoutingRecord
from ldmole_ds.ops.losses import router_z_sum, sparsity_sum
from ldmole_ds.ops.routing_spec import RoutingSums


@dataclass
class RoutingBatch:
    """Records of groups with equal T and E, so that each statistic is one operation for all of them.

    As in the records the tokens are innermost in memory, where sums over them are quick. The routing weights of padding
    are zero (they already are where padding is not routed).

    Attributes:
        names: Group and member of each projection.
        num_experts: E.
        mask_T: Real tokens, or None for all.
    """

    names: list[tuple[str, int]]
    num_experts: int
    mask_T: Tensor | None
    logits_TJE: Tensor
    probs_TJE: Tensor
    lam_TJ: Tensor | None

    @classmethod
    def collect(cls, records: Iterable[RoutingRecord]) -> list[RoutingBatch | FusedRoutingBatch]:
        """Group records that can be put side by side; the order is that of the forward pass."""
        buckets: dict[tuple, list[RoutingRecord]] = {}
        for record in records:
            tokens, _, experts = record.logits_TGE.shape
            key = (tokens, experts, record.mask_T is None, record.lam_T is None, record.sums is None)
            buckets.setdefault(key, []).append(record)
        return [
            cls.of(bucket) if bucket[0].sums is None else FusedRoutingBatch.of(bucket) for bucket in buckets.values()
        ]

    @classmethod
    def of(cls, records: list[RoutingRecord]) -> RoutingBatch:
        """These records side by side."""
        logits = torch.cat([r.logits_TGE.permute(1, 2, 0) for r in records]).permute(2, 0, 1)
        probs = torch.cat([r.probs_TGE.permute(1, 2, 0) for r in records]).permute(2, 0, 1)
        mask = records[0].mask_T
        if mask is not None:
            probs = torch.where(mask.view(-1, 1, 1), probs, 0.0)
        return cls(_names(records), logits.shape[-1], mask, logits, probs, _lambdas(records))

    @cached_property
    def active(self) -> Tensor:
        """``(J, E)`` float: real tokens that give each expert a non-zero weight."""
        # The sign of a weight is 1 or 0; on a CPU sums of floats are several times as fast as those of bool.
        return self.probs_TJE.detach().sign().sum(0)

    @cached_property
    def num_tokens(self) -> Tensor:
        """Real tokens."""
        return self.num_rows if self.mask_T is None else self.mask_T.sum()

    @cached_property
    def num_rows(self) -> Tensor:
        """Tokens with padding."""
        return _number(self.logits_TJE.shape[0], self.logits_TJE.device)

    @cached_property
    def broken(self) -> Tensor:
        """``(J,)`` bool: projections with a non-finite router logit or lambda on some token."""
        zero_J = self.logits_TJE.detach().mul(0).sum((0, 2))  # or NaN
        if self.lam_TJ is not None:
            zero_J = zero_J + self.lam_TJ.detach().mul(0).sum(0)
        return zero_J != 0

    @property
    def prob_sums(self) -> Tensor:
        """``(J, E)``: routing weights of the real tokens."""
        return self.probs_TJE.sum(0)

    def sparsity_sums(self, k: int, mask_padding: bool) -> Tensor | None:
        """`ldmole_ds.ops.losses.sparsity_sum` of the routed tokens, ``(J,)``; None for routers without lambda."""
        if self.lam_TJ is None:
            return None
        return sparsity_sum(self.logits_TJE, self.lam_TJ, k, self.mask_T if mask_padding else None)

    def router_z_sums(self, mask_padding: bool) -> Tensor:
        """`ldmole_ds.ops.losses.router_z_sum` of the routed tokens, ``(J,)``."""
        return router_z_sum(self.logits_TJE, self.mask_T if mask_padding else None)

    def lambda_moments(self) -> tuple[Tensor, Tensor]:
        """Sum of lambda and of its square over the real tokens, ``(J,)`` float64; 0 for routers without it."""
        if self.lam_TJ is None:
            zero_J = torch.zeros(len(self.names), dtype=torch.float64, device=self.logits_TJE.device)
            return zero_J, zero_J
        return _moments(self.lam_TJ, self.mask_T)


@dataclass
class FusedRoutingBatch:
    """The same where the routing kernel has made the sums already (`ldmole_ds.ops.fused_routing`)."""

    names: list[tuple[str, int]]
    num_experts: int
    mask_T: Tensor | None
    num_rows: Tensor
    lam_TJ: Tensor
    sums: RoutingSums

    @classmethod
    def of(cls, records: list[RoutingRecord]) -> FusedRoutingBatch:
        """These records side by side."""
        first = records[0].logits_TGE
        sums = RoutingSums.of(torch.cat([r.sums for r in records], dim=1))
        num_rows = _number(first.shape[0], first.device)
        return cls(_names(records), first.shape[-1], records[0].mask_T, num_rows, _lambdas(records), sums)

    @cached_property
    def num_tokens(self) -> Tensor:
        """Real tokens."""
        return self.num_rows if self.mask_T is None else self.mask_T.sum()

    @property
    def active(self) -> Tensor:
        return self.sums.active_JE

    @property
    def broken(self) -> Tensor:
        return self.sums.broken_J > 0

    @property
    def prob_sums(self) -> Tensor:
        return self.sums.probs_JE.float()

    def sparsity_sums(self, k: int, mask_padding: bool) -> Tensor:
        """The kernel was told both."""
        return self.sums.sparsity_J.float()

    def router_z_sums(self, mask_padding: bool) -> Tensor:
        """The kernel was told."""
        return self.sums.router_z_J.float()

    def lambda_moments(self) -> tuple[Tensor, Tensor]:
        return _moments(self.lam_TJ, self.mask_T)


def _names(records: list[RoutingRecord]) -> list[tuple[str, int]]:
    return [(r.group, j) for r in records for j in range(r.logits_TGE.shape[1])]


def _lambdas(records: list[RoutingRecord]) -> Tensor | None:
    """``(T, J)``, tokens innermost."""
    if records[0].lam_T is None:
        return None
    return torch.cat([r.lam_T.expand(r.logits_TGE.shape[1], -1) for r in records]).t()


def _moments(lam_TJ: Tensor, mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
    lam = lam_TJ.detach().double()
    lam = lam if mask_T is None else torch.where(mask_T.unsqueeze(1), lam, 0.0)
    return lam.sum(0), lam.square().sum(0)


def _number(value: int, device: torch.device) -> Tensor:
    """torch.tensor() would wait for a GPU."""
    return torch.full((), value, dtype=torch.int64, device=device)

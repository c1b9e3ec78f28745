"""How tokens meet their experts: three dispatchers with one contract.

    run(x_TD, probs_TGE, experts, layer) -> y_TO

``experts(x_ND, w_NGe) -> (N, O)`` applies the local experts of all G projections of an input group and sums them
(`ldmole_ds.layers.experts`). The result holds, for each token, the sum over *all* its experts, wherever they live.

The unit of dispatch is (token, destination rank), not (token, expert): a token travels once to each rank that holds
at least one of its active experts in any projection of the group, with its D values and its G * E/P routing weights
for that rank. The answer is already the sum over that rank's experts: one vector of O values returns.

Shape legend: T local tokens, D in_features, G projections, E experts, P = ep_size, e = E/P local experts, S rows sent,
R rows received, O summed out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmole_ds.distributed.all_to_all import CommStats, all_to_all, exchange_counts
from ldmole_ds.distributed.topology import ExpertParallel

Experts = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """What combine must know of a dispatch.

    Attributes:
        token_index_S: ``(S,) int64`` home row of each row sent, ordered by destination rank.
        destination_S: ``(S,) int64`` destination rank of each row sent.
        input_splits: Rows sent to each rank, sum S.
        output_splits: Rows received from each rank, sum R.
    """

    token_index_S: Tensor
    destination_S: Tensor
    input_splits: list[int]
    output_splits: list[int]


def raise_non_finite(layer: str, ranks: list[int] | None = None) -> None:
    """One clear error for NaN or infinite router logits or lambda."""
    where = "" if ranks is None else f" on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    raise FloatingPointError(
        f"non-finite routing in {layer}{where}: the router's logits or lambda hold NaN or infinity. Lower the learning "
        "rate, check the data for corrupt rows, or use bf16 or fp32 instead of fp16"
    )


class LocalTokenDispatcher:
    """All experts are here (``ep_size == 1`` or a replicated layer): the base class and the reference."""

    ep_size = 1

    def __init__(self, stats: CommStats | None = None) -> None:
        self.stats = stats or CommStats()

    def run(self, x_TD: Tensor, probs_TGE: Tensor, experts: Experts, layer: str) -> Tensor:
        """See the module docstring."""
        return experts(x_TD, probs_TGE.to(x_TD.dtype))


class AllToAllTokenDispatcher(LocalTokenDispatcher):
    """``--expert_dispatch tokens``: tokens travel to the experts, results travel back."""

    def __init__(self, topology: ExpertParallel, stats: CommStats | None = None) -> None:
        super().__init__(stats)
        self.topology = topology
        self.ep_size = topology.ep_size

    def run(self, x_TD: Tensor, probs_TGE: Tensor, experts: Experts, layer: str) -> Tensor:
        """See the module docstring. Four collectives in forward and backward together, two of each, plus counts."""
        plan = self.plan(probs_TGE, layer)
        rows_RX = self.dispatch(x_TD, probs_TGE, plan)
        d, (_, g, e) = x_TD.shape[1], probs_TGE.shape
        x_RD, w_RGe = rows_RX.split([d, rows_RX.shape[1] - d], dim=1)
        y_RO = experts(x_RD, w_RGe.view(-1, g, e // self.ep_size))
        return self.combine(y_RO, plan, num_tokens=x_TD.shape[0])

    def plan(self, probs_TGE: Tensor, layer: str) -> DispatchPlan:
        """Who sends which token where, from the support of the routing weights. One count exchange, one host sync."""
        t, g, e = probs_TGE.shape
        group, p = self.topology.ep_group, self.ep_size
        with torch.no_grad():
            active_TP = (probs_TGE.view(t, g, p, e // p) != 0).any(-1).any(1)
            destination_S, token_index_S = active_TP.t().nonzero(as_tuple=True)
            counts = active_TP.sum(0)
            broken = (~torch.isfinite(probs_TGE).all()).to(counts.dtype).expand(p)
            sent = torch.stack([counts, broken], dim=1)
            received = exchange_counts(sent, group, self.stats)
            # NOTE: the one device-to-host synchronisation of a dispatch.
            (input_splits, _), (output_splits, flags) = torch.stack([sent, received]).transpose(1, 2).tolist()
        if any(flags):
            first = self.topology.rank - self.topology.ep_rank
            raise_non_finite(layer, [first + i for i, flag in enumerate(flags) if flag])
        return DispatchPlan(
            token_index_S=token_index_S,
            destination_S=destination_S,
            input_splits=input_splits,
            output_splits=output_splits,
        )

    def dispatch(self, x_TD: Tensor, probs_TGE: Tensor, plan: DispatchPlan) -> Tensor:
        """Send tokens and their routing weights: ``(T, D), (T, G, E) -> (R, D + G*e)`` in the dtype of x."""
        t, g, e = probs_TGE.shape
        by_rank_TPW = probs_TGE.to(x_TD.dtype).view(t, g, self.ep_size, e // self.ep_size).transpose(1, 2).flatten(2)
        weights_SW = by_rank_TPW[plan.token_index_S, plan.destination_S]
        rows_SX = torch.cat([x_TD.index_select(0, plan.token_index_S), weights_SW], dim=1)
        return all_to_all(
            rows_SX, plan.output_splits, plan.input_splits, self.topology.ep_group, self.stats, "dispatch"
        )

    def combine(self, y_RO: Tensor, plan: DispatchPlan, num_tokens: int) -> Tensor:
        """Send results home and add them up: ``(R, O) -> (T, O)``. The backward of dispatch, and the other way round."""
        y_SO = all_to_all(y_RO, plan.input_splits, plan.output_splits, self.topology.ep_group, self.stats, "combine")
        return y_SO.new_zeros(num_tokens, y_SO.shape[1]).index_add(0, plan.token_index_S, y_SO)


class WeightGatherDispatcher(LocalTokenDispatcher):
    """``--expert_dispatch weights``: tokens stay, the experts' weights are gathered over the EP group.

    Cheaper than moving tokens when a group's experts are smaller than its batch of tokens.
    """

    def __init__(self, topology: ExpertParallel, stats: CommStats | None = None) -> None:
        super().__init__(stats)
        self.topology = topology
        self.ep_size = topology.ep_size

    def run(self, x_TD: Tensor, probs_TGE: Tensor, experts: Experts, layer: str) -> Tensor:
        """See the module docstring. One all-gather per expert tensor forward, one reduce-scatter backward."""
        return experts(x_TD, probs_TGE.to(x_TD.dtype), gather_over=self.topology.ep_group, stats=self.stats)


def build_dispatcher(
    topology: ExpertParallel, num_experts: int, expert_dispatch: str, stats: CommStats
) -> LocalTokenDispatcher:
    """The dispatcher of a layer with ``num_experts`` experts under this layout."""
    if not topology.partitions(num_experts):
        return LocalTokenDispatcher(stats)
    if expert_dispatch == "tokens":
        return AllToAllTokenDispatcher(topology, stats)
    if expert_dispatch == "weights":
        return WeightGatherDispatcher(topology, stats)
    raise ValueError(f"expert_dispatch={expert_dispatch!r} is not known: use tokens or weights")

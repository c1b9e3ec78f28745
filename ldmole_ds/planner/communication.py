"""Bytes and seconds of every collective of an optimizer step, by phase, as sent by one rank.

What expert parallelism moves comes from `ldmole_ds.distributed.dispatch_choice`, which ``--expert_dispatch auto`` uses
too; here it is counted over passes (recomputation, chunks) and micro-steps. The phases have the names of `CommStats`,
and equal its counts where the rows are those of the run. ZeRO's collectives are added under names of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from ldmole_ds.distributed.dispatch_choice import Phase, remote_ranks, tokens_phases, weights_phases
from ldmole_ds.model.dispatch_plan import GroupShape
from ldmole_ds.planner.cluster import Cluster
from ldmole_ds.planner.layout import Batch, Layout, Precision, Routing
from ldmole_ds.planner.model_shape import ModelShape
from ldmole_ds.planner.zero import PhaseCost, phase_seconds, zero_phases

# The collectives of expert parallelism, as `CommStats` names them; all others are ZeRO's.
EXPERT_PHASES = {"counts", "dispatch", "combine", "combine_backward", "dispatch_backward", "gather", "reduce_scatter"}


def expected_rows(group: GroupShape, tokens: int, ep_size: int, routing: Routing) -> float:
    """Rows that a rank sends in a dispatch of this group, T f."""
    visits = routing.remote_ranks
    if visits is None:
        visits = remote_ranks(ep_size, group.num_experts, len(group.out_features), routing.active_experts)
    return tokens * visits


def expert_phases(
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    itemsize: int,
    rows: Sequence[tuple[float, float]],
    first_has_gradient: bool = False,
) -> dict[str, Phase]:
    """Calls and bytes of the expert-parallel collectives of one optimizer step, all groups together.

    Args:
        shape, layout, batch: What is planned; experts_per_layer may leave groups replicated.
        itemsize: Bytes of an adapter value.
        rows: Per group, rows sent and received in the dispatch of one micro-step.
        first_has_gradient: Whether the first group's input has one. It has none where the embedding below is frozen, so
            that only the routing weights' gradients travel back; under checkpointing Transformers makes it ask for one.
    """
    total: dict[str, Phase] = {}

    def add(name: str, calls: float, num_bytes: float) -> None:
        before = total.get(name, Phase(0, 0))
        total[name] = Phase(before.calls + calls, before.bytes + num_bytes)

    first_has_gradient |= layout.checkpointing
    p, steps, kept = layout.ep_size, batch.accumulation, keeps_gathered(layout, batch)
    recomputed = 2 if layout.checkpointing else 1
    for index, (group, (sent, received)) in enumerate(zip(shape.groups, rows, strict=True)):
        if not shape.is_partitioned(group, p):
            continue
        sizes = {
            "ep_size": p,
            "num_experts": group.num_experts,
            "in_features": group.in_features,
            "out_features": group.out_features,
            "itemsize": itemsize,
        }
        if layout.dispatch == "weights":
            for name, phase in weights_phases(r=shape.config.r, **sizes).items():
                times = (1 if kept else steps * recomputed) if name == "gather" else steps
                add(name, times * phase.calls, times * phase.bytes)
            continue
        chunks = -(-batch.tokens // layout.chunk_tokens) if layout.chunk_tokens else 1
        # What a chunk received is sent again in backward instead of being kept.
        forward = recomputed + (1 if layout.chunk_tokens else 0)
        for name, phase in tokens_phases(sent, received, **sizes).items():
            times = {"counts": recomputed, "dispatch": forward, "combine": forward}.get(name, 1) * steps
            num_bytes = phase.bytes * (chunks if name == "counts" else 1)
            if name == "dispatch_backward" and index == 0 and not first_has_gradient:
                num_bytes -= received * group.in_features * itemsize
            add(name, times * chunks, times * num_bytes)
        if layout.chunk_tokens:
            add("counts", steps * recomputed, steps * recomputed * (p - 1) * 8)
    if layout.dispatch == "weights" and kept:
        # Each pass asks whether what was gathered before is still right: once per dispatcher.
        askers = len({g.num_experts for g in shape.groups if shape.is_partitioned(g, p)})
        add("counts", askers * steps, askers * steps * (p - 1) * 8)
    return total


def communication(
    shape: ModelShape, layout: Layout, batch: Batch, cluster: Cluster, precision: Precision, routing: Routing
) -> dict[str, PhaseCost]:
    """All collectives of one optimizer step.

    Under skew the fullest rank receives, and answers, ``skew`` times the mean, and all wait for it.
    """
    found: dict[str, PhaseCost] = {}
    if layout.ep_size > 1:
        expected = [expected_rows(g, batch.tokens, layout.ep_size, routing) for g in shape.groups]
        rows = [(n, n) for n in expected]
        link = cluster.exchange_link(layout.ep_size)
        host = cluster.costs.collective(layout, cluster.device.op_seconds)
        slow = routing.skew if layout.dispatch == "tokens" else 1.0
        for name, phase in expert_phases(shape, layout, batch, precision.adapter, rows).items():
            factor = 1.0 if name == "counts" else slow
            found[name] = PhaseCost(phase.calls, phase.bytes, phase.calls * host + phase_seconds(phase, link, factor))
    found.update(zero_phases(shape, layout, batch, cluster, precision))
    return found


def keeps_gathered(layout: Layout, batch: Batch) -> bool:
    """Whether gathered experts stay for the other micro-steps of an optimizer step."""
    return batch.accumulation > 1 and layout.zero_stage < 3

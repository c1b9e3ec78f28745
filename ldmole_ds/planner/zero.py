"""What data parallelism and ZeRO move in an optimizer step: gradients, updated weights, and under stage 3 parameters.

A ring sends (n - 1) / n of a buffer per rank, an all-reduce twice that. The calls are those of DeepSpeed with the
settings of ``ds_configs`` as the Trainer completes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldmole_ds.distributed.dispatch_choice import Phase
from ldmole_ds.distributed.link import Link
from ldmole_ds.planner.cluster import Cluster
from ldmole_ds.planner.layout import Batch, Layout, Precision
from ldmole_ds.planner.model_shape import ModelShape

# DeepSpeed keeps up to so many gathered parameters (stage3_max_live_parameters): a smaller model is gathered once.
ZERO3_LIVE_PARAMETERS = 1_000_000_000
# Stage 3 leaves parameters of up to so many times the hidden size whole; gradients go in buckets of its square.
_WHOLE_BELOW = 10


@dataclass(frozen=True)
class PhaseCost:
    """Of one optimizer step: ``calls``, ``bytes`` sent by one rank, ``seconds``."""

    calls: float
    bytes: float
    seconds: float


def phase_seconds(phase: Phase, link: Link, factor: float = 1.0) -> float:
    """On this link; ``factor`` times the bytes."""
    return phase.calls * link.latency + factor * phase.bytes / link.bandwidth


def zero_phases(
    shape: ModelShape, layout: Layout, batch: Batch, cluster: Cluster, precision: Precision
) -> dict[str, PhaseCost]:
    """By name; ``fetch`` is the host's work for the parameters of stage 3, besides their gathers."""
    world, stage, item = cluster.world_size, layout.zero_stage, precision.adapter
    if world == 1:
        return {}
    found: dict[str, PhaseCost] = {}
    twins, everyone = world // layout.ep_size, (world, cluster.ring_link(world, 1))
    holders = {"dense": everyone, "experts": (twins, cluster.ring_link(twins, layout.ep_size))}

    def ring(
        name: str, values: float, itemsize: float, among: tuple[int, Link], times: float, calls: float = 1
    ) -> None:
        members, link = among
        if values and members > 1 and times:
            phase = Phase(times * calls, times * values * itemsize * (members - 1) / members)
            host = phase.calls * cluster.costs.reduction if name.startswith("reduce") else 0.0
            found[name] = PhaseCost(phase.calls, phase.bytes, host + phase_seconds(phase, link))

    def split(sizes: list[int]) -> tuple[list[int], list[int]]:
        limit = _WHOLE_BELOW * shape.hidden_size
        return [n for n in sizes if n > limit], [n for n in sizes if n <= limit]

    # Stages 2 and 3 keep a share of the gradients only, so every micro-step is reduced; an all-reduce is two rings.
    reductions = (batch.accumulation if stage >= 2 else 1) * (1 if stage == 3 else 2)
    passes = batch.accumulation * (1 if shape.frozen <= ZERO3_LIVE_PARAMETERS else 2)
    for name, sizes in zip(holders, shape.trainable_tensors(layout.ep_size), strict=True):
        among = holders[name]
        ring(f"reduce_{name}", sum(sizes), item, among, reductions, max(1.0, sum(sizes) / shape.hidden_size**2))
        gathered, whole = split(sizes) if stage == 3 else ([], sizes)
        ring(f"update_{name}", sum(whole), item, among, 1 if stage else 0)
        ring(f"gather_{name}", sum(gathered), item, among, passes, len(gathered))
    if stage == 3:
        gathered, _ = split(list(shape.base_tensors))
        width = shape.frozen_bytes(precision.base, precision.quantization) / shape.frozen
        ring("gather_base", sum(gathered), width, everyone, passes, len(gathered))
        # Modules fetch what they use in every pass.
        fetches = (3 if layout.checkpointing else 2) * batch.accumulation * (len(shape.base_tensors) + shape.tensors)
        found["fetch"] = PhaseCost(fetches, 0.0, fetches * cluster.costs.fetching(cluster.device.op_seconds))
    projections = sum(len(g.out_features) * (g.num_experts + 1) for g in shape.groups)
    ring("statistics", projections, 8, everyone, 2 * batch.accumulation)
    return found

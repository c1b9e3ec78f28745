"""Memory of one rank by what holds it. The process itself (interpreter, libraries, communicator) is not in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ldmole_ds.planner.communication import expected_rows, keeps_gathered
from ldmole_ds.planner.layout import Batch, Layout, Precision, Routing
from ldmole_ds.planner.model_shape import ModelShape
from ldmole_ds.planner.zero import ZERO3_LIVE_PARAMETERS


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        base: Frozen weights (their share under stage 3).
        adapter: Trainable weights.
        gradients: Of the trainable weights.
        masters: float32 copies that the optimizer updates (stages 1 to 3, and every half-precision engine).
        moments: Two float32 values of AdamW per weight.
        gathered: Stage 3: parameters that are whole at the same time.
        activations: Activations and temporaries at their peak.
        dispatch: Rows received from other ranks, and what is kept for their backward; or the gathered experts.
        worst_dispatch: The same if every token of the EP group chooses this rank.
    """

    base: float
    adapter: float
    gradients: float
    masters: float
    moments: float
    gathered: float
    activations: float
    dispatch: float
    worst_dispatch: float

    @property
    def total(self) -> float:
        """As expected."""
        return sum(value for name, value in asdict(self).items() if name != "worst_dispatch")

    @property
    def worst(self) -> float:
        """Under the worst skew."""
        return self.total - self.dispatch + self.worst_dispatch


def memory_per_rank(
    shape: ModelShape,
    layout: Layout,
    batch: Batch,
    world_size: int,
    precision: Precision,
    routing: Routing,
    activations: float,
) -> Memory:
    """One rank's memory in this layout.

    Args:
        shape, layout, batch, world_size, precision, routing: What is planned.
        activations: Peak of the traced step (`StepTrace.peak`), with all experts on the rank.
    """
    dense, experts = shape.held(layout.ep_size)
    twins = world_size // layout.ep_size
    trainable, owned = dense + experts, dense / world_size + experts / twins
    item, stage = precision.adapter, layout.zero_stage
    base = shape.frozen_bytes(precision.base, precision.quantization)
    gathered = 0.0
    if stage == 3:
        whole = base * min(1.0, ZERO3_LIVE_PARAMETERS / shape.frozen) + trainable * item
        base, gathered = base / world_size, whole if world_size > 1 else 0.0
    optimized = trainable if stage == 0 else owned
    expected, worst = (_dispatch(shape, layout, batch, item, routing, all_here) for all_here in (False, True))
    return Memory(
        base=base,
        adapter=(owned if stage == 3 else trainable) * item,
        gradients=(owned if stage >= 2 else trainable) * item,
        masters=0.0 if stage == 0 and item == 4 else 4.0 * optimized,
        moments=8.0 * optimized,
        gathered=gathered,
        activations=activations,
        dispatch=expected,
        worst_dispatch=worst,
    )


def _dispatch(shape: ModelShape, layout: Layout, batch: Batch, item: int, routing: Routing, all_here: bool) -> float:
    """Bytes beyond the traced step, in which all experts were here and no row came from elsewhere.

    Every group keeps its rows, or a copy of the gathered experts, until its backward; under checkpointing or chunks the
    largest group's are the only ones. What micro-steps share stays as well.
    """
    p, kept, passing, stays = layout.ep_size, [], [], 0.0
    for group in shape.groups:
        if not shape.is_partitioned(group, p):
            continue
        g, e, o = len(group.out_features), group.num_experts // p, sum(group.out_features)
        values = group.num_experts * shape.expert_parameters(group)
        if layout.dispatch == "weights":
            kept.append(values * item)
            stays += values * item if keeps_gathered(layout, batch) else 0.0
            passing.append(values * item)  # their gradient, until it is reduced
            continue
        rows = routing.skew * expected_rows(group, batch.tokens, p, routing)
        rows = min(rows, (p - 1) * batch.tokens)
        if all_here:
            rows = (p - 1) * batch.tokens
        if layout.chunk_tokens:
            rows = min(rows, (p - 1) * min(layout.chunk_tokens, batch.tokens))
        r = shape.config.r
        remote = rows * (group.in_features + g * e * (2 + r)) * item
        elsewhere = batch.tokens * g * (group.num_experts - e) * (1 + r) * item
        kept.append(remote - elsewhere)
        passing.append(rows * (o + group.in_features) * item)
    if not kept:
        return 0.0
    one_at_a_time = layout.checkpointing or (layout.chunk_tokens and layout.dispatch == "tokens")
    return stays + (max(kept) if one_at_a_time else sum(kept)) + max(passing)

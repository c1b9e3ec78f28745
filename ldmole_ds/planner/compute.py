"""Seconds that one rank computes in an optimizer step."""

from __future__ import annotations

from ldmole_ds.model.dispatch_plan import GroupShape
from ldmole_ds.planner.cluster import Device
from ldmole_ds.planner.communication import expected_rows
from ldmole_ds.planner.costs import StepCosts
from ldmole_ds.planner.layout import Batch, Layout, Precision, Routing
from ldmole_ds.planner.model_shape import ModelShape
from ldmole_ds.planner.trace import StepTrace, op_seconds

# Values moved per parameter: AdamW as about ten operations on whole tensors (21), and the engine's copies of the
# gradient, its norm, clipping, and the copy of the weight (9).
_OPTIMIZER_VALUES = 30


def expert_seconds(
    shape: ModelShape, group: GroupShape, rows: float, num_experts: int, device: Device, item: int, passes: int = 3
) -> float:
    """The experts' products for ``rows`` tokens and ``num_experts`` local experts, forward and backward.

    Forward is ``x A^T`` and, per projection, ``(h w) B``; each has two products of equal size in backward. ``passes``
    is 3, or 4 where forward is computed twice. Between them stand elementwise operations on (rows, G, experts, r).
    """
    if not rows:
        return 0.0
    half, g, inner = item == 2, len(group.out_features), num_experts * shape.config.r
    products = [(group.in_features, g * inner), *((inner, out) for out in group.out_features)]
    total = sum(op_seconds(device, half, 2.0 * rows * a * b, item * (rows * (a + b) + a * b)) for a, b in products)
    elementwise = 3 * rows * g * inner * item / device.bandwidth
    return passes * (total + elementwise)


def compute_seconds(
    shape: ModelShape,
    trace: StepTrace,
    layout: Layout,
    batch: Batch,
    world_size: int,
    device: Device,
    precision: Precision,
    routing: Routing,
    costs: StepCosts,
) -> tuple[float, float]:
    """``(micro-steps, optimizer)`` of one optimizer step on the fullest rank, in seconds.

    The trace has all experts on the rank. Under ``tokens`` own and received tokens meet the local ones instead.
    """
    micro, traced = trace.seconds(device), 4 if layout.checkpointing else 3
    # A chunk's experts are computed once more in backward.
    passes = traced + (1 if layout.chunk_tokens and layout.dispatch == "tokens" else 0)
    for group in shape.groups:
        if layout.dispatch != "tokens" or not shape.is_partitioned(group, layout.ep_size):
            continue
        args, local = (device, precision.adapter), group.num_experts // layout.ep_size
        rows = routing.skew * expected_rows(group, batch.tokens, layout.ep_size, routing)
        micro -= expert_seconds(shape, group, batch.tokens, group.num_experts, *args, traced)
        micro += expert_seconds(shape, group, batch.tokens, local, *args, passes)
        micro += expert_seconds(shape, group, rows, local, *args, passes)
        # Rows are picked, packed and added back.
        width = group.in_features + sum(group.out_features)
        micro += 2 * passes * rows * width * precision.adapter / device.bandwidth
    dense, experts = shape.held(layout.ep_size)
    owned = dense + experts
    if layout.zero_stage:
        owned = dense / world_size + experts / (world_size // layout.ep_size)
    return batch.accumulation * micro, costs.tensor * shape.tensors + 4.0 * _OPTIMIZER_VALUES * owned / device.bandwidth

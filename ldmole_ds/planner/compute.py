"""Seconds that one rank computes in an optimizer step."""

from __future__ import annotations

import torch

from ldmole_ds.model.dispatch_plan import GroupShape
from ldmole_ds.ops.expert_compute import dense_operations, grouped_operations, may_group_on
from ldmole_ds.planner.cluster import Device
from ldmole_ds.planner.communication import expected_rows
from ldmole_ds.planner.costs import StepCosts
from ldmole_ds.planner.layout import Batch, Layout, Precision, Routing
from ldmole_ds.planner.model_shape import ModelShape
from ldmole_ds.planner.trace import StepTrace, op_seconds


def expert_seconds(
    shape: ModelShape,
    group: GroupShape,
    rows: float,
    num_experts: int,
    pairs: float,
    passes: int,
    device: Device,
    item: int,
    asked_once: bool = False,
) -> float:
    """The experts' products of a group, forward and backward, in the way that the layer's own rule chooses.

    Args:
        shape, group: Of the layer.
        rows: Tokens at the experts.
        num_experts: Local ones.
        pairs: Active (projection, token, local expert) of them.
        passes: 3, or 4 where forward is computed twice.
        device: That computes.
        item: Bytes of an adapter value.
        asked_once: Whether the layer looks at the routing right away. Else it asks before it has routed, and where it
            then computes h that is dense for sure, by the quicker library.
    """
    layer = (num_experts, shape.config.r, group.in_features, group.out_features)
    dtype = torch.bfloat16 if item == 2 else torch.float32
    if device.grouped_speed and may_group_on(torch.device("cpu"), dtype):
        # Counting an expert for each token, and then the pairs.
        dense = dense_operations(rows, *layer) * device.grouped_speed
        first, then = (grouped_operations(n, rows, *layer) for n in (rows * len(group.out_features), pairs))
        if first < dense * (device.grouped_margin if asked_once else 1.0) and then < dense * device.grouped_margin:
            speed = device.grouped_speed * (device.half_flops if item == 2 else device.float_flops)
            return passes / 3 * grouped_operations(pairs, rows, *layer) / speed
    return dense_seconds(shape, group, rows, num_experts, passes, device, item)


def dense_seconds(
    shape: ModelShape, group: GroupShape, rows: float, num_experts: int, passes: int, device: Device, item: int
) -> float:
    """The same of dense products.

    Forward is ``x A^T`` and, per projection, ``(h w) B``; each has two products of equal size in backward. Between them
    stand elementwise operations on (rows, G, experts, r).
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

    The trace has all experts on the rank and dense products; what is computed instead takes their place. Under
    ``tokens`` own and received tokens meet the local experts.
    """
    micro, traced = trace.seconds(device), 4 if layout.checkpointing else 3
    # A chunk's experts are computed once more in backward.
    passes = traced + (1 if layout.chunk_tokens and layout.dispatch == "tokens" else 0)
    for group in shape.groups:
        tokens, experts, p, args = batch.tokens, group.num_experts, layout.ep_size, (device, precision.adapter)
        pairs = tokens * min(routing.active_experts, experts) * len(group.out_features)
        # Weights that are gathered between a group's parts are there when it has routed.
        gathered = layout.dispatch == "weights" and layout.zero_stage == 3 and shape.is_partitioned(group, p)
        products = [((tokens, experts, pairs, traced), gathered)]
        if layout.dispatch == "tokens" and shape.is_partitioned(group, p):
            rows = routing.skew * expected_rows(group, tokens, p, routing)
            received = routing.skew * pairs * (p - 1) / p
            own, others = (tokens, experts // p, pairs / p, passes), (rows, experts // p, received, passes)
            products = [(own, bool(layout.chunk_tokens)), (others, True)]
            # Rows are picked, packed and added back.
            width = group.in_features + sum(group.out_features)
            micro += 2 * passes * rows * width * precision.adapter / device.bandwidth
        micro += sum(expert_seconds(shape, group, *of_rows, *args, once) for of_rows, once in products)
        micro -= dense_seconds(shape, group, tokens, experts, traced, *args)
    dense, experts = shape.held(layout.ep_size)
    owned = dense + experts
    if layout.zero_stage:
        owned = dense / world_size + experts / (world_size // layout.ep_size)
    engine = costs.tensor * shape.tensors + batch.accumulation * costs.gradient * (dense + experts)
    return batch.accumulation * micro, engine + costs.updating(device.bandwidth) * owned

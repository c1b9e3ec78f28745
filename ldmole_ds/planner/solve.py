"""From the times of a calibration to the speeds and costs with which the planner's model takes as long."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ldmole_ds.planner.calibrate import (
    EXCHANGED,
    PRODUCT,
    VALUES,
    Times,
    experts_for,
    layout_name,
    reference_layouts,
)
from ldmole_ds.planner.cluster import Cluster, Device, Wire
from ldmole_ds.planner.communication import EXPERT_PHASES, expert_phases
from ldmole_ds.planner.costs import StepCosts
from ldmole_ds.planner.estimate import Estimate, Job
from ldmole_ds.planner.layout import Layout, Precision, Routing
from ldmole_ds.planner.reference import STARTING, THIN, WIDE, Reference
from ldmole_ds.planner.step_kind import kind_of
from ldmole_ds.planner.trace import StepTrace, op_seconds

# Of the large product's speed: less, or more, is a measurement that went wrong.
_LEAST_REACHED = 0.1
_HALVINGS = 30


@dataclass(frozen=True)
class Calibration:
    """One rank, the wire by ep_size (empty: one rank has none), and the costs of a step."""

    device: Device
    wires: dict[int, Wire]
    costs: StepCosts

    def wire(self, ep_size: int = 1) -> Wire:
        """Of EP groups of this size; else of the largest measured. One rank sends nothing."""
        if not self.wires:
            return Wire(1e-6, 1e9)
        return self.wires.get(ep_size) or self.wires[max(self.wires)]


def solve(times: Times) -> Calibration:
    """The speeds and costs with which the planner's model takes these times for the reference. Not collective."""
    experts = experts_for(times.world_size)
    seconds, (m, k, n) = times.seconds, PRODUCT[times.kind]
    bandwidth = 3 * 4 * VALUES[times.kind] / seconds["sum"]
    flops = {name: 2 * m * k * n / seconds[name] for name in ("half", "float")}
    device = Device(
        times.name,
        times.memory,
        flops["half"],
        flops["float"],
        bandwidth,
        op_seconds=0.0,
        asynchronous=times.kind == "cuda",
        grouped_speed=times.grouped_speed,
        grouped_margin=times.grouped_margin,
    )
    starting, thin = (
        reference.trace(experts, kind_of(Layout(), device, Precision())) for reference in (STARTING, THIN)
    )
    starting = starting.first
    busy = 0.0 if device.asynchronous else sum(n * op_seconds(device, *op) for op, n in starting.ops.items())
    device = replace(device, op_seconds=max(seconds["starting"] - busy, 0.0) / starting.calls)
    if not device.asynchronous:
        device = _as_reached(device, seconds["thin"], thin)
    wires = {size: _wire(times, size) for size in times.ep_sizes}
    return Calibration(device, wires, _costs(times, Calibration(device, wires, StepCosts())))


def describe(found: Calibration) -> str:
    """What was measured, in a line."""
    device, wire, costs = found.device, found.wire(), found.costs
    engine = (
        f"{costs.reduction * 1e3:.2f} ms per reduction" if found.wires else f"{costs.tensor * 1e6:.0f} us per tensor"
    )
    text = (
        f"{device.name}: {device.float_flops / 1e9:.1f} GFLOPS float32, {device.half_flops / 1e9:.1f} half, memory "
        f"{device.bandwidth / 1e9:.1f} GB/s, {device.op_seconds * 1e6:.1f} us per operation; value: "
        f"{costs.value * 1e9:.1f} ns per update, {costs.gradient * 1e9:.1f} per gradient; engine {engine}"
    )
    if not found.wires:
        return f"{text}; link and expert parallelism not measured (1 rank)"
    modes = [
        f"{mode} {cost * 1e3:.2f} ms (ep_size {size})"
        for mode in ("weights", "tokens")
        for size, cost in getattr(costs, mode).items()
    ]
    return (
        f"{text}; link {wire.latency * 1e6:.0f} us, {wire.bandwidth / 1e9:.2f} GB/s; each collective in a step: "
        f"{', '.join(modes)}; ZeRO-3 {costs.fetch * 1e6:.0f} us per parameter fetched"
    )


def _costs(times: Times, speeds: Calibration) -> StepCosts:
    """Each from a step that has it: what it takes longer than the model says without it."""
    experts = experts_for(times.world_size)

    def estimate(layout: Layout, costs: StepCosts, reference: Reference = THIN) -> Estimate:
        return estimate_reference(times, replace(speeds, costs=costs), layout, reference)

    replicated, *others = reference_layouts(times.world_size)
    found = StepCosts(fetch=0.0, tokens={1: 0.0}, weights={1: 0.0}, value=0.0)
    planned, values = estimate(replicated, found, WIDE), WIDE.shape(experts).trainable
    gathering = sum(phase.seconds for name, phase in planned.phases.items() if name.startswith("update"))
    value = max(times.seconds["wide update"] - gathering, 0.0) * times.world_size / values
    # What the engine adds to a tiny model's step is mostly waiting in reductions where there are any, else its work on
    # tensors. What it adds to a large adapter's besides is its work on the gradients' values.
    planned = estimate(replicated, found, STARTING)
    reductions = sum(phase.calls for name, phase in planned.phases.items() if name.startswith("reduce"))
    name, number = ("reduction", reductions) if reductions else ("tensor", STARTING.shape(experts).tensors)
    each = max(times.seconds["starting step"] - planned.step_seconds, 0.0) / number
    found = replace(found, value=value, **{name: each})
    more = times.seconds["wide step"] - estimate(replicated, found, WIDE).step_seconds
    found = replace(found, gradient=max(more, 0.0) / values)
    # The others are compared with replicated experts, in the same model.
    missed = times.seconds[layout_name(replicated)] - estimate(replicated, found).step_seconds
    measured = {"tokens": {}, "weights": {}}
    for layout in others:
        planned = estimate(layout, found)
        seconds = max(times.seconds[layout_name(layout)] - planned.step_seconds - missed, 0.0)
        if layout.zero_stage == 3:
            measured["fetch"] = seconds / planned.phases["fetch"].calls
        else:
            calls = sum(planned.phases[name].calls for name in EXPERT_PHASES & set(planned.phases))
            measured[layout.dispatch][layout.ep_size] = seconds / calls
    return replace(found, **{"fetch": None, **measured})


def estimate_reference(times: Times, speeds: Calibration, layout: Layout, reference: Reference = THIN) -> Estimate:
    """A step of the reference model in this layout, on a machine of these speeds."""
    shape, batch = reference.shape(experts_for(times.world_size)), reference.batch
    wire, remote = speeds.wire(layout.ep_size), None
    cluster = Cluster(speeds.device, 1, times.world_size, wire, wire, speeds.costs)
    if layout.dispatch == "tokens":
        # Rows as they were: the bytes sent over those of one row per token.
        one = expert_phases(shape, layout, batch, 4, [(batch.tokens, 0.0)] * len(shape.groups))
        remote = times.dispatched[layout.ep_size] / one["dispatch"].bytes
    routing = Routing(shape.config.num_experts, remote_ranks=remote)
    kind = kind_of(layout, speeds.device, Precision())
    trace = reference.trace(shape.config.num_experts, kind)
    return Job(shape, cluster, batch, Precision(), routing, {kind: trace}).estimate(layout)


def _wire(times: Times, size: int) -> Wire:
    """Between two ranks of an EP group, from the time of its all-to-all."""
    short, long = (times.seconds[f"{name} exchange {size}"] for name in ("short", "long"))
    return Wire(short / (size - 1), EXCHANGED * (size - 1) / size / max(long - short, 1e-9))


def _as_reached(device: Device, seconds: float, trace: StepTrace) -> Device:
    """The speed of products such that the reference step takes as long as it did."""

    def slowed(reached: float) -> Device:
        return replace(device, half_flops=reached * device.half_flops, float_flops=reached * device.float_flops)

    low, high = _LEAST_REACHED, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if trace.seconds(slowed(middle)) > seconds else (low, middle)
    return slowed(high)

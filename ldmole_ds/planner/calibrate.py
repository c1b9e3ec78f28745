"""The speeds of the machine at hand, as the planner needs them: `measure` takes the times, `solve` derives the speeds.

All ranks are at work at once, as they are in training, so that ranks which share cores or memory are slowed in the same
way. A large product reaches more than the many thin ones of a step do: where the host waits for each operation, a
reference step says how much of it is reached. What a step costs beyond that is what steps of the same model take longer
in DeepSpeed's engine: with replicated experts, with each dispatch, and under ZeRO-3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_ds.distributed import expert_parallel
from ldmole_ds.model import LDMoLEModel, get_ldmole_model
from ldmole_ds.planner.calibrate_steps import reference_step
from ldmole_ds.planner.cluster import Cluster, Device, Wire
from ldmole_ds.planner.communication import EXPERT_PHASES, expert_phases
from ldmole_ds.planner.costs import StepCosts
from ldmole_ds.planner.estimate import Estimate, Job
from ldmole_ds.planner.layout import Layout, Precision, Routing
from ldmole_ds.planner.model_shape import ModelShape, shape_of_config
from ldmole_ds.planner.reference import STARTING, THIN, Reference, alone
from ldmole_ds.planner.timing import fastest
from ldmole_ds.planner.trace import StepTrace, Trace, op_seconds

# Rows, inner size and columns of the product; values of the elementwise sum: what layers of mid-sized models have.
_PRODUCT = {"cpu": (512, 1024, 1024), "cuda": (8192, 8192, 8192)}
_VALUES = {"cpu": 1 << 24, "cuda": 1 << 27}
_DTYPES = {"float": torch.float32, "half": torch.bfloat16}
_EXCHANGED = 1 << 20  # bytes
# Of the large product's speed: less, or more, is a measurement that went wrong.
_LEAST_REACHED = 0.1


@dataclass(frozen=True)
class Times:
    """What `measure` found.

    Attributes:
        name, memory, kind: Of the device; ``kind`` is cpu or cuda.
        world_size: Ranks that measured together.
        seconds: By what was timed.
        dispatched: By ep_size, bytes that a rank sent in the dispatches of a reference step.
    """

    name: str
    memory: float
    kind: str
    world_size: int
    seconds: dict[str, float]
    dispatched: dict[int, float]

    def best(self, other: Times) -> Times:
        """The faster of two measurements of the same machine, each time by itself: other work only adds."""
        return replace(self, seconds={name: min(t, other.seconds[name]) for name, t in self.seconds.items()})

    @property
    def ep_sizes(self) -> list[int]:
        """At which exchanges were timed."""
        return sorted(self.dispatched)


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


def measure(device: torch.device, say: Callable[[str], None] = lambda text: None) -> Times:
    """Take all times. Collective: a process group is up, all ranks measure together.

    Args:
        device: Of this rank.
        say: Called with each stage's name.
    """
    world, kind, seconds = dist.get_world_size(), device.type, {}
    say("products and memory")
    for name, dtype in _DTYPES.items():
        m, k, n = _PRODUCT[kind]
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        seconds[name] = fastest(lambda a=a, b=b: a @ b.t(), device)
    x = torch.randn(_VALUES[kind], device=device)
    y = torch.empty_like(x)
    seconds["sum"] = fastest(lambda: torch.add(x, x, out=y), device)
    say("steps without communication")
    experts = experts_for(world)
    seconds["starting"] = _plain_step(STARTING, experts, device)
    seconds["thin"] = _plain_step(THIN, experts, device)
    dispatched = {}
    for layout in reference_layouts(world):
        say(f"training steps, {layout_name(layout)}")
        found = reference_step(THIN, experts, layout, device)
        seconds[layout_name(layout)] = found["seconds"]
        if layout.dispatch == "tokens":
            dispatched[layout.ep_size] = found["dispatched"]
    for size in dispatched:
        say(f"the link, groups of {size}")
        for name, num_bytes in (("short", 4 * size), ("long", _EXCHANGED)):
            seconds[f"{name} exchange {size}"] = _exchange(size, num_bytes, device)
    memory = torch.cuda.get_device_properties(device).total_memory if kind == "cuda" else _host_memory()
    name = torch.cuda.get_device_name(device) if kind == "cuda" else "CPU rank"
    return Times(name, memory, kind, world, seconds, dispatched)


def experts_for(world_size: int) -> int:
    """Of a reference model: about eight, and a multiple of the ranks."""
    return world_size * max(1, 8 // world_size)


def reference_layouts(world_size: int) -> list[Layout]:
    """In which steps are taken: replicated first."""
    sizes = sorted({2, world_size} if world_size % 2 == 0 else {world_size} - {1})
    stages = [Layout(), Layout(1, 3)] if world_size > 1 else [Layout()]
    return stages + [Layout(size, 2, mode) for size in sizes for mode in ("weights", "tokens")]


def layout_name(layout: Layout) -> str:
    """Of its time."""
    return f"{layout.dispatch}, ep_size {layout.ep_size}, ZeRO-{layout.zero_stage}"


def solve(times: Times) -> Calibration:
    """The speeds and costs with which the planner's model takes these times for the reference. Not collective."""
    experts = experts_for(times.world_size)
    starting, thin = STARTING.trace(experts).first, THIN.trace(experts)
    seconds, (m, k, n) = times.seconds, _PRODUCT[times.kind]
    bandwidth = 3 * 4 * _VALUES[times.kind] / seconds["sum"]
    flops = {name: 2 * m * k * n / seconds[name] for name in _DTYPES}
    device = Device(times.name, times.memory, flops["half"], flops["float"], bandwidth, 0.0, times.kind == "cuda")
    busy = 0.0 if device.asynchronous else _busy(starting, device)
    device = replace(device, op_seconds=max(seconds["starting"] - busy, 0.0) / starting.calls)
    if not device.asynchronous:
        device = _as_reached(device, seconds["thin"], thin.first)
    wires = {size: _wire(times, size) for size in times.ep_sizes}
    return Calibration(device, wires, _costs(times, Calibration(device, wires, StepCosts()), thin))


def describe(found: Calibration) -> str:
    """What was measured, in a line."""
    device, wire, costs = found.device, found.wire(), found.costs
    text = (
        f"{device.name}: {device.float_flops / 1e9:.1f} GFLOPS float32, {device.half_flops / 1e9:.1f} half, memory "
        f"{device.bandwidth / 1e9:.1f} GB/s, {device.op_seconds * 1e6:.1f} us per operation; engine "
        f"{costs.tensor * 1e6:.0f} us per trainable tensor"
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


def _costs(times: Times, speeds: Calibration, trace: StepTrace) -> StepCosts:
    """Each from a layout that has it: what its step takes longer than the model says without it."""
    shape = shape_of_config(THIN.hf_config, THIN.adapter(experts_for(times.world_size)))

    def more(layout: Layout, costs: StepCosts) -> tuple[float, Estimate]:
        estimate = _estimate(times, replace(speeds, costs=costs), shape, trace, layout)
        return times.seconds[layout_name(layout)] - estimate.step_seconds, estimate

    replicated, *others = reference_layouts(times.world_size)
    found = StepCosts(fetch=0.0, tokens={1: 0.0}, weights={1: 0.0})
    missed = more(replicated, found)[0]
    found = replace(found, tensor=max(missed, 0.0) / shape.tensors)
    # The others are compared with it, so that what the model has too much there is not taken off again.
    too_much, measured = min(missed, 0.0), {"tokens": {}, "weights": {}}
    for layout in others:
        seconds, estimate = more(layout, found)
        seconds = max(seconds - too_much, 0.0)
        if layout.zero_stage == 3:
            measured["fetch"] = seconds / estimate.phases["fetch"].calls
        else:
            calls = sum(estimate.phases[name].calls for name in EXPERT_PHASES & set(estimate.phases))
            measured[layout.dispatch][layout.ep_size] = seconds / calls
    return StepCosts(found.tensor, **measured)


def _estimate(times: Times, speeds: Calibration, shape: ModelShape, trace: StepTrace, layout: Layout) -> Estimate:
    wire, remote = speeds.wire(layout.ep_size), None
    cluster = Cluster(speeds.device, 1, times.world_size, wire, wire, speeds.costs)
    if layout.dispatch == "tokens":
        # Rows as they were: the bytes sent over those of one row per token.
        one = expert_phases(shape, layout, THIN.batch, 4, [(THIN.batch.tokens, 0.0)] * len(shape.groups))
        remote = times.dispatched[layout.ep_size] / one["dispatch"].bytes
    routing = Routing(shape.config.num_experts, remote_ranks=remote)
    return Job(shape, cluster, THIN.batch, Precision(), routing, {False: trace}).estimate(layout)


def _wire(times: Times, size: int) -> Wire:
    """Between two ranks of an EP group, from the time of its all-to-all."""
    short, long = (times.seconds[f"{name} exchange {size}"] for name in ("short", "long"))
    return Wire(short / (size - 1), _EXCHANGED * (size - 1) / size / max(long - short, 1e-9))


def _as_reached(device: Device, seconds: float, trace: Trace) -> Device:
    """The speed of products such that the reference step takes as long as it did."""
    moving = replace(device, half_flops=math.inf, float_flops=math.inf)
    products = _busy(trace, device) - _busy(trace, moving)
    left = seconds - trace.calls * device.op_seconds - _busy(trace, moving)
    reached = min(max(products / left, _LEAST_REACHED), 1.0) if left > 0 else 1.0
    return replace(device, half_flops=reached * device.half_flops, float_flops=reached * device.float_flops)


def _busy(trace: Trace, device: Device) -> float:
    return sum(n * op_seconds(device, *op) for op, n in trace.ops.items())


def _plain_step(reference: Reference, num_experts: int, device: torch.device) -> float:
    """Seconds of forward and backward without an engine."""
    model = alone(get_ldmole_model(reference.base(), reference.adapter(num_experts))).to(device).train()
    ids = reference.ids(0).to(device)
    return fastest(lambda: _step(model, ids), device)


def _step(model: LDMoLEModel, ids: Tensor) -> Tensor:
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    loss.backward()
    return loss


def _exchange(ep_size: int, num_bytes: int, device: torch.device) -> float:
    """Seconds of an all-to-all in which a rank's whole buffer has so many bytes."""
    group = expert_parallel(ep_size).ep_group
    data = torch.zeros(num_bytes // 4 // ep_size * ep_size, device=device)
    out = torch.empty_like(data)

    def run() -> Tensor:
        dist.all_to_all_single(out, data, group=group)
        return out

    return fastest(run, device)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""From the times of a calibration back to the speeds and costs that made them."""

from dataclasses import replace

import pytest

from ldmole_ds.planner import Device, Layout, Precision, StepCosts, Wire, kind_of
from ldmole_ds.planner.calibrate import (
    EXCHANGED,
    PRODUCT,
    VALUES,
    Times,
    experts_for,
    layout_name,
    reference_layouts,
)
from ldmole_ds.planner.reference import STARTING, THIN, WIDE
from ldmole_ds.planner.solve import Calibration, describe, estimate_reference, solve

TRUE = Calibration(
    Device("CPU rank", 1e9, 2e11, 4e10, 1e10, 2e-5, False, 0.5),
    {2: Wire(1e-4, 1e9), 4: Wire(2e-4, 5e8)},
    StepCosts(0.0, 3e-3, 5e-4, {2: 2e-3, 4: 9e-3}, {2: 4e-3, 4: 2e-2}, 2e-8, 1e-8),
)
REACHED = 0.5


def times_of(true: Calibration, world_size: int = 4) -> Times:
    """What `measure` would find on a machine that is as the model says."""
    m, k, n = PRODUCT["cpu"]
    device, experts = true.device, experts_for(world_size)
    # A large product is faster than those of a step.
    seconds = {"float": 2 * m * k * n / (device.float_flops / REACHED)}
    seconds |= {"half": 2 * m * k * n / (device.half_flops / REACHED), "sum": 12 * VALUES["cpu"] / device.bandwidth}
    large = replace(device, float_flops=device.float_flops / REACHED, half_flops=device.half_flops / REACHED)
    kind = kind_of(Layout(), device, Precision())
    seconds["starting"] = STARTING.trace(experts, kind).seconds(large)
    seconds["thin"] = THIN.trace(experts, kind).seconds(device)
    for size, wire in true.wires.items():
        seconds[f"short exchange {size}"] = wire.latency * (size - 1)
        seconds[f"long exchange {size}"] = wire.latency * (size - 1) + EXCHANGED * (size - 1) / size / wire.bandwidth
    times = Times("CPU rank", 1e9, "cpu", world_size, seconds, {2: 3e6, 4: 8e6}, device.grouped_speed)
    for layout in reference_layouts(world_size):
        seconds[layout_name(layout)] = estimate_reference(times, true, layout).step_seconds
    wide = estimate_reference(times, true, Layout(), WIDE)
    updates = sum(phase.seconds for name, phase in wide.phases.items() if name.startswith("update"))
    seconds["wide update"] = updates + true.costs.value * WIDE.shape(experts).trainable / world_size
    seconds["wide step"] = wide.step_seconds
    seconds["starting step"] = estimate_reference(times, true, Layout(), STARTING).step_seconds
    return times


def test_what_made_the_times_is_found_again():
    times = times_of(TRUE)
    found = solve(times)
    for name in ("half_flops", "float_flops", "bandwidth", "op_seconds", "grouped_speed"):
        assert getattr(found.device, name) == pytest.approx(getattr(TRUE.device, name), rel=1e-3), name
    for size, wire in TRUE.wires.items():
        assert (found.wires[size].latency, found.wires[size].bandwidth) == pytest.approx((wire.latency, wire.bandwidth))
    assert (found.costs.reduction, found.costs.fetch) == pytest.approx((3e-3, 5e-4), rel=1e-2)
    assert (found.costs.value, found.costs.gradient) == pytest.approx((2e-8, 1e-8), rel=1e-2)
    assert found.costs.tokens == pytest.approx(TRUE.costs.tokens, rel=1e-2)
    assert found.costs.weights == pytest.approx(TRUE.costs.weights, rel=1e-2)
    assert "tokens 2.00 ms (ep_size 2), tokens 9.00 ms (ep_size 4)" in describe(found)

    # What a step did not take longer is no cost.
    slow = {**times.seconds, layout_name(reference_layouts(4)[0]): 100.0}
    assert solve(replace(times, seconds=slow)).costs.tokens == {2: 0.0, 4: 0.0}


def test_the_faster_of_two_measurements_counts_for_each_time():
    one = Times("d", 1.0, "cpu", 2, {"sum": 1.0, "thin": 5.0}, {})
    assert one.best(replace(one, seconds={"sum": 2.0, "thin": 4.0})).seconds == {"sum": 1.0, "thin": 4.0}


def test_references_divide_over_any_number_of_ranks():
    for world_size in (1, 2, 3, 4, 6, 16):
        for layout in reference_layouts(world_size):
            assert world_size % layout.ep_size == 0 and experts_for(world_size) % layout.ep_size == 0
    assert [layout.dispatch for layout in reference_layouts(1)] == ["replicate"]

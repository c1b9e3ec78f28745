"""What collectives, engine and ZeRO-3 cost in a step: where it counts, and what is assumed without a calibration."""

from dataclasses import replace

import pytest
import torch

from ldmole_ds.planner import Layout, StepCosts
from ldmole_ds.planner.calibrate_steps import reference_step
from ldmole_ds.planner.reference import STARTING
from tests.distributed_utils import run_distributed
from tests.planner.plan_cases import DEVICE, cluster, job, shape

FREE = StepCosts(fetch=0.0, tokens={2: 0.0}, weights={2: 0.0}, value=0.0)


def step_seconds(costs: StepCosts, layout: Layout) -> float:
    return job(on=replace(cluster(), costs=costs)).estimate(layout).step_seconds


@pytest.mark.parametrize(
    ("costs", "layout", "more"),
    [
        # One group: five exchanges, or a gather and a reduction.
        (replace(FREE, tokens={2: 1.0, 4: 9.0}), Layout(2, 2, "tokens"), 5.0),
        (replace(FREE, tokens={2: 1.0, 4: 9.0}), Layout(4, 2, "tokens"), 45.0),
        (replace(FREE, weights={2: 1.0}), Layout(4, 2, "weights"), 2.0),
        (replace(FREE, weights={2: 1.0}), Layout(2, 2, "weights", checkpointing=True), 3.0),
        (replace(FREE, weights={2: 1.0}), Layout(2, 2, "tokens"), 0.0),
        # Two dense tensors and three of experts; with the two of the base seven are fetched, forward and backward.
        (replace(FREE, tensor=1.0), Layout(), 5.0),
        # 180 dense values and 240 of experts: all of them, or a share for each of four ranks.
        (replace(FREE, value=1.0), Layout(1, 0), 420.0),
        (replace(FREE, value=1.0), Layout(), 105.0),
        (replace(FREE, value=1.0), Layout(2, 2, "tokens"), 105.0),
        # A rank has gradients of all that it holds.
        (replace(FREE, gradient=1.0), Layout(), 420.0),
        (replace(FREE, gradient=1.0), Layout(2, 2, "tokens"), 300.0),
        # 660 values in buckets of 50 x 50: one, all-reduced in two rings; on two ranks dense ones and experts apart.
        (replace(FREE, reduction=1.0), Layout(), 2.0),
        (replace(FREE, reduction=1.0), Layout(2, 2, "tokens"), 4.0),
        (replace(FREE, reduction=1.0), Layout(4, 2, "tokens"), 2.0),
        (replace(FREE, fetch=1.0), Layout(1, 3), 14.0),
        (replace(FREE, fetch=1.0), Layout(1, 3, checkpointing=True), 21.0),
        (replace(FREE, fetch=1.0), Layout(1, 2), 0.0),
    ],
)
def test_each_cost_is_counted_where_it_arises(costs, layout, more):
    assert step_seconds(costs, layout) - step_seconds(FREE, layout) == pytest.approx(more, abs=1e-9)


def test_without_a_measurement_the_host_starts_some_operations():
    slow, layout = replace(DEVICE, op_seconds=1e-3), Layout(2, 2, "tokens")
    assert StepCosts().collective(layout, slow.op_seconds) == pytest.approx(10e-3)
    assert StepCosts().fetching(slow.op_seconds) == pytest.approx(5e-3)
    phases = job(on=cluster(device=slow)).estimate(layout).phases
    assert sum(phase.seconds for phase in phases.values()) > 5 * 10e-3
    assert StepCosts().updating(bandwidth=1e9) == pytest.approx(30 * 4e-9)


def test_zero3_gathers_each_large_parameter_and_keeps_small_ones_whole():
    """Hidden size 50: up to 500 values stay whole. The base has 1,000 and 200; A and B of two ranks 80, 24 and 16."""
    phases = job().estimate(Layout(2, 3, "tokens")).phases
    assert phases["gather_base"].calls == 1 and phases["gather_base"].bytes == 1000 * 4 * 3 / 4
    assert "gather_dense" not in phases and phases["update_dense"].bytes == 180 * 4 * 3 / 4
    large = job(shape(r=20)).estimate(Layout(2, 3, "tokens")).phases
    assert large["gather_experts"].calls == 1 and large["gather_experts"].bytes == 800 * 4 / 2
    assert large["update_experts"].bytes == (240 + 160) * 4 / 2


def take_steps(rank: int, world_size: int) -> list[dict]:
    layouts = [Layout(1, 3), Layout(2, 2, "tokens")]
    return [reference_step(STARTING, 4, layout, torch.device("cpu")) for layout in layouts]


@pytest.mark.distributed
def test_reference_steps_are_taken_with_the_engine():
    ours, theirs = run_distributed(take_steps, 2, deepspeed=True)
    assert ours == theirs and all(found["seconds"] > 0 for found in ours)
    assert [found["dispatched"] > 0 for found in ours] == [False, True]

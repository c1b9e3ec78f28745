"""A plan is traced with the operations that the planned device would run: kernels in C on a CPU, none on a GPU."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from ldmole_ds.model import get_ldmole_model
from ldmole_ds.ops import cpu_kernels, fused_routing
from ldmole_ds.ops.expert_compute import SWITCH as PRODUCTS
from ldmole_ds.ops.fused_routing import SWITCH
from ldmole_ds.planner import Layout, StepKind, kind_of
from ldmole_ds.planner.model_shape import build_base
from ldmole_ds.planner.trace import Recorder, Trace, trace_model, trace_step
from tests.planner.plan_cases import DEVICE, small_hf_config
from tests.tiny import tiny_config

WHOLE, PARTS, GPU = StepKind(grouped_speed=1.0, whole=True), StepKind(grouped_speed=1.0), StepKind()


def traced(kind: StepKind) -> Trace:
    model = kind.prepare(get_ldmole_model(build_base(small_hf_config()), tiny_config()))
    return trace_model(model, torch.zeros(2, 12, dtype=torch.long))


def planned(kind: StepKind, **changes) -> Trace:
    return trace_step(small_hf_config(), tiny_config(**changes), kind, micro=2, length=12).first


@pytest.fixture
def kernels(monkeypatch):
    """Names of the C functions that were called, or would have been."""
    if reason := cpu_kernels.why_not():
        pytest.skip(reason)
    called, call = [], cpu_kernels.call
    monkeypatch.setattr(cpu_kernels, "call", lambda name, *args: called.append(name) or call(name, *args))
    return called


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [WHOLE, PARTS])
@pytest.mark.parametrize("switch", ["auto", "off"])
def test_fake_and_real_steps_agree(switch, kind, checkpointing, monkeypatch, kernels):
    monkeypatch.setenv(SWITCH, switch)
    kind = kind._replace(checkpointing=checkpointing)
    real, of_real = traced(kind), list(kernels)
    with kind.fake_tensors():
        fake = traced(kind)
    assert kernels == 2 * of_real and bool(of_real) == (switch == "auto")
    assert fake.peak == real.peak > 0
    products = [{op: n for op, n in t.ops.items() if op[1]} for t in (fake, real)]
    assert products[0] == products[1] and sum(products[0].values()) > 60
    assert fake.calls == pytest.approx(real.calls, rel=0.01)


def test_a_kernel_counts_as_one_operation_that_moves_its_tensors(kernels, monkeypatch):
    """Eight groups' kernels, forward and backward."""
    moved, see = [], Recorder.see_kernel
    monkeypatch.setattr(
        Recorder, "see_kernel", lambda *seen: moved.append(sum(t.nbytes for t in seen[1])) or see(*seen)
    )
    trace = planned(WHOLE)
    assert sorted(kernels) == 8 * ["group_backward"] + 8 * ["group_forward"] and len(moved) == 16
    assert min(moved) > 0 and all(trace.ops[False, 0, num_bytes] >= n for num_bytes, n in Counter(moved).items())
    see_nothing = Recorder(nn.Linear(1, 1))
    see_nothing.see_kernel([torch.zeros(3), torch.zeros(2, dtype=torch.uint8)])
    assert see_nothing.trace.ops == {(False, 0, 14): 1} and see_nothing.trace.calls == 1


def test_what_runs_where(kernels, monkeypatch):
    whole, parts = planned(WHOLE), planned(PARTS)
    assert {name.split("_")[0] for name in kernels} == {"group", "routing"}
    kernels.clear()
    gpu = planned(GPU)
    assert not kernels and whole.calls < parts.calls < gpu.calls
    # Half precision has no whole groups, and a machine without a compiler no kernels.
    trace_step(
        small_hf_config(), tiny_config(adapter_dtype="bfloat16"), WHOLE, micro=2, length=12, dtype=torch.bfloat16
    )
    assert set(kernels) == {"routing_forward", "routing_backward"}
    monkeypatch.setattr(fused_routing.cpu_kernels, "why_not", lambda: "no compiler")
    assert planned(WHOLE) == planned(PARTS) == gpu


def test_layers_that_may_be_grouped_are_not_whole(kernels, monkeypatch):
    monkeypatch.setenv(PRODUCTS, "grouped")
    planned(WHOLE)
    assert set(kernels) == {"routing_forward", "routing_backward"}
    kernels.clear()
    monkeypatch.setenv(PRODUCTS, "auto")
    large = {"num_experts": 32, "r": 16}
    for speed, expected in ((1.0, "routing"), (0.01, "group")):  # of one thread, and of a hundred
        trace_step(small_hf_config(), tiny_config(**large), WHOLE._replace(grouped_speed=speed), micro=8, length=128)
        assert {name.split("_")[0] for name in kernels} == {expected}
        kernels.clear()


def test_the_kind_is_that_of_device_and_layout():
    def kind(*layout, **more):
        return kind_of(Layout(*layout, **more), DEVICE)

    assert kind() == kind(2, 2, "weights") == StepKind(False, DEVICE.grouped_speed, True)
    assert kind(1, 3) == kind(2, 2, "tokens") == StepKind(False, DEVICE.grouped_speed)
    assert kind(checkpointing=True) == StepKind(True, DEVICE.grouped_speed, True)
    gpu = replace(DEVICE, asynchronous=True)
    assert kind_of(Layout(2, 2, "weights"), gpu) == StepKind()

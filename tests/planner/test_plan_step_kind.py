"""A plan is traced with the operations that the planned device would run: kernels in C on a CPU, in Triton on a GPU."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from ldmole_ds.model import get_ldmole_model
from ldmole_ds.ops import cpu_kernels, fused_routing, group_triton, routing_triton, triton_launch
from ldmole_ds.ops.expert_compute import SWITCH as PRODUCTS
from ldmole_ds.ops.fused_routing import SWITCH
from ldmole_ds.planner import Layout, Precision, StepKind, kind_of
from ldmole_ds.planner.model_shape import build_base
from ldmole_ds.planner.trace import Recorder, Trace, trace_model, trace_step
from tests.planner.plan_cases import DEVICE, small_hf_config
from tests.tiny import tiny_config

WHOLE, PARTS = StepKind(grouped_speed=1.0, whole=True), StepKind(grouped_speed=1.0)
GPU, GPU_PARTS = StepKind(whole=True), StepKind()


def traced(kind: StepKind) -> Trace:
    model = kind.prepare(get_ldmole_model(build_base(small_hf_config()), tiny_config()))
    return trace_model(model, torch.zeros(2, 12, dtype=torch.long))


def planned(kind: StepKind, **changes) -> Trace:
    return trace_step(small_hf_config(), tiny_config(**changes), kind, micro=2, length=12).first


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels in C and Triton that were called, or would have been."""
    if reason := cpu_kernels.why_not():
        pytest.skip(reason)
    called, call, launch = [], cpu_kernels.call, triton_launch.launch
    monkeypatch.setattr(cpu_kernels, "call", lambda name, *args: called.append(name) or call(name, *args))
    for module in (group_triton, routing_triton):
        monkeypatch.setattr(
            module, "launch", lambda name, *args, **more: called.append(name) or launch(name, *args, **more)
        )
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
    # In half precision a CPU has no whole groups.
    half = {"micro": 2, "length": 12, "dtype": torch.bfloat16}
    kernels.clear()
    trace_step(small_hf_config(), tiny_config(adapter_dtype="bfloat16"), WHOLE, **half)
    assert set(kernels) == {"routing_forward", "routing_backward"}
    # Neither has a machine without a compiler kernels in C.
    monkeypatch.setattr(fused_routing.cpu_kernels, "why_not", lambda: "no compiler")
    kernels.clear()
    plain = planned(WHOLE)
    assert not kernels and plain == planned(PARTS) and whole.calls < parts.calls < plain.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_runs_on_a_gpu(kernels, monkeypatch, dtype):
    """With Triton, which the machine that plans need not have."""
    monkeypatch.setattr(fused_routing.routing_triton, "is_here", lambda: False)
    config, sizes = tiny_config(adapter_dtype=str(dtype).partition(".")[2]), {"micro": 2, "length": 12, "dtype": dtype}
    calls = {}
    for kind, expected in ((GPU, "group"), (GPU_PARTS, "routing")):
        kernels.clear()
        calls[kind] = trace_step(small_hf_config(), config, kind, **sizes).first.calls
        names = {f"{expected}_kernel.{expected}_{direction}_kernel" for direction in ("forward", "backward")}
        assert set(kernels) == names and len(kernels) == 16
    monkeypatch.setenv(SWITCH, "off")
    plain = trace_step(small_hf_config(), config, GPU, **sizes).first.calls
    assert calls[GPU] < 0.75 * calls[GPU_PARTS] and calls[GPU_PARTS] < plain


def test_products_of_half_precision_that_give_float32_are_half_precision(kernels):
    """Router and lambda MLP run on a GPU's tensor cores."""
    for kind in (GPU, GPU_PARTS):
        config = tiny_config(adapter_dtype="bfloat16")
        ops = trace_step(small_hf_config(), config, kind, micro=2, length=12, dtype=torch.bfloat16).first.ops
        by_half = {half: sum(n * op[1] for op, n in ops.items() if op[0] == half) for half in (True, False)}
        assert 0 <= by_half[False] < 0.01 * by_half[True]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of Triton's interpreter
@pytest.mark.parametrize("kind", [GPU, GPU_PARTS])
def test_fake_steps_of_a_gpu_have_the_products_of_real_ones(kernels, monkeypatch, kind):
    pytest.importorskip("triton", reason="the kernels need triton: pip install triton")
    if torch.cuda.is_available():
        pytest.skip("the model is on the CPU, where Triton's kernels run in its interpreter alone")
    with kind.fake_tensors():
        fake, of_fake = traced(kind), list(kernels)
    kernels.clear()
    monkeypatch.setenv(SWITCH, "on")
    real = traced(kind)
    assert kernels == of_fake and len(kernels) == 16
    products = [Counter({op: n for op, n in t.ops.items() if op[1]}) for t in (fake, real)]
    assert products[0] == products[1] and products[0].total() > 60
    assert fake.peak == pytest.approx(real.peak, rel=0.02)


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
        return kind_of(Layout(*layout, **more), DEVICE, Precision())

    assert kind() == kind(2, 2, "weights") == StepKind(False, DEVICE.grouped_speed, True)
    assert kind(1, 3) == kind(2, 2, "tokens") == StepKind(False, DEVICE.grouped_speed)
    assert kind(checkpointing=True) == StepKind(True, DEVICE.grouped_speed, True)
    gpu = replace(DEVICE, asynchronous=True)
    assert kind_of(Layout(2, 2, "weights"), gpu, Precision()) == StepKind(whole=True)
    assert kind_of(Layout(2, 2, "weights"), gpu, Precision(quantization="nf4")) == StepKind()
    assert kind_of(Layout(2, 2, "tokens"), gpu, Precision()) == kind_of(Layout(1, 3), gpu, Precision()) == StepKind()

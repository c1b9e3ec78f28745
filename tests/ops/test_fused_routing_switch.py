"""Who uses the routing kernels, and that it compiles for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ldmole_ds.ops import cpu_kernels, routing_triton
from ldmole_ds.ops import fused_routing as module
from ldmole_ds.ops.fused_routing import uses_fused_routing
from ldmole_ds.ops.planned import PlannedCpu

pytest.importorskip("triton", reason="the routing kernel needs triton: pip install triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[2]


def test_who_uses_the_kernel(monkeypatch):
    logits = torch.zeros(1, 2, 3, device=DEVICE)
    monkeypatch.delenv(module.SWITCH, raising=False)
    assert uses_fused_routing(logits)
    assert uses_fused_routing(torch.zeros(1, 2, 3)) == (cpu_kernels.why_not() is None)
    with FakeTensorMode():
        assert not uses_fused_routing(torch.zeros(1, 2, 3))
    with PlannedCpu(grouped_speed=1.0):
        planned = torch.zeros(1, 2, 3)
    assert uses_fused_routing(planned) == (cpu_kernels.why_not() is None)
    assert not uses_fused_routing(torch.zeros(1, 2, 3, device="meta"))
    monkeypatch.setenv(module.SWITCH, "off")
    assert not uses_fused_routing(logits)
    monkeypatch.setenv(module.SWITCH, "on")
    assert uses_fused_routing(logits)
    assert not uses_fused_routing(logits.double()), "the kernel is float32 inside"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not uses_fused_routing(planned), "Triton's kernel needs numbers"
    monkeypatch.setenv(module.SWITCH, "yes")
    with pytest.raises(ValueError, match="LDMOLE_FUSED_ROUTING='yes' is not known: use auto, on or off"):
        uses_fused_routing(logits)


def test_what_is_traced_runs_in_plain_operations(monkeypatch):
    """``make_fx`` writes down operations: it would see none that fills the kernel's results."""
    monkeypatch.delenv(module.SWITCH, raising=False)

    def route(logits):
        assert not uses_fused_routing(logits)
        return logits * 2

    traced, logits = make_fx(route)(torch.zeros(1, 2, 3)), torch.ones(1, 2, 3)
    assert torch.equal(traced(logits), logits * 2)


def test_it_is_never_silently_replaced(monkeypatch):
    monkeypatch.setenv(module.SWITCH, "on")
    monkeypatch.setattr(routing_triton, "is_here", lambda: False)
    monkeypatch.setattr(cpu_kernels, "why_not", lambda: "there is no C compiler")
    with pytest.raises(ValueError, match="on, but Triton cannot be imported: install triton, or unset it"):
        uses_fused_routing(OnGPU())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="there is no C compiler: install a C compiler, or unset it"):
        uses_fused_routing(torch.zeros(1, 2, 3))


class OnGPU:
    dtype, is_cuda, is_meta = torch.float32, True, False


def test_what_is_missing_is_told_once(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.delenv(module.SWITCH, raising=False)
    monkeypatch.setattr(routing_triton, "is_here", lambda: False)
    monkeypatch.setattr(cpu_kernels, "why_not", lambda: "there is no C compiler")
    module._tell.cache_clear()
    for logits in (OnGPU(), OnGPU(), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)):
        assert not uses_fused_routing(logits)
    told = [(r.levelname, r.getMessage()) for r in caplog.records]
    assert [level for level, _ in told] == ["WARNING", "INFO"]
    assert "Triton cannot be imported" in told[0][1] and "there is no C compiler" in told[1][1]


COMPILE = """
import re
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ldmole_ds.ops import group_kernel, routing_kernel

POINTERS = dict.fromkeys(["mask", "destinations", "live"], "*u8") | {"scaling": "fp32"}
POINTERS |= dict.fromkeys(["grad_probs", "bias_in", "weight_out", "bias_out", "weighted", "grad_rows"], "*bf16")
TENSORS = {"logits", "lambda_logits", "lambdas", "sums", "grad_sums", "grad_logits", "grad_lambda_logits", "rows"}
TENSORS |= {"grad_mlp"}
FLAGS = {"LAMBDA_TOP": 0.99, "E_PAD": 8, "R_BLOCK": 8, "H_BLOCK": 64, "BLOCK_T": 32} | dict.fromkeys(
    ["HAS_MASK", "MASK_PADDING", "SPARSITY", "PLAN", "HAS_GRAD_PROBS", "HAS_GRAD_SUMS", "SPLIT"], True
)
routing = (routing_kernel.routing_forward_kernel, routing_kernel.routing_backward_kernel)
group = (group_kernel.group_forward_kernel, group_kernel.group_backward_kernel)
for kernel in routing + group:
    names, probs = kernel.arg_names, {"probs": "*bf16" if kernel in routing else "*fp32"}
    constants = {n: v for n, v in FLAGS.items() if n in names}
    types = {n: (POINTERS | probs).get(n, "*fp32" if n in TENSORS else "i32") for n in names}
    types |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    # 32 bits would overflow beyond 2^31 routing weights, or values of h.
    offset = r"%(?:offsets|rows|at|rest_at|of_h)\\w* = arith.(?:muli|addi) .*: tensor<\\d+x\\d+x(?:\\d+x)?(i\\d+)>"
    assert set(re.findall(offset, compiled.asm["ttir"])) == {"i64"}, kernel.__name__
    print(kernel.__name__)
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="every other test of the kernels compiles them")
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 4

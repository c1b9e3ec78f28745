"""The speeds of the machine at hand, as the planner needs them.

Products, memory and the cost of starting an operation are measured with all ranks at work at once, as they are in
training, so that ranks which share cores or memory are slowed in the same way. The slowest rank counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from ldmole_ds.config import LDMoLEConfig
from ldmole_ds.distributed import ExpertParallel
from ldmole_ds.distributed.dispatch_choice import measure_link
from ldmole_ds.model import LDMoLEModel, get_ldmole_model
from ldmole_ds.planner.cluster import Device, Wire
from ldmole_ds.planner.model_shape import build_base
from ldmole_ds.planner.trace import op_seconds, trace_model

_ROUNDS = 7
# Rows, inner size and columns of the product; values of the elementwise sum: what layers of mid-sized models have.
_PRODUCT = {"cpu": (512, 1024, 1024), "cuda": (8192, 8192, 8192)}
_VALUES = {"cpu": 1 << 20, "cuda": 1 << 27}


def calibrate(device: torch.device | None = None) -> Device:
    """Measure one rank of this job. Collective where ranks are up: all measure together."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = "cuda" if device.type == "cuda" else "cpu"
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        m, k, n = _PRODUCT[kind]
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        speeds[dtype] = 2 * m * k * n / _seconds(lambda a=a, b=b: a @ b.t(), device)
    x = torch.randn(_VALUES[kind], device=device)
    y = torch.empty_like(x)
    bandwidth = 3 * x.numel() * 4 / _seconds(lambda: torch.add(x, x, out=y), device)
    memory = torch.cuda.get_device_properties(device).total_memory if kind == "cuda" else _host_memory()
    name = torch.cuda.get_device_name(device) if kind == "cuda" else "CPU rank"
    found = Device(name, memory, speeds[torch.bfloat16], speeds[torch.float32], bandwidth, 0.0, kind == "cuda")
    return Device(
        name, memory, found.half_flops, found.float_flops, bandwidth, _op_seconds(found, device), found.asynchronous
    )


def calibrate_link(topology: ExpertParallel, device: torch.device) -> Wire:
    """The wire between two ranks of the EP group, from the time of its all-to-all. Collective."""
    link = measure_link(topology, device)
    return Wire(link.latency / (topology.ep_size - 1), link.bandwidth)


def _op_seconds(device: Device, where: torch.device) -> float:
    """What starting costs: a step too small to compute much, less what it computes, by its operations."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    adapter = LDMoLEConfig(r=4, lora_dropout=0.0, lambda_hidden_size=16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _alone(get_ldmole_model(build_base(config), adapter))
        trace = trace_model(model, torch.zeros(2, 8, dtype=torch.long))
    model = _alone(get_ldmole_model(build_base(config).to(where), adapter)).train()
    ids = torch.zeros(2, 8, dtype=torch.long, device=where)
    seconds = _seconds(lambda: _step(model, ids), where)
    busy = sum(n * op_seconds(device, *op) for op, n in trace.ops.items())
    return max(seconds - (0.0 if device.asynchronous else busy), 0.0) / trace.calls


def _alone(model: LDMoLEModel) -> LDMoLEModel:
    """Without the collective that counts tokens over all ranks."""
    model.topology = ExpertParallel()
    return model


def _step(model: LDMoLEModel, ids: Tensor) -> Tensor:
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    loss.backward()
    return loss


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """The fastest of several rounds that all ranks start together (other work only adds); the slowest rank's."""
    together = dist.is_initialized() and dist.get_world_size() > 1
    times = []
    for _ in range(_ROUNDS + 2):
        if together:
            dist.barrier()
        begin = time.perf_counter()
        run().detach().flatten()[:1].cpu()  # wait for the device
        times.append(time.perf_counter() - begin)
    slowest = torch.tensor([min(times[2:])], dtype=torch.float64, device=device)
    if together:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

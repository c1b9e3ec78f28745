"""The speeds of the machine at hand, as the planner needs them.

Products, memory and the cost of starting an operation are measured with all ranks at work at once, as they are in
training, so that ranks which share cores or memory are slowed in the same way. The slowest rank counts. A large product
reaches more than the many thin ones of a step do; where the host waits for each operation, a reference step says how
much of it is reached.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace

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
from ldmole_ds.planner.trace import Trace, op_seconds, trace_model

_ROUNDS = 7
# Rows, inner size and columns of the product; values of the elementwise sum: what layers of mid-sized models have.
_PRODUCT = {"cpu": (512, 1024, 1024), "cuda": (8192, 8192, 8192)}
_VALUES = {"cpu": 1 << 24, "cuda": 1 << 27}
# Llama sizes, adapter and (rows, tokens) of two steps: one too small to compute much, one of thin products.
_STARTING = (64, 96, 2, 4, 128), {"r": 4, "lambda_hidden_size": 16}, (2, 8)
_REFERENCE = (256, 704, 3, 4, 2048), {"r": 8, "lambda_hidden_size": 64}, (4, 48)
# Of the large product's speed: less, or more, is a measurement that went wrong.
_LEAST_REACHED = 0.1


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
    seconds, trace = _timed_step(*_STARTING, device)
    starting = max(seconds - (0.0 if found.asynchronous else _busy(trace, found)), 0.0) / trace.calls
    found = replace(found, op_seconds=starting)
    return found if found.asynchronous else _as_reached(found, *_timed_step(*_REFERENCE, device))


def _as_reached(device: Device, seconds: float, trace: Trace) -> Device:
    """The speed of products such that the reference step takes as long as it did."""
    moving = replace(device, half_flops=math.inf, float_flops=math.inf)
    products = _busy(trace, device) - _busy(trace, moving)
    left = seconds - trace.calls * device.op_seconds - _busy(trace, moving)
    reached = min(max(products / left, _LEAST_REACHED), 1.0) if left > 0 else 1.0
    return replace(device, half_flops=reached * device.half_flops, float_flops=reached * device.float_flops)


def _busy(trace: Trace, device: Device) -> float:
    return sum(n * op_seconds(device, *op) for op, n in trace.ops.items())


def calibrate_link(topology: ExpertParallel, device: torch.device) -> Wire:
    """The wire between two ranks of the EP group, from the time of its all-to-all. Collective."""
    link = measure_link(topology, device)
    return Wire(link.latency / (topology.ep_size - 1), link.bandwidth)


def _timed_step(
    sizes: tuple[int, ...], adapter: dict[str, int], shape: tuple[int, int], where: torch.device
) -> tuple[float, Trace]:
    """Seconds of forward and backward of such a model, and its operations."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    config = LlamaConfig(**dict(zip(names, sizes, strict=True)), num_key_value_heads=sizes[3] // 2)
    settings = LDMoLEConfig(lora_dropout=0.0, **adapter)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trace = trace_model(
            _alone(get_ldmole_model(build_base(config), settings)), torch.zeros(shape, dtype=torch.long)
        )
    model = _alone(get_ldmole_model(build_base(config).to(where), settings)).train()
    ids = torch.zeros(shape, dtype=torch.long, device=where)
    return _seconds(lambda: _step(model, ids), where), trace


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

"""What a collective of the EP group costs on this job's link, and products of experts beside it; measured at the start.

A collective is taken to last a latency plus its bytes over the bandwidth. Both come from exchanges of two sizes that
take turns, so that a slow moment of the machine falls on both.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ldmole_ds.distributed.topology import ExpertParallel
from ldmole_ds.ops.expert_compute import grouped_speed, may_group_on
from ldmole_ds.ops.matrix_products import products_for

_PROBE_BYTES, _PROBE_ROUNDS = 1 << 23, 7
# Tokens, width and stacked ranks of the product whose speed is measured: as skinny as the experts' are.
_PROBE_PRODUCT = (2048, 1024, 128)
# Of a large exchange at least this share is taken to be its bytes, whatever a short one beside it has cost.
_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Link:
    """What a collective of the EP group costs: ``latency`` in seconds, ``bandwidth`` in bytes per second and rank.

    ``flops`` is the speed of the expert products beside it, in operations per second; infinite: they are not weighed.
    ``grouped_flops`` is that of grouped products; 0: they are not used.
    """

    latency: float
    bandwidth: float
    flops: float = math.inf
    grouped_flops: float = 0.0


def latency_and_bandwidth(small: Sequence[float], large: Sequence[float], sent: float) -> tuple[float, float]:
    """From the times of a tiny exchange and of one that sends ``sent`` bytes beside it, round by round."""
    beside = statistics.median(b - a for a, b in zip(small, large, strict=True))
    return statistics.median(small), sent / max(beside, _LEAST_SHARE * statistics.median(large), 1e-9)


def sending_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where collectives of this group take their tensors from, for a model on ``device``.

    Models are loaded on the CPU and moved later; NCCL takes no tensor from there.
    """
    if device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def measure_link(topology: ExpertParallel, device: torch.device, itemsize: int = 4) -> Link:
    """Latency and bandwidth of an all-to-all in the EP group, and the speed of a product. Collective.

    Medians, the same for everyone: those of the slowest group, where some lie on one machine and some across machines.
    ``device`` is a `sending_device`; ``itemsize`` says whether products are in float32 (4) or bfloat16 (2).
    """
    tokens, width, ranks = _PROBE_PRODUCT
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    x, weight = (torch.zeros(rows, width, device=device, dtype=dtype) for rows in (tokens, ranks))
    sizes = (4 * topology.ep_size, _PROBE_BYTES)
    small, large = _by_turns([_exchange(num_bytes, topology, device) for num_bytes in sizes])
    with torch.no_grad():  # not between exchanges, which would wait for the slower rank
        (product,) = _by_turns([lambda: products_for(x).linear(x, weight, None)])
    sent = _PROBE_BYTES * (topology.ep_size - 1) / topology.ep_size
    flops = 2 * math.prod(_PROBE_PRODUCT) / statistics.median(product)
    grouped_flops = flops * grouped_speed() if may_group_on(device, dtype) else 0.0
    latency, bandwidth = latency_and_bandwidth(small, large, sent)
    # The slowest group's exchange, as its first rank has seen it, and the products of rank 0.
    exchange = [latency, -bandwidth] if topology.ep_rank == 0 else [-math.inf] * 2
    products = [flops, grouped_flops] if topology.rank == 0 else [-math.inf] * 2
    shared = torch.tensor([*exchange, *products], dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    latency, slowest, flops, grouped_flops = shared.tolist()
    return Link(latency, -slowest, flops, grouped_flops)


def _exchange(num_bytes: int, topology: ExpertParallel, device: torch.device) -> Callable[[], Tensor]:
    out = torch.empty(num_bytes // 4 // topology.ep_size * topology.ep_size, device=device)
    data, collectives = torch.zeros_like(out), topology.collectives

    def exchange() -> Tensor:
        collectives.all_to_all(out, data).wait()
        return out

    return exchange


def _by_turns(runs: list[Callable[[], Tensor]]) -> list[list[float]]:
    """Seconds of each run in each round after a first one; the same collectives in the same order on every rank."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(_PROBE_ROUNDS + 1):
        for run, found in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run().flatten()[:1].cpu()  # wait for the device
            found.append(time.perf_counter() - begin)
    return [found[1:] for found in times]

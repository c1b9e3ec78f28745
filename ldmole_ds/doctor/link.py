"""How long the collectives of expert parallelism take on this job's link, by size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ldmole_ds.distributed.collectives import Collectives
from ldmole_ds.distributed.shared_memory import open_mailboxes
from ldmole_ds.distributed.topology import ExpertParallel

SIZES = tuple(1 << exponent for exponent in range(10, 25, 2))  # 1 KiB to 16 MiB
_ROUNDS = {True: 20, False: 5}  # up to 64 KiB, above


@dataclass(frozen=True)
class LinkTime:
    """One collective at one size.

    Attributes:
        collective: all-to-all, all-gather or reduce-scatter.
        num_bytes: Of a rank's larger buffer.
        seconds: Median over rounds, of the slowest rank.
        bandwidth: Bytes per second that a rank sends to other ranks; 0 for one rank.
    """

    collective: str
    num_bytes: int
    seconds: float
    bandwidth: float


def transport_of(topology: ExpertParallel, device: torch.device) -> str:
    """How tensors on ``device`` reach the other ranks of the EP group, and why not through memory if they do not."""
    backend = dist.get_backend(topology.ep_group)
    if backend != "gloo" or topology.ep_size == 1 or device.type != "cpu":
        return backend
    if topology.mailboxes is not None:
        return "shared memory"
    return f"{backend} ({open_mailboxes(topology.collectives.group).why_not})"


def measure_collectives(
    collectives: Collectives, device: torch.device, sizes: tuple[int, ...] = SIZES
) -> list[LinkTime]:
    """Time every collective at every size. Collective: all ranks of the job call it, each for its own group.

    Args:
        collectives: Of the ranks among which to measure; all groups measure at once, as they do in training.
        device: Where the buffers are.
        sizes: Bytes, multiples of four.
    """
    num_ranks = collectives.size
    times = []
    for num_bytes in sizes:
        part = max(1, num_bytes // 4 // num_ranks)
        whole, one = torch.zeros(part * num_ranks, device=device), torch.zeros(part, device=device)
        result = torch.empty_like(whole)
        for name, run in _runs(whole, one, result, collectives).items():
            seconds = _median_seconds(run, result, rounds=_ROUNDS[num_bytes <= 1 << 16])
            sent = 4 * part * (num_ranks - 1)
            times.append(LinkTime(name, num_bytes, seconds, sent / seconds))
    return times


def _runs(
    whole: torch.Tensor, one: torch.Tensor, result: torch.Tensor, collectives: Collectives
) -> dict[str, Callable[[], object]]:
    """Each moves ``(P - 1) / P`` of a buffer per rank."""
    return {
        "all-to-all": lambda: collectives.all_to_all(result, whole).wait(),
        "all-gather": lambda: collectives.all_gather(result, one),
        "reduce-scatter": lambda: collectives.reduce_scatter(one, whole),
    }


def _median_seconds(run: Callable[[], object], result: torch.Tensor, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        dist.barrier()
        begin = time.perf_counter()
        run()
        result[:1].cpu()  # wait for the device
        times.append(time.perf_counter() - begin)
    slowest = torch.tensor([statistics.median(times[1:])], dtype=torch.float64, device=result.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()

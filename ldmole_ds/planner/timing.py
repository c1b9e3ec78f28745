"""How the calibration takes the time: as a training step has it, with all ranks at work."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

_WARM, _ROUNDS = 2, 5
# Ranks that share cores take turns of some milliseconds: what is shorter may escape them, and would look too fast.
_LONG_ENOUGH = 0.05


def fastest(run: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of one run. Collective: every rank repeats it equally often.

    A round takes as long as its slowest rank; the fastest round counts, as other work on the machine only adds.
    """

    def together(times: int) -> float:
        if _several():
            dist.barrier()
        begin = time.perf_counter()
        for _ in range(times):
            out = run()
        out.detach().flatten()[:1].cpu()  # wait for the device
        return slowest(time.perf_counter() - begin, device) / times

    for _ in range(_WARM):
        once = together(1)
    times = max(1, round(_LONG_ENOUGH / once))
    return min(together(times) for _ in range(_ROUNDS))


def slowest(seconds: float, device: torch.device) -> float:
    """Of all ranks. Collective."""
    if not _several():
        return seconds
    found = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.item()


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1

"""Runs a function on several ranks of this machine: gloo over a file store, one process and one thread per rank.

    def sum_of_ranks(rank, world_size):
        total = torch.tensor(rank)
        dist.all_reduce(total)
        return total

    def test_sum():
        assert run_distributed(sum_of_ranks, 2) == [1, 1]

Ranks are forked from a process that has imported torch (`rank_server`), each in a session of its own. Arguments and
return values travel through files, so they may hold anything that torch.save can write. What ranks print is shown only
when something goes wrong.
"""

import contextlib
import faulthandler
import importlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ldmole_ds.ops import c_library
from tests.rank_server import Rank, fork_rank

# Whether ranks can exchange through shared memory: `ldmole_ds.distributed.shared_memory`.
CAN_SHARE = all(hasattr(os, name) for name in ("memfd_create", "pidfd_open")) and c_library.compiler() is not None
_POLL_S = 0.02
# After one rank has failed, the time the others get to fail too before they are killed.
_GRACE_S = 2.0
# A rank whose parent died ends itself this long after its time is up.
_ORPHAN_S = 30
_LOG_LINES = 30


class RankError(RuntimeError):
    """A rank raised or died. The message holds the traceback of the rank that failed first."""


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
    deepspeed: bool = False,
) -> list[Any]:
    """Calls ``fn(rank, world_size, *args)`` on every rank and returns the results, ordered by rank.

    Args:
        fn: A module-level function; each rank imports its module.
        world_size: Number of ranks.
        args: Arguments, the same for every rank. Each rank gets its own copy.
        timeout_s: Limit for the whole run, start of the processes included.
        deepspeed: Initialise ``deepspeed.comm`` instead of ``torch.distributed`` alone.

    Raises:
        RankError: A rank raised or died.
        TimeoutError: The limit passed. The message shows where each rank stood.
    """
    if fn.__module__ == "__main__" or "." in fn.__qualname__:
        raise ValueError(f"fn must be a module-level function of an importable module, got {fn.__qualname__!r}")
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder_name:
        folder = Path(folder_name)
        job = {"path": sys.path, "fn": (fn.__module__, fn.__name__), "timeout_s": timeout_s, "deepspeed": deepspeed}
        (folder / "job.pkl").write_bytes(pickle.dumps(job))
        torch.save(args, folder / "args.pt")
        port = _free_port()
        processes: list[Rank] = []
        try:
            for rank in range(world_size):
                processes.append(_start_rank(folder, rank, world_size, port, deepspeed))
            _wait(processes, folder, timeout_s)
        finally:
            _kill(processes)
        # Ranks of this machine wrote these files, so unpickling them is safe.
        return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(world_size)]


# ---- parent ----


def _start_rank(folder: Path, rank: int, world_size: int, port: int, deepspeed: bool) -> Rank:
    env = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    # All ranks are on this machine, so gloo need not resolve the host's name.
    if os.path.exists("/sys/class/net/lo"):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # A session of its own lets the rank be killed together with whatever it started.
    return fork_rank(__file__, folder, rank, env, deepspeed=deepspeed)


def _wait(processes: list[Rank], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if any(codes):
            _settle(processes, min(_GRACE_S, deadline - time.monotonic()))
            raise RankError(_failure_report(processes, folder))
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL_S)
    raise TimeoutError(_timeout_report(processes, folder, timeout_s))


def _settle(processes: list[Rank], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(_POLL_S)


def _failure_report(processes: list[Rank], folder: Path) -> str:
    errors = [_read_error(folder, rank) for rank in range(len(processes))]
    raised = [rank for rank, error in enumerate(errors) if error is not None]
    died = [rank for rank, process in enumerate(processes) if process.poll() and errors[rank] is None]
    # A rank that died without a traceback is the likelier cause: its peers then raise that the connection is gone.
    first = died[0] if died else min(raised, key=lambda rank: errors[rank][0])
    lines = [f"rank {first} of {len(processes)} failed first (exit code {processes[first].poll()})"]
    if first in raised:
        lines.append(errors[first][1].rstrip())
    lines.append(_log_tail(folder, first))
    for rank in range(len(processes)):
        if rank in raised and rank != first:
            lines.append(f"rank {rank} raised too: {errors[rank][1].rstrip().splitlines()[-1]}")
        elif rank in died and rank != first:
            lines.append(f"rank {rank} died too (exit code {processes[rank].poll()})")
    return "\n".join(line for line in lines if line)


def _timeout_report(processes: list[Rank], folder: Path, timeout_s: float) -> str:
    running = [rank for rank, process in enumerate(processes) if process.poll() is None]
    for rank in running:
        # Before a rank has set its handler up, the signal ends it, which is as well.
        processes[rank].send_signal(signal.SIGUSR1)
    _settle(processes, 0.5)
    lines = [f"killed after {timeout_s} s; still running: ranks {running} of {len(processes)}"]
    for rank in running:
        lines += [f"rank {rank} stood at:", _read_text(folder / f"stack{rank}.txt") or "start of the interpreter"]
        lines.append(_log_tail(folder, rank))
    return "\n".join(line for line in lines if line)


def _kill(processes: list[Rank]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def _read_error(folder: Path, rank: int) -> tuple[float, str] | None:
    text = _read_text(folder / f"error{rank}.txt")
    if not text:
        return None
    when, _, trace = text.partition("\n")
    return float(when), trace


def _log_tail(folder: Path, rank: int) -> str:
    lines = _read_text(folder / f"log{rank}.txt").splitlines()[-_LOG_LINES:]
    return "\n".join([f"rank {rank} printed:", *lines]) if lines else ""


def _read_text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# ---- rank ----


def run_rank(folder: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    stack_file = open(folder / f"stack{rank}.txt", "w")  # stays open for the signal handler
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    try:
        job = pickle.loads((folder / "job.pkl").read_bytes())
        signal.alarm(int(job["timeout_s"]) + _ORPHAN_S)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        sys.path[:] = job["path"]
        _init_process_group(folder, rank, world_size, job["deepspeed"])
        module, name = job["fn"]
        fn = getattr(importlib.import_module(module), name)
        args = torch.load(folder / "args.pt", weights_only=False)
        torch.save(fn(rank, world_size, *args), folder / f"result{rank}.pt")
        # Without this a rank sometimes aborts at exit, after its work is done.
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        # Written beside its final name and renamed, so that the parent never reads half a traceback.
        part = folder / f"error{rank}.part"
        part.write_text(f"{time.time()}\n{traceback.format_exc()}")
        part.rename(folder / f"error{rank}.txt")
        # Leaving at once: an orderly exit could wait for peers.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _init_process_group(folder: Path, rank: int, world_size: int, with_deepspeed: bool) -> None:
    init = {
        "init_method": f"file://{folder / 'store'}",
        "rank": rank,
        "world_size": world_size,
        "timeout": timedelta(seconds=60),
    }
    if not with_deepspeed:
        dist.init_process_group("gloo", **init)
        return
    import deepspeed.comm
    import deepspeed.ops

    # Not needed for training, and compiling it takes half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, **init)


def engine_computes_in(name: str) -> bool:
    """Whether DeepSpeed's engine takes this device for bf16 or fp16; of CPUs few are taken for fp16."""
    from deepspeed.accelerator import get_accelerator

    return bool(getattr(get_accelerator(), f"is_{name}_supported")())

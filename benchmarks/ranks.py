"""Ranks of this machine for a benchmark: one process each, gloo on CPU or NCCL on one GPU each; and what they send."""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ldmole_ds.distributed.mailboxes import Delivery, Mailboxes
from ldmole_ds.distributed.shared_memory import SWITCH


def on_ranks(fn: Callable[..., Any], world_size: int, device: str, *args: Any) -> list[Any]:
    """``fn(device, *args)`` on every rank, with DeepSpeed's communication up; results by rank.

    Args:
        fn: A module-level function.
        world_size: Number of ranks; with ``cuda`` each has a GPU of its own.
        device: cpu (gloo, one thread a rank) or cuda (NCCL).
    """
    if device == "cuda" and torch.cuda.device_count() < world_size:
        raise SystemExit(f"{world_size} ranks need as many GPUs, there are {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        mp.spawn(_run_rank, (world_size, device, folder, fn, args), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run_rank(rank: int, world_size: int, device: str, folder: str, fn: Callable[..., Any], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": device}
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    own = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    else:
        torch.set_num_threads(1)
    import deepspeed.comm
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes half a minute to build, and is not used
    deepspeed.comm.init_distributed(
        "nccl" if device == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(minutes=10),
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
    )
    torch.save(fn(own, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def within_slow_link(qdisc: str) -> None:
    """Start this program anew in a network of its own, whose link has this queueing discipline (``tc``, as root)."""
    if os.environ.get("SLOW_LINK") == qdisc:
        return
    os.environ |= {"SLOW_LINK": qdisc, SWITCH: "off"}  # what does not leave the memory is not slowed down
    setup = f'ip link set lo up && tc qdisc add dev lo root {qdisc} && exec "$@"'
    os.execvp("unshare", ["unshare", "--net", "sh", "-c", setup, "sh", sys.executable, *sys.argv])


@contextmanager
def counting_bytes() -> Iterator[Counter]:
    """What this rank's collectives send to other ranks, whoever calls them, by (direction, collective).

    An all-reduce counts as its ring sends: 2 (P - 1) / P of the tensor.
    """
    sent: Counter = Counter()

    def share(call: dict[str, Any]) -> float:
        size = dist.get_world_size(call.get("group"))
        return (size - 1) / size

    def all_to_all(call: dict[str, Any]) -> float:
        x, splits = call["input"], call.get("input_split_sizes")
        if splits is None:
            return x.nbytes * share(call)
        return (sum(splits) - splits[dist.get_rank(call.get("group"))]) * x[:1].nbytes

    sizes: dict[str, Callable[[dict[str, Any]], float]] = {
        "all_to_all_single": all_to_all,
        "all_gather": lambda call: call["tensor"].nbytes * (len(call["tensor_list"]) - 1),
        "all_gather_into_tensor": lambda call: call["output_tensor"].nbytes * share(call),
        "reduce_scatter": lambda call: call["output"].nbytes * (len(call["input_list"]) - 1),
        "reduce_scatter_tensor": lambda call: call["input"].nbytes * share(call),
        "all_reduce": lambda call: 2 * call["tensor"].nbytes * share(call),
    }
    originals = {name: getattr(dist, name) for name in sizes}

    def direction() -> str:
        return "backward" if torch._C._current_graph_task_id() != -1 else "forward"

    def counted(name: str, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(originals[name]).bind(*args, **kwargs).arguments
        sent[direction(), name] += int(sizes[name](call))
        return originals[name](*args, **kwargs)

    def begin(mailboxes: Mailboxes, received: Sequence[Tensor], messages: Sequence[Tensor]) -> Delivery:
        sent[direction(), "shared memory"] += sum(m.nbytes for p, m in enumerate(messages) if p != mailboxes.own_rank)
        return original_begin(mailboxes, received, messages)

    original_begin = Mailboxes.begin
    for name in sizes:
        setattr(dist, name, partial(counted, name))
    Mailboxes.begin = begin
    try:
        yield sent
    finally:
        Mailboxes.begin = original_begin
        for name, original in originals.items():
            setattr(dist, name, original)

"""Starting and ending a distributed run: ranks, accelerator, communication, errors that reach every rank.

The accelerate state is made before TrainingArguments, which then takes it (``use_configured_state``). Without that a
CPU run under DeepSpeed would believe on every rank to be the only process.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ldmole_ds.distributed import PeerError
from ldmole_ds.distributed.deepspeed_private import defer_muon_compile, skip_shared_memory_op
from ldmole_ds.training.lost_peers import lost_peer
from ldmole_ds.training.network import choose_interface
from ldmole_ds.training.ranks import Ranks, discover_ranks, single_process

# What users can get wrong, and our own clear sentences; anything else keeps its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError, NotImplementedError, ImportError)

# Between the ranks of a host that start together, for imports on busy cores.
_RANK_0_SPEAKS_S = 10


class UserError(Exception):
    """A message for the user: printed as one line, without a traceback, on every rank's exit."""


@functools.cache
def ranks_of_job() -> Ranks | None:
    """This process's place, as its launcher says, written into the environment; None without a launcher.

    Raises:
        UserError: What the launcher exports is incomplete.
    """
    try:
        return discover_ranks()
    except ValueError as error:
        raise UserError(str(error)) from error


def join_network(ranks: Ranks | None, network_interface: str = "auto") -> str | None:
    """Choose the network interface where ranks are on several hosts, or one is named; see `choose_interface`.

    Raises:
        UserError: There is no such interface.
    """
    on_one_host = ranks is None or ranks.local_world_size == ranks.world_size
    if on_one_host and network_interface == "auto":
        return None
    try:
        return choose_interface(network_interface, ranks.master_addr if ranks else "127.0.0.1")
    except ValueError as error:
        raise UserError(str(error)) from error


def is_main_process() -> bool:
    """Whether this is global rank 0, also before communication is up."""
    return int(os.environ.get("RANK", "0")) == 0


def start(*, use_deepspeed: bool, timeout_s: int = 1800, network_interface: str = "auto") -> str:
    """Bring up communication through the accelerator that DeepSpeed found, and the accelerate state.

    DeepSpeed's shared-memory op for CPU is switched off first: training does not use it, and building it would need a
    compiler and ninja. Its Muon kernels are compiled when they run.

    Args:
        use_deepspeed: Whether a DeepSpeed config was given; without one a single process or plain DDP runs.
        timeout_s: Of every collective.
        network_interface: See `join_network`.

    Returns:
        The accelerator's name: cuda, cpu, ...

    Raises:
        UserError: What the launcher exports is incomplete, or there is no such interface.
    """
    ranks = ranks_of_job() or single_process()
    if use_deepspeed:
        os.environ.update(ranks.environment())
    interface = join_network(ranks, network_interface)
    from accelerate import PartialState
    from deepspeed.accelerator import get_accelerator

    skip_shared_memory_op()
    if use_deepspeed:
        defer_muon_compile()
    accelerator = get_accelerator()
    name, backend = accelerator.device_name(), accelerator.communication_backend_name()
    world_size = ranks.world_size
    if name == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_world_size))
    if use_deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend=backend, timeout=timedelta(seconds=timeout_s))
    elif world_size > 1:
        PartialState(cpu=name == "cpu", backend=backend, timeout=timedelta(seconds=timeout_s))
    else:
        PartialState(cpu=name == "cpu")
    if is_main_process():
        through = f" through {interface} here" if interface else ""
        print(f"{ranks}{through}, accelerator {name}, backend {backend}", flush=True)
    return name


def limit_group_timeouts(timeout_s: int) -> None:
    """Give every process group the user's timeout: DeepSpeed makes its groups with torch's 30 minutes.

    Raises:
        RuntimeError: This torch has no such timeouts.
    """
    from torch.distributed import distributed_c10d as c10d

    try:
        groups, set_timeout = list(c10d._world.pg_map), c10d._set_pg_timeout
    except AttributeError as error:
        raise RuntimeError(
            f"timeouts of process groups: this torch has changed ({error}); install one that this ldmole_ds is tested "
            "with, see README.md"
        ) from error
    for group in groups:
        set_timeout(timedelta(seconds=timeout_s), group)


def stop() -> None:
    """Leave together. Without it a rank may abort after its work is done, while its peers still hold connections."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """Run a phase without collectives that a failing rank would miss; if any fails in it, all raise the first failure.

    Args:
        what: The phase, for the message.
    """
    error: str | None = None
    try:
        yield
    except (UserError, *USER_ERRORS) as caught:
        error = str(caught) or type(caught).__name__
    errors: list[str | None] = [error]
    if dist.is_initialized() and dist.get_world_size() > 1:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    failed = [rank for rank, e in enumerate(errors) if e]
    if failed:
        where = "" if len(failed) == len(errors) else f" (on rank {', '.join(map(str, failed))}, {what})"
        raise UserError(f"{errors[failed[0]]}{where}")


def run_main(main: Callable[[list[str]], None]) -> None:
    """Run a launch script: a `UserError` is one line on rank 0 and exit code 2 on every rank.

    Anything else keeps its traceback and exits with 1. The process leaves at once: an interpreter that unwinds while
    its peers hang in a collective would wait for them.
    """
    try:
        ranks_of_job()  # before anything can go wrong: only rank 0 speaks
        main(sys.argv[1:])
    except UserError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:  # launchers end all ranks when the first one leaves: let that be rank 0, once it has spoken
            time.sleep(_RANK_0_SPEAKS_S)
        leave(2)
    except (FloatingPointError, PeerError) as error:
        print(f"error on rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        leave(1)
    except Exception as error:
        traceback.print_exc()
        if where := lost_peer(error):
            print(f"error on rank {os.environ.get('RANK', '0')}: {where}", file=sys.stderr, flush=True)
        leave(1)


def leave(code: int) -> None:
    """End the process at once with this exit code."""
    if os.environ.get("LDMOLE_DEBUG"):
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

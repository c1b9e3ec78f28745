"""Starting and ending a distributed run: ranks, accelerator, communication, errors that reach every rank.

The accelerate state is made before TrainingArguments, which then takes it (``use_configured_state``). Without that a
CPU run under DeepSpeed would believe on every rank to be the only process.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ldmole_ds.distributed import PeerError
from ldmole_ds.distributed.deepspeed_private import skip_shared_memory_op

# What users can get wrong, and our own clear sentences; anything else keeps its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError, NotImplementedError, ImportError)

_LAUNCHER_VARIABLES = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
# Ranks on this node. accelerate knows Open MPI's name and torchrun's LOCAL_WORLD_SIZE, and with neither may set 1.
_LOCAL_SIZES = ("LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


class UserError(Exception):
    """A message for the user: printed as one line, without a traceback, on every rank's exit."""


def discover_ranks(use_deepspeed: bool = True) -> str:
    """Fill RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT from what the launcher exports.

    A single process without DeepSpeed needs none of them and is left alone.

    Returns:
        Where the ranks came from.
    """
    source = "deepspeed or torchrun"
    if "RANK" not in os.environ:
        source = "a single process"
        for launcher, names in _LAUNCHER_VARIABLES.items():
            # Slurm sets its variables in interactive shells too: a job step of one task is one process.
            if all(name in os.environ for name in names) and int(os.environ[names[1]]) > 1:
                for ours, theirs in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), names, strict=True):
                    os.environ[ours] = os.environ[theirs]
                source = launcher
                if "MASTER_ADDR" not in os.environ and launcher != "Open MPI":
                    raise UserError(f"{launcher} started {os.environ['WORLD_SIZE']} ranks, but MASTER_ADDR is not set")
                break
        else:
            if not use_deepspeed:
                return source
            os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
            os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.setdefault("LOCAL_RANK", "0")
    for name in _LOCAL_SIZES:
        if name in os.environ:
            os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ[name])
    return source


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def is_main_process() -> bool:
    """Whether this is global rank 0, also before communication is up."""
    return int(os.environ.get("RANK", "0")) == 0


def start(*, use_deepspeed: bool, timeout_s: int = 1800) -> str:
    """Bring up communication through the accelerator that DeepSpeed found, and the accelerate state.

    DeepSpeed's shared-memory op for CPU is switched off first: training does not use it, and building it would need a
    compiler and ninja.

    Args:
        use_deepspeed: Whether a DeepSpeed config was given; without one a single process or plain DDP runs.
        timeout_s: Of every collective.

    Returns:
        The accelerator's name: cuda, cpu, ...
    """
    source = discover_ranks(use_deepspeed)
    from accelerate import PartialState
    from deepspeed.accelerator import get_accelerator

    skip_shared_memory_op()
    accelerator = get_accelerator()
    name, backend = accelerator.device_name(), accelerator.communication_backend_name()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if name == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    if use_deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend=backend, timeout=timedelta(seconds=timeout_s))
    elif world_size > 1:
        PartialState(cpu=name == "cpu", backend=backend, timeout=timedelta(seconds=timeout_s))
    else:
        PartialState(cpu=name == "cpu")
    if is_main_process():
        print(f"{world_size} rank(s) from {source}, accelerator {name}, backend {backend}", flush=True)
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
    """Run a phase without collectives; if any rank fails in it, all ranks raise the first failure.

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
        main(sys.argv[1:])
    except UserError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr, flush=True)
        leave(2)
    except (FloatingPointError, PeerError) as error:
        print(f"error on rank {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        leave(1)
    except Exception:
        traceback.print_exc()
        leave(1)


def leave(code: int) -> None:
    """End the process at once with this exit code."""
    if os.environ.get("LDMOLE_DEBUG"):
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

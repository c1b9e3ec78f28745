"""Which rank is this process, of how many, and where is rank 0: read from what the launcher exports.

| launcher | read |
| --- | --- |
| deepspeed, torchrun, by hand | RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE or LOCAL_WORLD_SIZE, MASTER_ADDR, .._PORT |
| Open MPI | OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE; PMIX_NAMESPACE (names the job) |
| MVAPICH | MV2_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE |
| MPICH, Intel MPI | PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS |
| Slurm's srun | SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID, ... |

What a variable does not tell (rank 0's address on several hosts under MPI, or everything under an MPI with other
variables) is asked of MPI itself through mpi4py. MPI is closed again at once: a process that still held it would wait
for its peers when it ends with an error.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass

from ldmole_ds.training.network import own_address

# Rank, number of ranks, rank on the host, ranks on the host. An mpirun inside a Slurm job starts its daemons through
# srun, whose variables the ranks inherit: so Slurm comes last.
_MPI_VARIABLES = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                 "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}  # fmt: skip
_SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
# A process with one of these was started by some MPI.
_SIGNS_OF_MPI = ("PMI_RANK", "PMIX_RANK", "PALS_RANKID")


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job.

    Attributes:
        source: Where it was read.
        rank, world_size: Of the whole job.
        local_rank, local_world_size: On this host.
        master_addr, master_port: Where the ranks meet: an address of rank 0's host.
    """

    source: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    def __str__(self) -> str:
        if self.world_size == 1:
            return f"1 rank, {self.source}"
        return f"{self.world_size} ranks from {self.source}, meeting at {self.master_addr}:{self.master_port}"

    def environment(self) -> dict[str, str]:
        """The variables that torch, accelerate and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def discover_ranks(environ: MutableMapping[str, str] | None = None) -> Ranks | None:
    """Find this process's place and write it into ``environ`` as RANK, WORLD_SIZE, LOCAL_RANK, ...

    Args:
        environ: Default ``os.environ``.

    Returns:
        The place; None for a process that no launcher started, whose ``environ`` is left alone.

    Raises:
        ValueError: What the launcher exports is incomplete.
    """
    environ = os.environ if environ is None else environ
    ranks = _from_torch(environ) or _from_mpi(environ) or _from_slurm(environ)
    by_mpi = any(name in environ for name in _SIGNS_OF_MPI) and "SLURM_STEP_NUM_TASKS" not in environ
    if ranks is None and by_mpi:
        ranks = _ask_mpi("MPI (mpi4py)", "its variables are not known here")
    if ranks is not None:
        environ.update(ranks.environment())
    return ranks


def single_process() -> Ranks:
    """The place of a process alone, on a free port."""
    return Ranks("a single process", 0, 1, 0, 1, "127.0.0.1", free_port())


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return sock.getsockname()[1]


def _from_torch(environ: MutableMapping[str, str]) -> Ranks | None:
    if "RANK" not in environ:
        return None
    if "WORLD_SIZE" not in environ:
        raise ValueError("RANK is set but WORLD_SIZE is not: set both, or start with deepspeed, torchrun, mpirun, srun")
    by = "torchrun" if "TORCHELASTIC_RUN_ID" in environ else "deepspeed" if "CROSS_RANK" in environ else "RANK"
    world_size = int(environ["WORLD_SIZE"])
    local = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or world_size
    return Ranks(
        by,
        int(environ["RANK"]),
        world_size,
        int(environ.get("LOCAL_RANK", "0")),
        int(local),
        environ.get("MASTER_ADDR", "127.0.0.1"),
        int(environ.get("MASTER_PORT", "29500")),
    )


def _from_mpi(environ: MutableMapping[str, str]) -> Ranks | None:
    for source, names in _MPI_VARIABLES.items():
        if not all(name in environ for name in names):
            continue
        rank, world_size, local_rank, local_size = (int(environ[name]) for name in names)
        if "MASTER_ADDR" not in environ and local_size != world_size:
            return _ask_mpi(f"{source} (rank 0's address from mpi4py)", "MASTER_ADDR is not set")
        address = environ.get("MASTER_ADDR", "127.0.0.1")
        port = int(environ.get("MASTER_PORT") or _port_of(environ.get("PMIX_NAMESPACE")))
        return Ranks(source, rank, world_size, local_rank, local_size, address, port)
    return None


def _from_slurm(environ: MutableMapping[str, str]) -> Ranks | None:
    # The shells of sbatch and salloc have SLURM_PROCID too; only a step of srun has a number of tasks.
    if not all(name in environ for name in _SLURM_VARIABLES) or int(environ["SLURM_STEP_NUM_TASKS"]) == 1:
        return None
    rank, world_size, local_rank = (int(environ[name]) for name in _SLURM_VARIABLES)
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(world_size)
    local_size = tasks_per_node(tasks)[int(environ.get("SLURM_NODEID", "0"))]
    if "MASTER_ADDR" in environ:
        address = environ["MASTER_ADDR"]
    else:
        address = "127.0.0.1" if local_size == world_size else _slurm_address(environ)
    port = int(environ.get("MASTER_PORT") or _port_of(f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"))
    return Ranks("Slurm", rank, world_size, local_rank, local_size, address, port)


def _slurm_address(environ: MutableMapping[str, str]) -> str:
    """The step's first node, where rank 0 runs; if its name means nothing here, the node on which srun was called.

    The latter is rank 0's when srun is called in a batch script, but not when it is called on a login node.
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    launched_on = environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if nodes:
        host = first_host(nodes)
        if not launched_on or _resolves(host):
            return host
    if not launched_on:
        raise ValueError(
            f"Slurm started {environ['SLURM_STEP_NUM_TASKS']} ranks on several nodes without saying where rank 0 is: "
            "export MASTER_ADDR, the first node's name or address"
        )
    return launched_on


def first_host(nodelist: str) -> str:
    """The first of a Slurm list of nodes: ``gpu[03-05,9],cpu1`` gives ``gpu03``."""
    outside = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", outside[0] if outside else nodelist)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form: ``2(x3),1`` gives [2, 2, 2, 1]."""
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, which cannot be read")
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _port_of(job: str | None) -> int:
    """A port that the ranks of a job agree on and other jobs will hardly have, below the ephemeral ones."""
    return 20000 + zlib.crc32(job.encode()) % 10000 if job else 29500


def _ask_mpi(source: str, reason: str) -> Ranks:
    """Everything from MPI itself. Collective: all ranks of the job come here or none."""
    # Before MPI is up: a rank that failed afterwards would leave its peers waiting.
    address, port = own_address(), free_port()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"this process was started by an MPI, {reason} and mpi4py cannot be loaded ({error}): "
            "`pip install mpi4py`, or mpirun -x MASTER_ADDR=<rank 0's host> (-genv MASTER_ADDR for MPICH)"
        ) from error
    world = MPI.COMM_WORLD
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    address, port = world.bcast((address, port), root=0)
    ranks = Ranks(source, world.rank, world.size, host.rank, host.size, address, port)
    host.Free()
    MPI.Finalize()
    return ranks

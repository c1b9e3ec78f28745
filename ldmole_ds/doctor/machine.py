"""What one rank can say about its machine, without asking any other."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

# What decides how ranks find each other and how they share a machine.
_VARIABLES = (
    "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "DEEPSPEED_TIMEOUT", "DS_ACCELERATOR",
    "MASTER_ADDR", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE",
)  # fmt: skip


@dataclass(frozen=True)
class StartFacts:
    """What can keep a rank from starting.

    Attributes:
        host: The host's name.
        address: What the name resolves to, None if it does not.
        interfaces: Names of the network interfaces.
        locks: ``lock`` files in the cache of compiled torch extensions, with which a start waits without end.
        variables: The environment variables that matter here and are set.
        gpu_driver: Whether an NVIDIA driver is loaded.
    """

    host: str
    address: str | None
    interfaces: tuple[str, ...]
    locks: tuple[str, ...]
    variables: dict[str, str]
    gpu_driver: bool


@dataclass(frozen=True)
class RankFacts:
    """One rank's place.

    Attributes:
        rank: Global rank.
        start: See `StartFacts`.
        device: The GPU's name, or cpu.
        device_memory: Free bytes of the GPU, None without one.
        threads: Of torch in this process.
        cores: The CPU cores that this process may use.
        memory: Available bytes of host memory.
        free: Free bytes by place: the output folder's disk, the temporary folder's, /dev/shm.
        versions: By package.
    """

    rank: int
    start: StartFacts
    device: str
    device_memory: int | None
    threads: int
    cores: tuple[int, ...]
    memory: int
    free: dict[str, int]
    versions: dict[str, str]

    @property
    def host(self) -> str:
        return self.start.host


def start_facts() -> StartFacts:
    """Reads names, interfaces, files and variables; nothing is opened or waited for."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = None
    return StartFacts(
        host=host,
        address=address,
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        locks=tuple(str(path) for path in _extension_locks()),
        variables={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        gpu_driver=Path("/proc/driver/nvidia/version").exists(),
    )


def _extension_locks() -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", cache / "torch_extensions"))
    return sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])


def rank_facts(rank: int, accelerator: str, output_dir: Path, versions: dict[str, str]) -> RankFacts:
    """This rank's place.

    Args:
        rank: Global rank.
        accelerator: cuda, cpu, ...
        output_dir: Where training would write; need not exist.
        versions: By package.
    """
    on_gpu = accelerator == "cuda"
    places = {"output": _existing(output_dir), "tmp": Path(tempfile.gettempdir()), "shm": Path("/dev/shm")}
    return RankFacts(
        rank=rank,
        start=start_facts(),
        device=torch.cuda.get_device_name() if on_gpu else accelerator,
        device_memory=torch.cuda.mem_get_info()[0] if on_gpu else None,
        threads=torch.get_num_threads(),
        cores=tuple(sorted(os.sched_getaffinity(0))),
        memory=_available_memory(),
        free={name: shutil.disk_usage(path).free for name, path in places.items() if path.is_dir()},
        versions=versions,
    )


def accelerator_versions(accelerator: str) -> dict[str, str]:
    """Of CUDA and NCCL, which torch brings; nothing without a GPU."""
    if accelerator != "cuda":
        return {}
    return {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

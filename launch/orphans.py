"""No rank outlives the command that launched it. Standard library only: it starts before the slow imports.

Under ``deepspeed --num_gpus N`` three processes stand above each other: the command, its per-host launcher, the ranks.
A SIGTERM to the command ends that one alone, and the ranks would train on as orphans. So each rank watches the
launchers above it, and when one is gone sends itself SIGTERM: training saves a checkpoint and ends, as on any SIGTERM.

Shells, ssh, tmux and nohup are no launchers: a run whose terminal is closed goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

# Programs by file name, Python's by module (`python -m torch.distributed.run`) or script (`python .../bin/deepspeed`).
PROGRAMS = {
    "mpirun", "mpiexec", "prterun", "prted", "orted", "hydra_pmi_proxy", "mpiexec.hydra", "slurmstepd", "deepspeed",
    "ds", "torchrun", "accelerate",
}  # fmt: skip
MODULES = {
    "deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch",
}  # fmt: skip
POLL_S, GRACE_S = 1.0, 300.0


def is_launcher(argv: list[str]) -> bool:
    """Whether a process with this command line starts ranks."""
    if not argv or not argv[0]:
        return False
    program = Path(argv[0]).name.rstrip(":")
    if not program.startswith(("python", "pypy")):
        return program in PROGRAMS
    for i, word in enumerate(argv[1:], 1):
        if word == "-m":
            return i + 1 < len(argv) and argv[i + 1] in MODULES
        if not word.startswith("-"):
            return Path(word).name in PROGRAMS or word.endswith("launch/compare.py")
    return False


def _started(pid: int) -> tuple[int, str] | None:
    """(Parent, time of start) of a process; None if there is none. The time tells a reused number apart."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19])


def launchers_above(pid: int) -> dict[int, str]:
    """The unbroken line of launchers above a process: number and time of start of each."""
    found: dict[int, str] = {}
    here = _started(pid)
    while here is not None and here[0] > 1:
        parent = here[0]
        here = _started(parent)
        try:
            argv = Path(f"/proc/{parent}/cmdline").read_text().split("\0")
        except OSError:
            break
        if here is None or not is_launcher(argv):
            break
        found[parent] = here[1]
    return found


def watch_launchers(poll_s: float = POLL_S, grace_s: float = GRACE_S) -> dict[int, str]:
    """Send this process SIGTERM when a launcher above it is gone, and SIGKILL if it is still there ``grace_s`` later.

    Returns:
        The launchers that are watched, maybe none.
    """
    watched = launchers_above(os.getpid())
    if watched:
        threading.Thread(target=_watch, args=(watched, poll_s, grace_s), daemon=True, name="launchers").start()
    return watched


def _watch(watched: dict[int, str], poll_s: float, grace_s: float) -> None:
    while all((now := _started(pid)) and now[1] == started for pid, started in watched.items()):
        time.sleep(poll_s)
    try:
        print(f"rank {os.environ.get('RANK', '?')}: the launcher is gone, ending", file=sys.stderr, flush=True)
    except OSError:  # its end of the pipe went with it
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)

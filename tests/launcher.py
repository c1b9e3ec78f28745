"""Runs a script of this checkout through the real DeepSpeed launcher."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _command(script: str, ranks: int, flags: tuple) -> tuple[list[str], dict[str, str]]:
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = [deepspeed, "--num_gpus", ranks, "--master_port", free_port(), script, *flags]
    return list(map(str, words)), environment


def launch(
    *flags, script: str = "launch/train.py", ranks: int = 2, timeout_s: float = 300
) -> subprocess.CompletedProcess:
    """``deepspeed --num_gpus RANKS SCRIPT FLAGS`` in a process group of its own, killed whole on timeout."""
    command, environment = _command(script, ranks, flags)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        pytest.fail(f"no end after {timeout_s} s:\n{output[-4000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, output)


@contextmanager
def launched(*flags, log: Path, script: str = "launch/train.py", ranks: int = 2) -> Iterator[subprocess.Popen]:
    """The same in the background, its output in ``log``; whatever is left of it is killed in the end."""
    command, environment = _command(script, ranks, flags)
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()

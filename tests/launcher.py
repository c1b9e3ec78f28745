"""Runs a script of this checkout through the real DeepSpeed launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(
    *flags, script: str = "launch/train.py", ranks: int = 2, timeout_s: float = 300
) -> subprocess.CompletedProcess:
    """``deepspeed --num_gpus RANKS SCRIPT FLAGS`` in a process group of its own, killed whole on timeout."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    command = [deepspeed, "--num_gpus", str(ranks), "--master_port", str(free_port()), script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [*command, *map(str, flags)],
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

"""No rank outlives its launcher; a run whose terminal is closed goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.orphans import is_launcher
from tests.launcher import ROOT, launched

RANK = """
import sys, time
sys.path.insert(0, {root!r})
from launch.orphans import watch_launchers
print("watching", len(watch_launchers(poll_s=0.1, grace_s={grace_s})), flush=True)
if {deaf}:
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
PARENT = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/usr/bin/mpirun -n 2 python train.py", True),
        ("prted --daemonize", True),
        ("slurmstepd: [77.0]", True),
        ("/venv/bin/python3 -u -m deepspeed.launcher.launch --world_info=x train.py", True),
        ("/venv/bin/python /venv/bin/deepspeed --num_gpus 2 launch/train.py", True),
        ("python -m torch.distributed.run train.py", True),
        ("/venv/bin/python3.11 /venv/bin/torchrun train.py", True),
        ("python /here/launch/compare.py --task rte", True),
        ("-bash", False),
        ("bash -c deepspeed", False),
        ("sshd: user@pts/0", False),
        ("tmux", False),
        ("python -m pytest deepspeed", False),
        ("python train.py deepspeed", False),
        ("", False),
    ],
)
def test_what_is_a_launcher(command, expected):
    assert is_launcher(command.split(" ")) is expected


def start_chain(tmp_path: Path, *names: str, deaf: bool = False, grace_s: float = 600) -> list[psutil.Process]:
    """Processes above each other, by these script names, the rank last; all are running when this returns."""
    rank = tmp_path / "rank.py"
    rank.write_text(RANK.format(root=str(ROOT), deaf=deaf, grace_s=grace_s))
    scripts = []
    for name in names:
        scripts.append(str(tmp_path / name))
        Path(scripts[-1]).write_text(PARENT)
    top = subprocess.Popen([sys.executable, *scripts, str(rank)], stdout=subprocess.PIPE, text=True)
    watched = sum(is_launcher(["python", script]) for script in scripts)
    assert top.stdout is not None and top.stdout.readline() == f"watching {watched}\n"
    return [psutil.Process(top.pid), *psutil.Process(top.pid).children(recursive=True)]


def ends(process: psutil.Process, within_s: float) -> bool:
    return process in psutil.wait_procs([process], timeout=within_s)[0]


@pytest.fixture
def cleanup():
    processes: list[psutil.Process] = []
    yield processes
    for process in processes:
        if process.is_running():
            process.kill()


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_ends_with_any_launcher_above_it(tmp_path, cleanup, which):
    cleanup += start_chain(tmp_path, "deepspeed", "torchrun")
    cleanup[which].send_signal(signal.SIGKILL)
    assert ends(cleanup[-1], 10)


def test_a_rank_that_does_not_listen_is_killed(tmp_path, cleanup):
    cleanup += start_chain(tmp_path, "torchrun", deaf=True, grace_s=0.5)
    cleanup[0].kill()
    assert ends(cleanup[-1], 10)


def test_what_is_above_no_launcher_may_go(tmp_path, cleanup):
    """As when a terminal with `nohup deepspeed ... &` is closed."""
    cleanup += start_chain(tmp_path, "shell", "torchrun")
    cleanup[0].kill()
    assert not ends(cleanup[-1], 1.0)


@pytest.mark.slow
def test_sigterm_to_the_deepspeed_command_saves_and_leaves_no_orphan(tiny_model_folder, data_folder, tmp_path):
    folder, log = tmp_path / "out", tmp_path / "log.txt"
    flags = [
        "--model_name_or_path", tiny_model_folder, "--train_file", data_folder / "train.jsonl",
        "--deepspeed", "ds_configs/zero2.json", "--max_steps", 4000, "--per_device_train_batch_size", 1,
        "--lambda_hidden_size", 8, "--r", 2, "--logging_steps", 1, "--save_strategy", "no", "--output_dir", folder,
    ]  # fmt: skip
    with launched(*flags, log=log) as process:
        deadline = time.monotonic() + 150
        while "'loss'" not in log.read_text():
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 3  # the launcher of this host and two ranks
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=20) != 0
        _, alive = psutil.wait_procs(below, timeout=60)
        assert not alive, log.read_text()[-3000:]
    assert "the launcher is gone" in log.read_text()
    assert list(folder.glob("checkpoint-*")), log.read_text()[-3000:]

"""Two hosts: `deepspeed --hostfile` over pdsh, the link cut in the middle of a step, the rest under `mpirun --host`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launcher import ROOT
from tests.two_hosts import two_hosts, why_not

BIN = Path(sys.executable).parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
TIMEOUT_S, TOLERANCE, MOST_STEPS = 20, 1e-5, 30


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    reason = why_not()
    if reason:
        pytest.skip(f"two hosts: {reason}")
    with two_hosts(tmp_path_factory.mktemp("ssh"), ENVIRONMENT) as pair:
        yield pair


@pytest.fixture
def start(tmp_path):
    """Starts a command with its output in a file; what is left of it is killed in the end."""
    running = []

    def start_it(log: str, words: list) -> tuple[subprocess.Popen, Path]:
        # DeepSpeed hands variables on to other hosts by this file, mpirun by -x.
        (tmp_path / "env").write_text("".join(f"{k}={v}\n" for k, v in ENVIRONMENT.items()))
        environment = {**os.environ, **ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}",
                       "DS_ENV_FILE": str(tmp_path / "env")}  # fmt: skip
        with open(tmp_path / log, "wb") as file:
            process = subprocess.Popen(
                list(map(str, words)), cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        running.append(process)
        return process, tmp_path / log

    yield start_it
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(process: subprocess.Popen, log: Path, timeout_s: float) -> str:
    try:
        process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end after {timeout_s} s:\n{log.read_text()[-4000:]}")
    return log.read_text()


def history(folder: Path) -> dict[str, list[float]]:
    rows = [row for row in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in row]
    return {name: [row[name] for row in rows] for name in ("step", "loss", "grad_norm")}


@pytest.mark.slow
def test_experts_over_two_hosts_and_a_cut_link(hosts, start, tiny_model_folder, data_folder, tmp_path):
    a, b = hosts
    folder = tmp_path / "out"
    script = [
        "launch/train.py", "--model_name_or_path", tiny_model_folder, "--train_file", data_folder / "train.jsonl",
        "--deepspeed", "ds_configs/zero2.json", "--lambda_hidden_size", 8, "--r", 2, "--logging_steps", 1,
        "--lr_scheduler_type", "constant", "--learning_rate", 1e-3, "--warmup_steps", 0, "--lora_dropout", 0,
        "--ddp_timeout", TIMEOUT_S, "--disable_tqdm", "true",
    ]  # fmt: skip
    across = [*script, "--ep_size", 2, "--per_device_train_batch_size", 2, "--output_dir", folder, "--save_steps", 2,
              "--save_total_limit", 2, "--resume", "auto"]  # fmt: skip
    (tmp_path / "hostfile").write_text(f"{a.name} slots=1\n{b.name} slots=1\n")

    launcher = [BIN / "deepspeed", "--hostfile", tmp_path / "hostfile", "--master_port", 29611]
    process, log = start("pdsh.txt", a.command(*map(str, [*launcher, *across, "--max_steps", 4000])))
    deadline = time.monotonic() + 240
    while log.read_text().count("host-a: {'loss'") < 3:
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.1)
    b.set_link(False)
    cut = time.monotonic()
    # The reference, while the others wait for each other.
    one = [sys.executable, *script, "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "one",
           "--max_steps", MOST_STEPS, "--save_strategy", "no"]  # fmt: skip
    alone, alone_log = start("one.txt", one)
    text = finish(process, log, TIMEOUT_S + 60)
    seconds = time.monotonic() - cut
    b.set_link(True)
    assert process.returncode != 0
    assert "2 ranks from deepspeed, meeting at 10.213.7.1:29611 through lan0" in text, text[-4000:]
    assert "placement 2 ranks on 2 nodes, EP groups span nodes" in text
    assert re.search(r"host-b +0 +1 +4-7", text)
    assert re.search(r"error on rank 0: rank 0 stopped in phase '\w+' of \S+", text), text[-4000:]
    assert "a peer died or hangs" in text
    saved = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    total = saved + 3
    assert total <= MOST_STEPS
    mpirun = [BIN / "mpirun", "--allow-run-as-root", "--host", "host-a:1,host-b:1", "-n", 2]
    exports = [word for name in ENVIRONMENT for word in ("-x", name)]
    words = a.command(*map(str, [*mpirun, *exports, sys.executable, *across, "--max_steps", total]))
    process, log = start("mpirun.txt", words)
    text = finish(process, log, 240)
    assert process.returncode == 0, text[-4000:]
    assert "2 ranks from Open MPI (rank 0's address from mpi4py), meeting at 10.213.7.1:" in text
    assert f"resuming from {folder / f'checkpoint-{saved}'}" in text
    assert json.loads((folder / "report.json").read_text())["steps"] == total
    finish(alone, alone_log, 240)
    assert alone.returncode == 0, alone_log.read_text()[-4000:]
    two, expected = history(folder), history(tmp_path / "one")
    assert two["step"] == list(range(1, total + 1))
    for name in ("loss", "grad_norm"):
        assert two[name] == pytest.approx(expected[name][:total], rel=TOLERANCE), name
    print(f"ended {seconds:.0f} s after the cut")

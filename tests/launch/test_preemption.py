"""The cluster's signal ends a run with a checkpoint and exit code 75, and the same command goes on from there."""

import json
import re
import signal
import time

import psutil
import pytest

from ldmole_ds.training.preemption import EXIT_PREEMPTED
from tests.launcher import launch, launched


def rank_process(launcher, rank):
    """The process below the launcher that trains as ``rank``."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(tiny_model_folder, data_folder, tmp_path):
    folder, log = tmp_path / "out", tmp_path / "log.txt"
    flags = [
        "--model_name_or_path", tiny_model_folder, "--train_file", data_folder / "train.jsonl",
        "--deepspeed", "ds_configs/zero2.json", "--max_steps", 400, "--per_device_train_batch_size", 1,
        "--lambda_hidden_size", 8, "--r", 2, "--logging_steps", 1, "--save_strategy", "no",
        "--output_dir", folder, "--resume", "auto",
    ]  # fmt: skip
    with launched(*flags, log=log) as process:
        deadline = time.monotonic() + 150
        while "'loss'" not in log.read_text():  # it trains
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        rank_process(process, 1).send_signal(signal.SIGUSR1)
        code = process.wait(timeout=120)
    text = log.read_text()
    assert code == EXIT_PREEMPTED, text[-3000:]
    step = int(re.search(r"stopped by SIGUSR1 after step (\d+)", text)[1])
    assert f"exit code {EXIT_PREEMPTED}" in text and "--resume auto goes on" in text
    saved = folder / f"checkpoint-{step}"
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == step
    # The job is submitted again, this time on one rank: the same command, to an end near by.
    again = launch(*flags, "--max_steps", step + 2, ranks=1)
    assert again.returncode == 0, again.stdout[-3000:]
    assert f"resuming from {saved}" in again.stdout and "was saved on 2 ranks, this is 1" in again.stdout
    assert json.loads((folder / "report.json").read_text())["steps"] == step + 2

"""launch/train.py on conversations, from the command to a generated answer, in one process."""

import json
import os
import subprocess
import sys

import pytest

from tests.launcher import ROOT


def run(*words):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=os.environ)


@pytest.mark.slow
def test_conversations_train_packed_and_answer(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, example = tmp_path / "run", "examples/messages.jsonl"
    flags = ["--model_name_or_path", tiny_model_folder, "--train_file", example, "--validation_file", example]
    flags += ["--packing", "--max_seq_length", 256, "--per_device_train_batch_size", 2, "--max_steps", 2, "--r", 4]
    flags += ["--lambda_hidden_size", 16, "--logging_steps", 1, "--save_strategy", "no", "--output_dir", folder]
    result = run("launch/train.py", *flags)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "packed into" in result.stdout and "no chat template: plain format" in result.stdout
    assert "held-out perplexity" in result.stdout and f"--adapter {folder} --chat" in result.stdout
    report = json.loads((folder / "report.json").read_text())
    assert report["perplexity_before"] > 1 and report["perplexity_after"] > 1 and report["accuracy_after"] is None
    logs = [row for row in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in row]
    assert len(logs) == 2 and all(row["cross_entropy_loss"] > 0 and row["experts_per_token"] > 0 for row in logs)
    # The tokenizer brings the plain format along.
    answer = run("launch/generate.py", "--adapter", folder, "--chat", "--prompt", "pay a bill", "--max_new_tokens", 4)
    assert answer.returncode == 0, answer.stderr[-2000:]

"""launch/train.py through the real DeepSpeed launcher, on a tiny random model: from the command to a loaded adapter."""

import csv
import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
import torch

from ldmole_ds.model import LDMoLEModel
from ldmole_ds.model.base_model import load_base_model, load_tokenizer
from ldmole_ds.tasks import ChoiceCollator, ChoiceDataset, padding_id, read_labels, read_questions, score_candidates
from tests.launcher import ROOT, launch


@pytest.fixture(scope="module")
def run(tiny_model_folder, data_folder, tmp_path_factory):
    """A run of 6 steps on two ranks from a settings file, with an override on the command line."""
    folder = tmp_path_factory.mktemp("run") / "out"
    settings = {
        "model_name_or_path": str(tiny_model_folder),
        "train_file": str(data_folder / "train.jsonl"),
        "validation_file": str(data_folder / "test.jsonl"),
        "deepspeed": "ds_configs/zero2.json",
        "max_steps": 6,
        "logging_steps": 2,
        "per_device_train_batch_size": 2,
        "global_batch_size": 8,
        "batch_size_warmup_start": 2,
        "batch_size_warmup_steps": 2,
        "learning_rate": 5e-3,
        "lambda_hidden_size": 16,
        "sparsity_loss_weight": 0.1,
        "r": 8,
        "save_strategy": "no",
        "log_per_layer": True,
        "peak_tflops": 0.001,
    }
    path = folder.parent / "run.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
    result = launch(path, "--r", 4, "--output_dir", folder)
    assert result.returncode == 0, result.stdout[-4000:]
    return folder, result.stdout, settings


@pytest.mark.slow
def test_experts_are_partitioned_and_tokens_travel(run):
    folder, output, _ = run
    report = json.loads((folder / "report.json").read_text())
    assert [facts["experts"] for facts in report["ranks"]] == [[0, 3], [4, 7]]
    for facts in report["ranks"]:
        assert facts["tokens_sent"] > 0 and facts["bytes_sent"] > 0 and facts["calls_by_phase"]["dispatch"] > 0
    assert report["accuracy_before"] is not None and report["accuracy_after"] is not None
    assert "experts 0-3 (4 of 8)" in output and "experts 4-7 (4 of 8)" in output
    assert f"--adapter {folder} --classify" in output
    assert "2 rows x 2 accumulation x 2 ranks = 8 rows a step" in output
    assert "warm-up   2, 4 rows a step, 8 from step 3 on" in output


@pytest.mark.slow
def test_the_run_is_written_down(run):
    folder, output, settings = run
    record = json.loads((folder / "run_settings.json").read_text())
    assert record["adapter"]["r"] == 4 and record["resolved"] == {"world_size": 2, "ep_size": 2}
    assert record["seed"] == 42 and record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["training"]["max_steps"] == settings["max_steps"]
    state = json.loads((folder / "trainer_state.json").read_text())
    logged = [row for row in state["log_history"] if "loss" in row]
    assert [row["step"] for row in logged] == [2, 4, 6]
    for name in ("grad_norm", "cross_entropy_loss", "sparsity_loss", "load_balancing_loss", "experts_per_token",
                 "lambda_std", "tokens_per_second", "max_rank_load", "dead_experts", "mfu"):  # fmt: skip
        assert all(name in row for row in logged), name
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2", "4", "6"] and rows[0]["eval_accuracy"] and rows[3]["eval_loss"]
    assert [float(row["dispatch_bytes_per_step"]) > 0 and float(row["mfu"]) > 0 for row in rows[1:]] == [True] * 3
    assert len((folder / "metrics_per_layer.csv").read_text().splitlines()) == 1 + 3 * 14
    for name in ("train_results.json", "eval_results.json", "curves.png", "routing_summary.json"):
        assert (folder / name).stat().st_size > 0
    assert not list(folder.glob("checkpoint-*")) and not list(folder.glob(".*.tmp"))


@pytest.mark.slow
def test_the_adapter_loads_in_one_process_and_scores_as_in_training(run, data_folder):
    folder, _, settings = run
    model = LDMoLEModel.from_pretrained(load_base_model(settings["model_name_or_path"]), folder)
    tokenizer = load_tokenizer(str(folder))
    labels = read_labels(data_folder / "train.jsonl")
    questions = read_questions(data_folder / "test.jsonl", labels=labels)
    dataset = ChoiceDataset.from_questions(questions, tokenizer, 512)
    batch = ChoiceCollator.for_datasets(padding_id(tokenizer), dataset)([dataset[i] for i in range(len(dataset))])
    with torch.no_grad():
        scores = score_candidates(model, batch, single_token=dataset.single_token)
    # Two ranks even out three rows by taking the first one twice; the repeat is left out of the metrics.
    loss = -scores.gather(1, batch["gold"].unsqueeze(1)).squeeze(1)
    accuracy = (scores.argmax(1) == batch["gold"]).float().mean().item()
    results = json.loads((folder / "eval_results.json").read_text())
    assert accuracy == pytest.approx(results["eval_accuracy"], abs=1e-6)
    assert loss.mean().item() == pytest.approx(results["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_generate_answers_with_the_adapter(run):
    folder, *_ = run
    command = [sys.executable, "launch/generate.py", "--adapter", str(folder)]
    for flags in (["--classify", "--prompt", "pay a bill"], ["--prompt", "Topics: bank", "--max_new_tokens", "4"]):
        result = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr[-2000:]
        assert result.stdout.strip()
    answers = re.findall(r"([\d.]+)%  (\w+)", subprocess.run(
        [*command, "--classify", "--prompt", "pay a bill"], cwd=ROOT, capture_output=True, text=True, timeout=120
    ).stdout)  # fmt: skip
    assert {word for _, word in answers} == {"bank", "home", "travel"}
    assert sum(float(share) for share, _ in answers) == pytest.approx(100, abs=0.3)


@pytest.mark.slow
def test_a_second_run_into_the_same_folder_is_refused_on_every_rank(run):
    folder, _, settings = run
    flags = [part for key, value in settings.items() for part in (f"--{key}", value)]
    result = launch(*flags, "--output_dir", folder)
    assert result.returncode != 0
    assert result.stdout.count("error: ") == 1, result.stdout[-3000:]
    assert "already holds a run" in result.stdout and "--overwrite_output_dir" in result.stdout
    assert "Traceback" not in result.stdout
    # Both ranks left by themselves with the documented code.
    assert "exits with return code = 2" in result.stdout

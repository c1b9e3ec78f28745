"""launch/compare.py on a tiny random model: real runs of two methods, one step each, to tables and a plot."""

import json

import pytest

from launch import compare
from ldmole_ds.compare import statistics
from ldmole_ds.compare.arguments import parse_compare_flags
from ldmole_ds.training.evaluate import evaluate, parse_evaluate_flags
from tests.launcher import ROOT

ROWS = ROOT / "tests" / "tasks" / "benchmark_rows"


@pytest.mark.slow
def test_two_methods_end_to_end(tiny_model_folder, tmp_path, monkeypatch, capsys):
    # One step of a random model has no signal.
    monkeypatch.setattr(statistics, "SIGNAL_STANDARD_ERRORS", -100.0)
    flags = {
        "model_name_or_path": tiny_model_folder, "task": "cola", "data_dir": ROWS, "methods": "ld-mole", "seeds": 1,
        "learning_rates": "1e-2", "selection_rows": 2, "max_steps": 1, "per_device_train_batch_size": 2,
        "lora_dropout": 0.0, "lambda_hidden_size": 8, "num_experts": 4, "parallel": 2, "output_dir": tmp_path / "out",
    }  # fmt: skip
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(compare, "leave", lambda code: pytest.fail(capsys.readouterr().out))
    compare.main(argv)
    page = (tmp_path / "out" / "compare.md").read_text()
    assert page in capsys.readouterr().out
    assert "| plain LoRA, equal rank | 0.01 |" in page and "| LD-MoLE | 0.01 |" in page and "Incomplete" not in page
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    ldmole, lora = (results["tasks"]["cola"]["methods"][name] for name in ("ld-mole", "lora"))
    assert ldmole["trainable"] > 4 * lora["trainable"] and 1 <= ldmole["experts_per_token"] <= 4
    assert ldmole["lambda_std"] > 0 and ldmole["flops_per_token"] > lora["flops_per_token"] > 0
    assert ldmole["tokens_per_second"] > 0 and 0 < ldmole["memory_bytes"] < 2e9
    assert (tmp_path / "out" / "compare.cola.png").is_file()
    # Rows answered in training and by launch/evaluate.py are the same ones in the same order.
    _, plan = parse_compare_flags(argv)
    _, cell = plan.finals(plan.tasks[0], plan.methods[1], 1e-2)[1]
    found, again = cell.result()["answers"], tmp_path / "again.json"
    evaluate(parse_evaluate_flags(["--adapter", str(cell.folder), "--output_file", str(again), "--batch_size", "2"]))
    asked = json.loads(again.read_text())["results"][0]
    assert (asked["answers"], asked["gold"], asked["chance"]) == (found["answers"], found["gold"], found["chance"])
    assert len(found["gold"]) == len((ROWS / "cola" / "validation.jsonl").read_text().splitlines())

"""launch/evaluate.py: two ranks count every row once and say what one process says; what can go wrong."""

import json
import subprocess
import sys

import pytest

from ldmole_ds import LDMoLEConfig, get_ldmole_model
from ldmole_ds.model.base_model import load_base_model
from ldmole_ds.training.evaluate import evaluate, parse_evaluate_flags
from ldmole_ds.training.runtime import UserError
from tests.launcher import ROOT, launch
from tests.tiny import wake_experts

ROWS = ROOT / "tests" / "tasks" / "benchmark_rows"


@pytest.fixture(scope="module")
def run(tiny_model_folder, tmp_path_factory):
    """Two tasks mixed, one step on two ranks with four experts on each; then evaluated on two ranks."""
    folder = tmp_path_factory.mktemp("run") / "out"
    flags = {
        "model_name_or_path": tiny_model_folder,
        "task": "commonsense_qa,cola",
        "data_dir": ROWS,
        "mixture": "1:2",
        "max_eval_samples": 5,
        "deepspeed": "ds_configs/zero2.json",
        "output_dir": folder,
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": 5e-2,
        "lambda_hidden_size": 8,
        "lora_dropout": 0.0,
        "r": 4,
        "save_strategy": "no",
    }
    trained = launch(*argv(flags))
    assert trained.returncode == 0, trained.stdout[-4000:]
    wake_and_save(tiny_model_folder, folder)
    return folder, trained.stdout, flags


def argv(flags: dict) -> list:
    return [part for key, value in flags.items() for part in (f"--{key}", value)]


def wake_and_save(base_folder, folder):
    """One step leaves experts that say little; these say much. Their run's record stays beside them."""
    config = LDMoLEConfig.from_pretrained(folder)
    model = get_ldmole_model(load_base_model(str(base_folder)), config)
    wake_experts(model, std=1.0)
    model.save_pretrained(folder)


@pytest.mark.slow
def test_one_step_on_a_mixture(run, tiny_model_folder, tmp_path):
    folder, output, flags = run
    report, settings = (json.loads((folder / name).read_text()) for name in ("report.json", "run_settings.json"))
    assert [facts["experts"] for facts in report["ranks"]] == [[0, 3], [4, 7]] and report["steps"] == 1
    assert report["accuracy_by_task"].keys() == {"commonsense_qa", "cola"} and report["eval_rows"] == 10
    assert report["accuracy_after"] == pytest.approx(sum(report["accuracy_by_task"].values()) / 2)
    assert "commonsense_qa,cola, mixed by 1:2" in output and "18 train, 10 held-out rows" in output
    assert settings["training"]["label_smoothing_factor"] == 0.1
    results = json.loads((folder / "eval_results.json").read_text())
    assert -1 <= results["eval_matthews_correlation_cola"] <= 1
    assert f"launch/evaluate.py --adapter {folder}" in output
    # The same rows in one process: the order of a mixture knows nothing of ranks.
    alone = {**flags, "output_dir": tmp_path / "alone", "per_device_train_batch_size": 6, "max_eval_samples": 1}
    del alone["deepspeed"]
    command = [sys.executable, "launch/train.py", *map(str, argv(alone))]
    single = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert single.returncode == 0, single.stderr[-3000:]
    losses = [
        next(row["loss"] for row in json.loads((f / "trainer_state.json").read_text())["log_history"] if "loss" in row)
        for f in (folder, tmp_path / "alone")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_say_what_one_process_says(run, tmp_path, capsys):
    folder, _, _ = run
    found = {}
    for name, ep_size in (("replicated", 1), ("partitioned", 2)):
        file = tmp_path / f"{name}.json"
        flags = ["--adapter", folder, "--batch_size", 2, "--limit", 5, "--ep_size", ep_size, "--output_file", file]
        result = launch(*flags, script="launch/evaluate.py")
        assert result.returncode == 0, result.stdout[-4000:]
        found[name] = json.loads(file.read_text())
        assert found[name]["world_size"] == 2
        table = [line.split() for line in result.stdout.splitlines()]
        for of_task in found[name]["results"]:
            row = next(line for line in table if line and line[0] == of_task["task"])
            assert row[1:5] == [of_task["split"], of_task["scoring"], "5", f"{of_task['accuracy']:.3f}"]
    file = tmp_path / "one.json"
    evaluate(parse_evaluate_flags(["--adapter", str(folder), "--limit", "5", "--output_file", str(file)]))
    one = json.loads(file.read_text())
    assert [r["task"] for r in one["results"]] == ["commonsense_qa", "cola"]  # those it was trained on
    assert one["arguments"]["data_dir"] == str(ROWS)
    assert found["replicated"]["results"] == found["partitioned"]["results"] == one["results"]
    assert "mean" in capsys.readouterr().out


def asked(**flags) -> list:
    flags = {"data_dir": ROWS, "limit": 2, "max_length": 600, **flags}
    return evaluate(parse_evaluate_flags([str(part) for part in argv({k: v for k, v in flags.items() if v})]))


def test_a_bare_base_model_on_every_task(tiny_model_folder, capsys):
    from ldmole_ds.tasks import TASKS

    results = asked(task="all", model_name_or_path=tiny_model_folder)
    assert [(r.task, r.split, r.scoring, r.rows) for r in results] == [
        (name, task.heldout_split, task.scoring, 2) for name, task in TASKS.items()
    ]
    output = capsys.readouterr().out
    assert "without an adapter" in output and "matthews correlation" in output


def test_cloze_and_splits_may_be_asked_for(tiny_model_folder):
    (result,) = asked(task="swag", split="train", scoring="cloze", model_name_or_path=tiny_model_folder)
    assert (result.split, result.scoring, result.chance) == ("train", "cloze", 0.25)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"task": None}, r"which task\? Add --task with one or several of arc_challenge"),
        ({"task": "glue"}, r"--task 'glue' is not known"),
        ({"task": "rte", "data_dir": "missing"}, r"missing/rte/validation\.jsonl does not exist"),
        ({"task": "rte", "adapter": "missing"}, r"the adapter folder missing does not exist: give the folder"),
        ({"task": "rte", "ep_size": 2}, r"--ep_size 2 is for the experts of an adapter: add --adapter"),
        ({"task": "rte", "model_name_or_path": "no/such"}, r"--model_name_or_path 'no/such' could not be loaded"),
        ({"task": "rte", "max_length": 1}, r"raise --max_length"),
        ({"task": "rte", "output_file": "no/such/folder.json"}, r"--output_file no/such/folder\.json: its folder does"),
    ],
)
def test_one_sentence_with_the_remedy(tiny_model_folder, flags, said):
    with pytest.raises(UserError, match=said) as caught:
        asked(**{"model_name_or_path": tiny_model_folder, **flags})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--batch_size", "-1"], "--batch_size must be at least 1"),
        (["--scoring", "words"], "invalid choice: 'words'"),
        (["--tasks", "rte"], "unrecognized arguments: --tasks rte"),
    ],
)
def test_wrong_flags(flags, said):
    with pytest.raises(UserError, match=said):
        parse_evaluate_flags(flags)

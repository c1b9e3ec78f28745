#!/usr/bin/env python
"""LD-MoLE on two ranks against plain LoRA in one process: same rows, steps and batch, measured once on test rows.

    python benchmarks/lora_comparison.py --output runs/lora_comparison

Each method takes the best of three learning rates, chosen by accuracy on validation rows with the first seed. Two more
seeds train with that rate, and the three adapters are measured once on the test rows, in one process. A seed sets the
adapter's start and the order of rows, for both methods alike. What is already in the output folder is not repeated, so
an interrupted comparison goes on where it stopped. Training is launch/train.py, as a user would run it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from ldmole_ds.model import LDMoLEModel  # noqa: E402
from ldmole_ds.model.base_model import load_base_model, load_tokenizer  # noqa: E402
from ldmole_ds.tasks import (  # noqa: E402
    ChoiceCollator,
    ChoiceDataset,
    demo_files,
    demo_model_file,
    padding_id,
    read_labels,
    read_questions,
    score_candidates,
)
from ldmole_ds.training.run_record import versions  # noqa: E402

TRAIN = str(ROOT / "launch" / "train.py")
RANKS = ["--num_gpus", "2"]
METHODS = {
    "LD-MoLE, 2 ranks, ep_size 2": {
        "command": ["deepspeed", "--master_port", "29571", *RANKS, TRAIN, "--deepspeed", "ds_configs/zero2.json"],
        "flags": {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 16},
        "threads": 1,
    },
    "plain LoRA r 8, 1 process": {
        "command": [sys.executable, TRAIN],
        "flags": {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 32, "router": "lora"},
        "threads": 2,
    },
}


def train(method: str, folder: Path, rate: float, seed: int, log: Path) -> dict:
    """One training run through the launcher; its report, read back if the run is already there."""
    if not (folder / "report.json").is_file():
        spec, files = METHODS[method], demo_files()
        settings = {
            **COMMON,
            **spec["flags"],
            "train_file": files["train"],
            "validation_file": files["validation"],
            "label_words": files["labels"],
            "output_dir": folder,
            "learning_rate": rate,
            "seed": seed,
        }
        argv = [*spec["command"], *(str(part) for k, v in settings.items() for part in (f"--{k}", v))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "DS_ACCELERATOR": "cpu"}
        with open(log, "a") as out:
            command = [*argv, "--overwrite_output_dir"]
            subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out, check=True)
    return json.loads((folder / "report.json").read_text())


def test_accuracy(folder: Path) -> float:
    """Accuracy of a saved adapter on the test rows, measured once and kept beside it."""
    kept = folder / "test_accuracy.json"
    if not kept.is_file():
        files = demo_files()
        base, tokenizer = load_base_model(str(demo_model_file())), load_tokenizer(str(demo_model_file()))
        model = LDMoLEModel.from_pretrained(base, folder)
        questions = read_questions(
            files["test"], label_words=json.loads(files["labels"].read_text()), labels=read_labels(files["train"])
        )
        dataset = ChoiceDataset.from_questions(questions, tokenizer, 512)
        dataset.questions.sort(key=lambda question: len(question.prompt_ids))
        collator = ChoiceCollator.for_datasets(padding_id(tokenizer), dataset)
        correct = 0.0
        for start in range(0, len(dataset), 50):
            batch = collator(dataset.questions[start : start + 50])
            with torch.no_grad():
                scores = score_candidates(model, batch, single_token=dataset.single_token)
            correct += (scores.argmax(1) == batch["gold"]).sum().item()
        kept.write_text(json.dumps({"accuracy": correct / len(dataset), "rows": len(dataset)}))
    return json.loads(kept.read_text())["accuracy"]


def demo_defaults() -> dict:
    """The settings of the embedded run, from launch/train.py itself."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("ldmole_launch_train", TRAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    skip = {"learning_rate", "output_dir"}
    return {k: v for k, v in module.DEMO_DEFAULTS.items() if k not in skip and "batch_size" not in k}


COMMON = {**demo_defaults(), "disable_tqdm": True, "eval_on_start": False}


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *body])


def summary(results: dict, arguments: argparse.Namespace) -> str:
    """The comparison as Markdown, with its setting."""
    selection = [["method", *(f"lr {rate:g}" for rate in arguments.learning_rates)]]
    tests = [["method", "lr", "test accuracy: mean (each seed)", "experts per token", "lambda: mean, spread",
              "trainable", "train s", "tokens/s"]]  # fmt: skip
    for method, result in results.items():
        selection.append([method, *(f"{r['accuracy_after']:.3f}" for r in result["selection"].values())])
        accuracies, reports = result["test_accuracy"], result["reports"]
        routing = [r["routing"] for r in reports if r["routing"]]
        mean = {k: statistics.mean(r[k] for r in routing) for k in routing[0]} if routing else {}
        tests.append(
            [
                method,
                f"{result['learning_rate']:g}",
                f"{statistics.mean(accuracies):.3f} ({', '.join(f'{a:.3f}' for a in accuracies)})",
                f"{mean['experts_per_token']:.2f} of 8" if mean else "1 of 1",
                f"{mean['lambda_mean']:.2f}, {mean['lambda_std']:.2f}" if mean.get("lambda_std") else "-",
                f"{reports[0]['parameters']['trainable'] / 1e6:.2f} M",
                f"{statistics.median(r['seconds'] for r in reports):.0f}",
                f"{statistics.median(r['tokens_per_second'] for r in reports):.0f}",
            ]
        )
    setting = ", ".join(f"{k} {v}" for k, v in COMMON.items() if k != "disable_tqdm")
    found = ", ".join(f"{k} {v}" for k, v in versions().items())
    return "\n\n".join(
        [
            "# LD-MoLE on two ranks against plain LoRA",
            "SmolLM2-135M-Instruct on customer messages of ten domains; 8 rows a step in both; 300 validation rows "
            "choose the learning rate, 500 test rows are measured once per seed. Reproduce: "
            "`python benchmarks/lora_comparison.py`.",
            f"Validation accuracy by learning rate (seed {arguments.seeds[0]}):",
            table(selection),
            "Test rows:",
            table(tests),
            f"Setting: {setting}. Seeds {', '.join(map(str, arguments.seeds))}. {os.cpu_count()} cores, "
            f"{platform.machine()}. Versions: {found}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/lora_comparison"), help="folder of all runs")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 42])
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log, results = folder / "log.txt", {}
    first, *others = arguments.seeds
    for method in METHODS:
        name = "ld-mole" if method.startswith("LD") else "lora"
        selection, folders = {}, {}
        for rate in arguments.learning_rates:
            folders[rate] = folder / f"{name}-lr{rate:g}-seed{first}"
            selection[rate] = train(method, folders[rate], rate, first, log)
            print(f"{method}: lr {rate:g}: validation accuracy {selection[rate]['accuracy_after']:.3f}", flush=True)
        best = max(selection, key=lambda rate: selection[rate]["accuracy_after"])
        finals, reports = [folders[best]], [selection[best]]
        for seed in others:
            finals.append(folder / f"{name}-lr{best:g}-seed{seed}")
            reports.append(train(method, finals[-1], best, seed, log))
        accuracies = [test_accuracy(final) for final in finals]
        print(f"{method}: lr {best:g}: test accuracy {accuracies}", flush=True)
        results[method] = {
            "selection": selection, "learning_rate": best, "reports": reports, "test_accuracy": accuracies,
        }  # fmt: skip
    (folder / "lora_comparison.md").write_text(summary(results, arguments))
    (folder / "lora_comparison.json").write_text(json.dumps(results, indent=2))
    print(summary(results, arguments))


if __name__ == "__main__":
    main()

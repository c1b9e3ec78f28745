#!/usr/bin/env python
"""LD-MoLE on two ranks against plain LoRA in one process: same rows, steps and batch, measured once on test rows.

    python benchmarks/lora_comparison.py --output runs/lora_comparison

Each method takes the best of three learning rates, chosen by accuracy on validation rows with the first seed. Then
three seeds train with that rate and are measured once on the test rows. A seed sets the adapter's start and the order
of rows, for both methods alike. Runs that are already in the output folder are not repeated, so an interrupted
comparison goes on where it stopped. Everything goes through launch/train.py, as a user would run it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldmole_ds.tasks import demo_files  # noqa: E402
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


def run(method: str, folder: Path, flags: dict, log: Path) -> dict:
    """One training run through the launcher; its report, read back if the run is already there."""
    if (folder / "report.json").is_file():
        return json.loads((folder / "report.json").read_text())
    spec, files = METHODS[method], demo_files()
    data = {"train_file": files["train"], "label_words": files["labels"], "output_dir": folder}
    settings = {**COMMON, **spec["flags"], **data, **flags}
    if method.startswith("plain"):
        settings = {k: v for k, v in settings.items() if not k.startswith(("sparsity", "target_num", "lambda"))}
    argv = [*spec["command"], *(str(part) for k, v in settings.items() for part in (f"--{k}", v))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "DS_ACCELERATOR": "cpu"}
    begin = time.time()
    with open(log, "a") as out:
        subprocess.run([*argv, "--overwrite_output_dir"], cwd=ROOT, env=environment, stdout=out, stderr=out, check=True)
    report = json.loads((folder / "report.json").read_text())
    report["whole_command_seconds"] = time.time() - begin
    (folder / "report.json").write_text(json.dumps(report, indent=2))
    return report


def demo_defaults() -> dict:
    """The settings of the embedded run, from launch/train.py itself."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("ldmole_launch_train", TRAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    skip = {"learning_rate", "output_dir"}
    return {k: v for k, v in module.DEMO_DEFAULTS.items() if k not in skip and "batch_size" not in k}


COMMON = {**demo_defaults(), "disable_tqdm": True}


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *body])


def summary(results: dict, arguments: argparse.Namespace) -> str:
    """The comparison as Markdown, with its setting."""
    selection = [["method", *(f"lr {rate:g}" for rate in arguments.learning_rates)]]
    tests = [["method", "lr", "test accuracy, mean (each seed)", "before", "experts per token", "lambda spread",
              "trainable", "train s", "tokens/s"]]  # fmt: skip
    for method, result in results.items():
        validation = [f"{r['accuracy_after']:.3f}" for r in result["selection"].values()]
        selection.append([method, *validation])
        accuracies = [r["accuracy_after"] for r in result["test"]]
        routing = [r["routing"] for r in result["test"] if r["routing"]]
        mean = {k: statistics.mean(r[k] for r in routing) for k in routing[0]} if routing else {}
        before = next((r["accuracy_before"] for r in result["test"] if r["accuracy_before"] is not None), None)
        tests.append(
            [
                method,
                f"{result['learning_rate']:g}",
                f"{statistics.mean(accuracies):.3f} ({', '.join(f'{a:.3f}' for a in accuracies)})",
                "-" if before is None else f"{before:.3f}",
                f"{mean['experts_per_token']:.2f}" if mean else "1",
                f"{mean['lambda_std']:.3f}" if mean.get("lambda_std") else "-",
                f"{result['test'][0]['parameters']['trainable'] / 1e6:.2f} M",
                f"{statistics.median(r['seconds'] for r in result['test']):.0f}",
                f"{statistics.median(r['tokens_per_second'] for r in result['test']):.0f}",
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
            "Validation accuracy by learning rate (seed 1):",
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
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files, log, results = demo_files(), folder / "log.txt", {}
    for method in METHODS:
        name, selection = method.split(",")[0].replace(" ", "-").lower(), {}
        for rate in arguments.learning_rates:
            flags = {"learning_rate": rate, "seed": arguments.seeds[0], "validation_file": files["validation"]}
            selection[rate] = run(method, folder / f"{name}-lr{rate:g}", {**flags, "eval_on_start": False}, log)
            print(f"{method}: lr {rate:g}: validation accuracy {selection[rate]['accuracy_after']:.3f}", flush=True)
        best = max(selection, key=lambda rate: selection[rate]["accuracy_after"])
        tests = []
        for seed in arguments.seeds:
            flags = {"learning_rate": best, "seed": seed, "validation_file": files["test"]}
            flags["eval_on_start"] = seed == arguments.seeds[0]
            tests.append(run(method, folder / f"{name}-seed{seed}", flags, log))
            print(f"{method}: seed {seed}: test accuracy {tests[-1]['accuracy_after']:.3f}", flush=True)
        results[method] = {"selection": selection, "learning_rate": best, "test": tests}
    (folder / "lora_comparison.md").write_text(summary(results, arguments))
    (folder / "lora_comparison.json").write_text(json.dumps(results, indent=2))
    print(summary(results, arguments))


if __name__ == "__main__":
    main()

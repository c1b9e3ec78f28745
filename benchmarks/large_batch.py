#!/usr/bin/env python
"""The same rows at a global batch of 16, 128 and 1024: what large batches cost and what they learn, in one table.

    python benchmarks/large_batch.py

Two ranks with half of the experts each train the embedded model through launch/train.py, one pass over the same rows in
every run, with the learning rate scaled by the square root of the batch. To spare time on CPU cores, experts sit on q
and v of the last ten of 30 layers, and prompts keep their last 24 tokens (the message, without all of the topics).
Held-out accuracy is measured afterwards, in one process. What is already in the output folder is not repeated, so an
interrupted table goes on where it stopped; `--only NAME` makes one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
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

LAUNCH = ["deepspeed", "--master_port", "29573", "--num_gpus", "2", str(ROOT / "launch" / "train.py")]
RANKS, BASE_BATCH, BASE_RATE = 2, 16, 1e-3
WARMUP_START, WARMUP_STEPS = 16, 3
COMMON = {
    "deepspeed": "ds_configs/zero2.json",
    "ep_size": 2,
    "target_modules": r".*layers\.2\d\.self_attn\.[qv]_proj",
    "max_length": 24,
    "lambda_hidden_size": 128,
    "lora_dropout": 0.0,
    "sparsity_loss_weight": 2.0,
    "learning_rate": BASE_RATE,
    "lr_scaling": "sqrt",
    "base_batch_size": BASE_BATCH,
    "lr_scheduler_type": "constant",
    "num_train_epochs": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 1,
    "disable_tqdm": True,
}
RUNS = {
    "16": {"global_batch_size": 16, "per_device_train_batch_size": 8},
    "128": {"global_batch_size": 128, "per_device_train_batch_size": 16},
    "1024": {"global_batch_size": 1024, "per_device_train_batch_size": 16},
    "1024, warm-up": {
        "global_batch_size": 1024,
        "per_device_train_batch_size": 16,
        "batch_size_warmup_start": WARMUP_START,
        "batch_size_warmup_steps": WARMUP_STEPS,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": WARMUP_STEPS,
    },
    "1024, weights": {"global_batch_size": 1024, "per_device_train_batch_size": 16, "expert_dispatch": "weights"},
    # Stopped early: only to see what it sends.
    "16, weights": {
        "global_batch_size": 16,
        "per_device_train_batch_size": 8,
        "expert_dispatch": "weights",
        "max_steps": 8,
    },
}


def train(name: str, folder: Path, rows: Path) -> None:
    """One run through the launcher, unless its report is there."""
    if (folder / "report.json").is_file():
        return
    settings = {**COMMON, **RUNS[name], "train_file": rows, "label_words": demo_files()["labels"], "output_dir": folder}
    flags = []
    for key, value in settings.items():
        flags += [f"--{key}", str(value)]
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ}
    with open(folder.with_suffix(".log"), "w") as log:
        command = [*LAUNCH, *flags, "--overwrite_output_dir"]
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, "date": time.strftime("%Y-%m-%d")}))


def held_out_accuracy(adapter: Path | None, num_rows: int) -> float:
    """Accuracy on the first validation rows, of the base model or with an adapter."""
    files = demo_files()
    model, tokenizer = load_base_model(str(demo_model_file())), load_tokenizer(str(demo_model_file()))
    if adapter is not None:
        model = LDMoLEModel.from_pretrained(model, adapter)
    label_words = json.loads(files["labels"].read_text())
    questions = read_questions(files["validation"], label_words=label_words, labels=read_labels(files["train"]))
    dataset = ChoiceDataset.from_questions(questions[:num_rows], tokenizer, COMMON["max_length"])
    dataset.questions.sort(key=lambda question: len(question.prompt_ids))
    collator = ChoiceCollator.for_datasets(padding_id(tokenizer), dataset)
    correct = 0
    for start in range(0, len(dataset), 50):
        batch = collator(dataset.questions[start : start + 50])
        with torch.no_grad():
            scores = score_candidates(model.eval(), batch, single_token=dataset.single_token)
        correct += int((scores.argmax(1) == batch["gold"]).sum())
    return correct / len(dataset)


def measured_accuracy(folder: Path, adapter: Path | None, num_rows: int) -> float:
    """`held_out_accuracy`, kept in the folder."""
    kept = folder / f"accuracy_{num_rows}.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(held_out_accuracy(adapter, num_rows)))
    return json.loads(kept.read_text())


def facts(folder: Path, num_rows: int) -> dict:
    """What a run was and moved, in so many rows."""
    report = json.loads((folder / "report.json").read_text())
    settings = json.loads((folder / "run_settings.json").read_text())
    training, ranks = settings["training"], report["ranks"]
    return {
        "global_batch_size": settings["batch"]["global_batch_size"],
        "per_device_train_batch_size": training["per_device_train_batch_size"],
        "gradient_accumulation_steps": training["gradient_accumulation_steps"],
        "batch_size_warmup": [settings["batch"][f"batch_size_warmup_{key}"] for key in ("start", "steps")],
        "expert_dispatch": settings["layout"]["expert_dispatch"],
        "steps": report["steps"],
        "rows": num_rows,
        "learning_rate": training["learning_rate"],
        "tokens_per_second": report["tokens_per_second"],
        "seconds": report["seconds"],
        "bytes_sent_per_row": sum(rank["bytes_sent"] for rank in ranks) / num_rows,
        "bytes_sent_by_phase": {
            phase: sum(rank["bytes_by_phase"].get(phase, 0) for rank in ranks) for phase in ranks[0]["bytes_by_phase"]
        },
        "peak_memory_bytes": max(rank["peak_memory_bytes"] for rank in ranks),
        "versions": settings["versions"],
        "date": report["date"],
    }


def table(results: dict[str, dict]) -> str:
    """The runs as a Markdown table."""
    head = ["global batch", "micro x accumulation x ranks", "dispatch", "steps", "lr", "accuracy before -> after",
            "tokens/s", "train s", "MB sent per row", "peak memory of a rank"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for r in results.values():
        start, steps = r["batch_size_warmup"]
        lines.append(
            [
                f"{r['global_batch_size']}" + (f", from {start} over {steps} steps" if start else ""),
                f"{r['per_device_train_batch_size']} x {r['gradient_accumulation_steps']} x {RANKS}",
                r["expert_dispatch"],
                f"{r['steps']}",
                f"{r['learning_rate']:.3g}",
                f"{r['accuracy_before']:.3f} -> {r['accuracy_after']:.3f}" if "accuracy_after" in r else "(stopped)",
                f"{r['tokens_per_second']:.0f}",
                f"{r['seconds']:.0f}",
                f"{r['bytes_sent_per_row'] / 1e6:.2f}",
                f"{r['peak_memory_bytes'] / 1e9:.2f} GB",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(results: dict[str, dict], arguments: argparse.Namespace) -> str:
    """Setting and table."""
    last = list(results.values())[-1]
    setting = ", ".join(f"{k} {v}" for k, v in COMMON.items())
    dates = sorted({r["date"] for r in results.values()})
    return "\n\n".join(
        [
            "# Global batch 16, 128 and 1024",
            f"SmolLM2-135M-Instruct on customer messages of ten domains, {RANKS} ranks with half of the experts each. "
            f"Every run sees the same {arguments.rows} rows once (the 2,000 training rows, then the first of them "
            f"again); accuracy on {arguments.eval_rows} validation rows. To spare time on CPU cores, experts sit on q "
            "and v of the last ten of 30 layers, and rows keep their last "
            f"{COMMON['max_length']} tokens (the message, without all of the topics). The learning rate is "
            f"{BASE_RATE:g} x sqrt(batch / {BASE_BATCH}). MB sent: by the experts' exchange, forward and backward, of "
            "both ranks; the gradients that ZeRO reduces are not in it. Reproduce: `python benchmarks/large_batch.py`.",
            table(results),
            f"Setting: {setting}. {', '.join(dates)}, {os.cpu_count()} CPU cores ({platform.machine()}), gloo. "
            f"Versions: {', '.join(f'{k} {v}' for k, v in last['versions'].items() if k != 'ldmole_ds')}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/large_batch"), help="folder of all runs")
    parser.add_argument("--rows", type=int, default=2048, help="training rows of every run")
    parser.add_argument("--eval_rows", type=int, default=300, help="validation rows")
    parser.add_argument("--only", choices=list(RUNS), help="make this run alone; the table holds those that are there")
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / f"rows_{arguments.rows}.jsonl"
    lines = demo_files()["train"].read_text(encoding="utf-8").splitlines()
    rows.write_text("\n".join(itertools.islice(itertools.cycle(lines), arguments.rows)) + "\n", encoding="utf-8")
    results: dict[str, dict] = {}
    for name in RUNS:
        run = folder / f"{name.replace(', ', '-')}_{arguments.rows}"
        if arguments.only in (None, name):
            train(name, run, rows)
        if (run / "report.json").is_file():
            stopped = RUNS[name].get("max_steps")
            results[name] = facts(run, stopped * RUNS[name]["global_batch_size"] if stopped else arguments.rows)
            if not stopped:
                results[name]["accuracy_before"] = measured_accuracy(folder / "before", None, arguments.eval_rows)
                results[name]["accuracy_after"] = measured_accuracy(run, run, arguments.eval_rows)
    if results:
        text = page(results, arguments)
        (folder / "large_batch.md").write_text(text, encoding="utf-8")
        (folder / "large_batch.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()

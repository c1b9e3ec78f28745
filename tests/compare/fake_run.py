"""Stands in for launch/train.py and launch/evaluate.py: no model, the files of a run at once.

Plain LoRA is right on FAKE_LORA of ten rows, any other method on FAKE_OTHERS. Of the learning rates 0.02 is the best.
FAKE_FAIL names a router whose runs fail; FAKE_SLEEP: seconds that a run takes, FAKE_LOG a file that names the runs.
"""

import json
import os
import sys
import time
from pathlib import Path

ROWS = 100
script = Path(sys.argv[1]).name
flags = {word[2:]: sys.argv[i + 1] for i, word in enumerate(sys.argv) if word.startswith("--")}


def answers(right: int) -> dict:
    gold = [row % 10 for row in range(ROWS)]
    return {"gold": gold, "answers": [g if g < right else (g + 1) % 10 for g in gold], "chance": 0.1}


def right_of(router: str) -> int:
    return int(os.environ["FAKE_LORA" if router == "lora" else "FAKE_OTHERS"])


def write(path: Path, values) -> None:
    path.write_text(json.dumps(values))


with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(f"{script} {flags.get('output_dir') or flags['adapter']} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\n")
time.sleep(float(os.environ.get("FAKE_SLEEP", "0")))
if script == "evaluate.py":
    found = answers(right_of(json.loads((Path(flags["adapter"]) / "adapter.json").read_text())))
    write(Path(flags["output_file"]), {"results": [{"accuracy": 0.0, **found}]})
else:
    folder, router = Path(flags["output_dir"]), flags.get("router", "sparsegen")
    if router == os.environ.get("FAKE_FAIL"):
        sys.exit("out of memory, says the fake")
    routing = {"experts_per_token": 2.5, "lambda_mean": 0.5, "lambda_std": 0.1} if router != "lora" else {}
    write(folder / "adapter.json", router)
    write(folder / "heldout_answers.json", answers(right_of(router)))
    write(
        folder / "report.json",
        {
            "accuracy_after": 0.9 if flags["learning_rate"] == "0.02" else 0.5,
            "routing": routing,
            "num_experts": 8,
            "flops_per_token": 2e9,
            "tokens_per_second": 100.0,
            "training_memory_bytes": 3e9,
            "parameters": {"trainable": 21_000_000},
        },
    )

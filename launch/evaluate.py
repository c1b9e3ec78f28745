#!/usr/bin/env python
"""Measure accuracy of an adapter, or of a bare base model, on tasks.

    python launch/evaluate.py --adapter runs/demo --task clinc_domains
    deepspeed --num_gpus 2 launch/evaluate.py --adapter runs/mine --task arc_easy,cola

One process or many ranks; every row counts once. See --help, and docs/tasks.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# One progress bar per job. Read by tqdm when it is imported.
if os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldmole_ds.training.runtime import run_main


def main(argv: list[str]) -> None:
    from ldmole_ds.training import runtime
    from ldmole_ds.training.evaluate import evaluate, parse_evaluate_flags

    evaluate(parse_evaluate_flags(argv))
    runtime.stop()


if __name__ == "__main__":
    run_main(main)

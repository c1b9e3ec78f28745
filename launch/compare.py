#!/usr/bin/env python
"""Compare methods, or vary one setting, under one budget.

    python launch/compare.py --methods ld-mole,lora,mola-8888 --seeds 1,2 --max_steps 70 --output_dir runs/compare

writes compare.md, compare.json and a plot for each task into the output folder. See --help, and docs/compare.md.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldmole_ds.training.runtime import UserError, leave, run_main


def main(argv: list[str]) -> None:
    from ldmole_ds.compare.arguments import parse_compare_flags
    from ldmole_ds.compare.report import list_cells, write_outputs
    from ldmole_ds.compare.run import run_plan
    from ldmole_ds.training.preemption import EXIT_PREEMPTED

    own, plan = parse_compare_flags(argv)
    try:
        plan.check_finished()
    except ValueError as error:
        raise UserError(str(error)) from error
    if own.dry_run:
        print(list_cells(plan))
        return
    failures, stopped = ([], False) if own.tables_only else run_plan(plan, own.parallel, own.threads)
    page = write_outputs(plan, argv, own.parallel, own.threads)
    print(f"\n{page.read_text(encoding='utf-8')}\nwrote {page}", flush=True)
    if stopped:
        print("stopped; the same command goes on where it was", file=sys.stderr, flush=True)
        leave(EXIT_PREEMPTED)
    if failures:
        titles = "".join(f"\n    {cell.title}: {cell.log}" for cell in failures)
        print(f"error: {len(failures)} runs failed:{titles}", file=sys.stderr, flush=True)
        leave(1)


if __name__ == "__main__":
    run_main(main)

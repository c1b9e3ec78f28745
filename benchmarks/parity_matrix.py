#!/usr/bin/env python
"""The parity contract over the whole matrix of layouts and settings, on gloo ranks of this machine.

    python benchmarks/parity_matrix.py --output benchmarks/results/parity_matrix.md

Five optimizer steps of a small model per cell, compared with one dense process; see `ldmole_ds.parity`. Prints and
writes a table; exits with 1 if any cell fails.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldmole_ds.parity import Cell, default_cells, dense_run, full_matrix, judge, run_cells, verdict_table  # noqa: E402
from ldmole_ds.parity.compare import check_dense  # noqa: E402
from ldmole_ds.training.run_record import versions  # noqa: E402
from tests.distributed_utils import run_distributed  # noqa: E402

CELLS_PER_SPAWN = 16


def run_matrix(cells: list[Cell]) -> list:
    """Verdicts of all cells; ranks are started once per batch of cells."""
    dense = {key: dense_run(*key) for key in {(cell.accumulation, cell.router) for cell in cells}}
    for (_, router), run in dense.items():
        if router == "sparsegen":
            check_dense(run)
    runs, verdicts = {}, []
    for world_size, same_world in groupby(cells, key=lambda cell: cell.world_size):
        same_world = list(same_world)
        for start in range(0, len(same_world), CELLS_PER_SPAWN):
            batch = same_world[start : start + CELLS_PER_SPAWN]
            per_rank = run_distributed(run_cells, world_size, batch, deepspeed=True, timeout_s=120 * len(batch))
            runs.update(zip(batch, per_rank[0], strict=True))
            for cell in batch:
                verdicts.append(
                    judge(cell, runs[cell], dense[cell.accumulation, cell.router], runs.get(cell.counterpart()))
                )
                print(verdict_table(verdicts[-1:]).splitlines()[-1], flush=True)
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table here as well")
    parser.add_argument("--default", action="store_true", help="only the cells that the tests run")
    arguments = parser.parse_args()
    begin, cells = time.perf_counter(), default_cells() if arguments.default else full_matrix()
    print(f"{len(cells)} cells", flush=True)
    verdicts = run_matrix(cells)
    failed = [v for v in verdicts if not v.passed]
    found = ", ".join(f"{k} {v}" for k, v in versions().items())
    text = "\n\n".join(
        [
            "# Parity matrix",
            "Five AdamW steps of a small Llama (lr 1e-3, clipping active, all auxiliary losses, shared lambda MLP, one "
            "idle expert, uneven splits) against one dense process. Largest relative differences; bars: "
            "`ldmole_ds/parity/compare.py`. Reproduce: `python benchmarks/parity_matrix.py`.",
            f"{len(verdicts) - len(failed)} of {len(verdicts)} cells pass; {time.perf_counter() - begin:.0f} s on "
            f"{os.cpu_count()} cores ({platform.machine()}), gloo. Versions: {found}.",
            verdict_table(verdicts) + "\n",
        ]
    )
    print("\n" + text.split("\n\n")[2])
    if arguments.output:
        arguments.output.write_text(text)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Checkpoints of every layout loaded into every other one: 18 x 18 pairs, on gloo ranks of this machine.

    python benchmarks/reshard_matrix.py --output benchmarks/results/reshard_matrix.md

Weights, moments and steps must be the same bit for bit, and the two steps that follow must be those of one dense
process that never stopped; see `ldmole_ds.parity.reshard`. Exits with 1 if any pair fails.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldmole_ds.parity.cells import Cell  # noqa: E402
from ldmole_ds.parity.dense import Run, dense_run  # noqa: E402
from ldmole_ds.parity.reshard import CELLS, SAVED_AT, load_pairs, save_layouts  # noqa: E402
from ldmole_ds.training.run_record import versions  # noqa: E402
from tests.distributed_utils import run_distributed  # noqa: E402


def short(cell: Cell) -> str:
    return f"{cell.world_size}/{cell.ep_size}/{cell.stage}"


def worst(run: Run, dense: Run) -> float:
    """Largest relative difference of loss and gradient norm from the dense process."""
    found, expected = [*run.losses, *run.norms], [*dense.losses[SAVED_AT:], *dense.norms[SAVED_AT:]]
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    begin, pairs, results = time.perf_counter(), list(itertools.product(CELLS, CELLS)), {}
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, 2, 4):
            run_distributed(save_layouts, world_size, folder, deepspeed=True, timeout_s=300)
        for target in CELLS:  # one start of the ranks per target keeps each short
            mine = [pair for pair in pairs if pair[1] == target]
            args = (target.world_size, folder, mine)
            results.update(run_distributed(load_pairs, *args, deepspeed=True, timeout_s=600)[0])
            print(f"{len(results)} of {len(pairs)} pairs", flush=True)
    dense = dense_run()
    errors = {pair: worst(run, dense) for pair, (_, run) in results.items()}
    differ = [pair for pair, (problems, _) in results.items() if problems]
    astray = [pair for pair, error in errors.items() if not error < 1e-5]
    head = "| saved from \\ loaded into | " + " | ".join(short(cell) for cell in CELLS) + " |"
    rows = [
        f"| {short(source)} | "
        + " | ".join("differs" if (source, t) in differ else f"{errors[source, t]:.0e}" for t in CELLS)
        + " |"
        for source in CELLS
    ]
    text = "\n\n".join(
        [
            "# Resharding matrix",
            "Layouts are ranks/ep_size/ZeRO stage. Every checkpoint (after three AdamW steps of the contract's small "
            "Llama) loaded into every layout. A number says that weights, moments and steps were the same bit for bit, "
            "and is the largest relative difference of loss and gradient norm of the next two steps from one dense "
            "process that never stopped (bar 1e-5). Reproduce: `python benchmarks/reshard_matrix.py`.",
            f"{len(pairs) - len(set(differ) | set(astray))} of {len(pairs)} pairs pass; "
            f"{time.perf_counter() - begin:.0f} s, {date.today()}, {os.cpu_count()} cores ({platform.machine()}), "
            "gloo. "
            f"Versions: {', '.join(f'{k} {v}' for k, v in versions().items())}.",
            "\n".join([head, "| --- " * (len(CELLS) + 1) + "|", *rows]) + "\n",
        ]
    )
    print("\n" + text.split("\n\n")[2])
    if arguments.output:
        arguments.output.write_text(text)
    sys.exit(bool(differ or astray))


if __name__ == "__main__":
    main()

"""The contract on the ranks of the running job, whatever their number: what `launch/doctor.py --parity` runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist

from ldmole_ds.parity.cells import Cell, with_counterparts
from ldmole_ds.parity.compare import Verdict, check_dense, judge
from ldmole_ds.parity.dense import Run, dense_run
from ldmole_ds.parity.engine import rows_of_ranks, run_cell
from ldmole_ds.parity.model import small_config


def ep_sizes(world_size: int) -> list[int]:
    """1, 2 and the largest that divides both the ranks and the experts."""
    largest = math.gcd(world_size, small_config().num_experts)
    return sorted({1, min(2, largest), largest})


def job_cells(world_size: int, *, bf16: bool = True, quick: bool = False) -> list[Cell]:
    """A dozen or two layouts for this many ranks; with ``quick`` two or three.

    Args:
        world_size: Ranks of the job.
        bf16: Whether the accelerator has bfloat16.
        quick: Only stage 2, plain.
    """
    sizes = ep_sizes(world_size)
    widest = (world_size, sizes[-1])
    if quick:
        return with_counterparts([Cell((world_size, size), "2") for size in sizes])
    cells = [Cell((world_size, size), stage) for size in sizes for stage in ("1", "2", "3")]
    cells += [Cell(widest, "3 zero.Init"), Cell(widest, "2", accumulation=2, checkpointing=True)]
    if widest[1] > 1:
        cells += [Cell(widest, "2", expert_dispatch="weights"), Cell(widest, "3", expert_dispatch="weights")]
    if bf16:
        cells += [Cell(widest, "2", "bf16"), Cell(widest, "3", "bf16")]
    return with_counterparts(cells)


def run_job(cells: list[Cell], report: Callable[[Verdict], None]) -> list[Verdict]:
    """Train and judge every cell. Collective: every rank of the job calls it with the same cells.

    Every rank trains the dense reference for itself and judges its own run; the worst judgement counts on all.

    Args:
        cells: Of this many ranks, each after its counterpart.
        report: Called with each verdict as soon as it is known.
    """
    rows = sum(rows_of_ranks(dist.get_world_size()))
    dense: dict[tuple[int, str], Run] = {}
    runs: dict[Cell, Run] = {}
    verdicts: list[Verdict] = []
    for cell in cells:
        key = (cell.accumulation, cell.router)
        if key not in dense:
            dense[key] = dense_run(*key, rows=rows)
            check_dense(dense[key])
        runs[cell] = run_cell(cell)
        own = judge(cell, runs[cell], dense[key], runs.get(cell.counterpart()))
        verdicts.append(_worst_of_ranks(own))
        report(verdicts[-1])
    return verdicts


def _worst_of_ranks(own: Verdict) -> Verdict:
    """The same on every rank: the largest difference anywhere, passed if it did everywhere."""
    everyone: list[Verdict] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    ratios = [v.error_ratio for v in everyone if v.error_ratio is not None]
    return replace(
        everyone[0],
        loss=max(v.loss for v in everyone),
        norm=max(v.norm for v in everyone),
        weights=max(v.weights for v in everyone),
        error_ratio=max(ratios, default=None),
        passed=all(v.passed for v in everyone),
        seconds=max(v.seconds for v in everyone),
    )


def exit_code(verdicts: list[Verdict]) -> int:
    """0 if there are verdicts and all passed, else 1."""
    return 0 if verdicts and all(v.passed for v in verdicts) else 1

"""Judges a run against the dense process, or beside the same run with ep_size 1.

fp32: losses and norms relative, every tensor by norm(difference) / norm(value), all within 1e-5. bf16: the loss within
1e-3 of ep_size 1 at the same stage, and the error of the weights against the dense fp32 run at most 1.2 times as large.
With dropout: within 1e-5 of ep_size 1 and stage 1 on as many ranks, since masks are drawn before dispatch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ldmole_ds.parity.cells import Cell
from ldmole_ds.parity.dense import CLIP, Run

TOLERANCE = 1e-5
BF16_LOSS, BF16_ERROR_RATIO = 1e-3, 1.2


@dataclass(frozen=True)
class Verdict:
    """What was measured for a cell.

    Attributes:
        cell: The cell.
        reference: What it was compared with.
        loss, norm, weights: Largest relative differences; weights over all tensors, norm-wise.
        error_ratio: bf16 with ep_size > 1: error against fp32 as a multiple of ep_size 1's, else None.
        passed: Whether all are within the bars.
        seconds: Of the run.
    """

    cell: Cell
    reference: str
    loss: float
    norm: float
    weights: float
    error_ratio: float | None
    passed: bool
    seconds: float


def relative(value: Tensor, expected: Tensor) -> float:
    """Norm-wise distance; 0 for two zeros, infinite where a value is not finite."""
    value, expected = value.double(), expected.double()
    distance = ((value - expected).norm() / expected.norm().clamp(min=1e-12)).item()
    return distance if math.isfinite(distance) else math.inf


def worst_of(values: list[float], expected: list[float]) -> float:
    """Largest relative difference; infinite for a value that is not finite."""
    pairs = zip(values, expected, strict=True)
    return max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs)


def worst_tensor(state: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest norm-wise difference of a tensor; infinite where one is missing."""
    if state.keys() != expected.keys():
        return math.inf
    return max(relative(state[key], value) for key, value in expected.items())


def error_of(state: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Norm of all differences together."""
    return math.sqrt(sum((state[k].double() - v.double()).square().sum().item() for k, v in exact.items()))


def check_dense(run: Run) -> None:
    """The reference must be worth comparing with.

    Raises:
        RuntimeError: Clipping is not active in every step, no expert idles, or a tensor hardly moves.
    """
    moved = min(relative(run.state[key], value) for key, value in run.start.items() if value.norm() > 0)
    if min(run.norms) < 2 * CLIP or run.idle_load != 0.0 or moved < 100 * TOLERANCE:
        raise RuntimeError(
            f"the dense run proves nothing: norms {run.norms} must exceed {2 * CLIP}, the idle expert's load "
            f"{run.idle_load} must be 0, the least moved tensor {moved:.1e} must exceed {100 * TOLERANCE:.0e}"
        )


def judge(cell: Cell, run: Run, dense: Run, counterpart: Run | None) -> Verdict:
    """Compare one cell's run.

    Args:
        cell: The cell.
        run: Its run.
        dense: The dense run with the same accumulation.
        counterpart: The run of ``cell.counterpart()``, where ``cell.needs_counterpart``.
    """
    beside = counterpart if cell.needs_counterpart else None
    expected = beside or dense
    loss, norm = worst_of(run.losses, expected.losses), worst_of(run.norms, expected.norms)
    weights, ratio = worst_tensor(run.state, expected.state), None
    if cell.dtype == "bf16":
        passed = loss < BF16_LOSS if beside else all(map(math.isfinite, [loss, norm, weights]))
        if beside:
            ratio = error_of(run.state, dense.state) / error_of(beside.state, dense.state)
            passed = passed and ratio <= BF16_ERROR_RATIO
    elif cell.dropout and not beside:
        passed = all(map(math.isfinite, [loss, norm, weights]))
    else:
        passed = max(loss, norm, weights) < TOLERANCE
    reference = "ep 1" if beside else "dense"
    return Verdict(cell, reference, loss, norm, weights, ratio, passed, run.seconds)


def verdict_table(verdicts: list[Verdict]) -> str:
    """A Markdown table, one row per cell."""
    head = "| cell | compared with | loss | gradient norm | weights | error ratio | result | s |"
    rows = [head, "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for v in verdicts:
        ratio = "" if v.error_ratio is None else f"{v.error_ratio:.2f}"
        figures = f"{v.loss:.1e} | {v.norm:.1e} | {v.weights:.1e} | {ratio}"
        rows.append(f"| {v.cell} | {v.reference} | {figures} | {'pass' if v.passed else 'FAIL'} | {v.seconds:.1f} |")
    return "\n".join(rows)

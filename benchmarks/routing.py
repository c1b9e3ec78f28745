#!/usr/bin/env python
"""Sparsegen forward and backward: by comparing all pairs, by one sort, and as autograd differentiates the closed form.

    python benchmarks/routing.py

Logits of three projections, tokens innermost as in the layers. Softmax stands beside them for scale. CPU time of one
thread (on a GPU: seconds), so that other programs do not matter. `ldmole_ds.ops.sparsegen` compares pairs up to
``PAIRWISE_MAX_EXPERTS`` experts: the table shows whether that is where the sort takes over.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import harness  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from ldmole_ds.ops import sparsegen as public  # noqa: E402
from ldmole_ds.ops import sparsegen_reference  # noqa: E402
from ldmole_ds.training.run_record import versions  # noqa: E402

ops = sys.modules[public.__module__]
PROJECTIONS = 3
PAIRS, SORT, REFERENCE, SOFTMAX = "all pairs", "one sort", "autograd", "softmax"


def with_limit(limit: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Sparsegen that compares pairs up to so many experts."""

    def run(logits: Tensor, lam: Tensor) -> Tensor:
        kept, ops.PAIRWISE_MAX_EXPERTS = ops.PAIRWISE_MAX_EXPERTS, limit
        try:
            return ops.sparsegen(logits, lam, dim=1)
        finally:
            ops.PAIRWISE_MAX_EXPERTS = kept

    return run


def variants() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """``(logits (G, E, T), lambda (T,)) -> weights (G, E, T)``."""
    return {
        PAIRS: with_limit(sys.maxsize),
        SORT: with_limit(0),
        REFERENCE: lambda logits, lam: sparsegen_reference(logits.transpose(1, 2), lam).transpose(1, 2),
        SOFTMAX: lambda logits, lam: logits.softmax(1) + 0 * lam,
    }


def measure(args: argparse.Namespace, experts: int, tokens: int) -> dict[str, list[float]]:
    """Seconds of forward and backward; all but softmax are first checked to agree."""
    shape = (PROJECTIONS, experts, tokens)
    logits = torch.randn(shape, device=args.device).requires_grad_()
    lam = (torch.rand(tokens, device=args.device) - 0.5).requires_grad_()
    cotangent = torch.randn(shape, device=args.device)

    def step(run: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        probs = run(logits, lam)
        return [probs.detach(), *torch.autograd.grad(probs, (logits, lam), cotangent)]

    runs = variants()
    for found, expected in zip(
        zip(step(runs[PAIRS]), step(runs[SORT]), strict=True), step(runs[REFERENCE]), strict=True
    ):
        for value in found:
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)
    steps = {name: lambda run=run: step(run) for name, run in runs.items()}
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    return harness.interleaved(steps, args.rounds, warmup=2, clock=clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="E")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096], help="T")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="folder of routing.md and routing.json [benchmarks/results]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, values = [["E", "tokens", *(f"{n}, ms" for n in variants()), "autograd / ours", "ours", "faster"]], []
    for experts in args.experts:
        for tokens in args.tokens:
            seconds = measure(args, experts, tokens)
            ours = PAIRS if experts <= ops.PAIRWISE_MAX_EXPERTS else SORT
            middle, low, high = harness.ratio(seconds, REFERENCE, ours)
            times = [f"{1e3 * harness.spread(seconds[name])[0]:.2f}" for name in seconds]
            faster = min((PAIRS, SORT), key=lambda name: harness.spread(seconds[name])[0])
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            rows.append([str(experts), str(tokens), *times, ratio, ours, faster])
            values.append({"experts": experts, "tokens": tokens, "seconds": seconds})
    found = ", ".join(f"{k} {v}" for k, v in versions().items() if v != "not installed")
    markdown = (
        f"# Sparsegen\n\nForward and backward of {PROJECTIONS} projections' logits, float32, one thread, medians of "
        f"{args.rounds} interleaved rounds. Reproduce: `python benchmarks/routing.py`.\n\n{harness.table(rows)}\n\n"
        "All variants but softmax were checked to agree.\n\n"
        f"{harness.machine()}. {found}.\n"
    )
    harness.write("routing", markdown, {"machine": harness.machine(), "cells": values}, args.output)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Routing, forward and backward: Sparsegen in three ways, and all of an input group's routing in one kernel.

    python benchmarks/routing.py                      on a CPU by the kernel in C
    python benchmarks/routing.py --device cuda        by Triton's

Logits of three projections, tokens innermost as in the layers. CPU time of one thread (on a GPU: seconds), so that
other programs do not matter.

The first table is of Sparsegen alone: by comparing all pairs, by one sort, as autograd differentiates the closed form,
and softmax for scale. `ldmole_ds.ops.sparsegen` compares pairs up to ``PAIRWISE_MAX_EXPERTS`` experts: the table shows
whether that is where the sort takes over. The second is of `ldmole_ds.ops.fused_routing`: from logits to routing
weights, statistics and, where tokens travel, the plan; beside it the same in plain operations (`routing_reference`).
"""

from __future__ import annotations

import argparse
import functools
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
from ldmole_ds.ops.fused_routing import fused_routing, routing_reference, uses_fused_routing  # noqa: E402
from ldmole_ds.ops.routing_spec import RoutingSpec  # noqa: E402
from ldmole_ds.training.run_record import versions  # noqa: E402

ops = sys.modules[public.__module__]
PROJECTIONS = 3
PAIRS, SORT, REFERENCE, SOFTMAX = "all pairs", "one sort", "autograd", "softmax"
FUSED, PLAIN = "one kernel", "plain operations"
EP_SIZES = (0, 2)


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


def timed(args: argparse.Namespace, steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each in each round."""
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    return harness.interleaved(steps, args.rounds, warmup=2, clock=clock)


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    """Raises an error if they do not."""
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value.to(wanted.dtype), wanted, rtol=1e-3, atol=1e-4)


def measure(args: argparse.Namespace, experts: int, tokens: int) -> dict[str, list[float]]:
    """Seconds of Sparsegen; all but softmax are first checked to agree."""
    shape = (PROJECTIONS, experts, tokens)
    logits = torch.randn(shape, device=args.device).requires_grad_()
    lam = (torch.rand(tokens, device=args.device) - 0.5).requires_grad_()
    cotangent = torch.randn(shape, device=args.device)

    def step(run: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        probs = run(logits, lam)
        return [probs.detach(), *torch.autograd.grad(probs, (logits, lam), cotangent)]

    runs = variants()
    for name in (PAIRS, SORT):
        agree(step(runs[name]), step(runs[REFERENCE]))
    return timed(args, {name: functools.partial(step, run) for name, run in runs.items()})


def measure_whole(args: argparse.Namespace, experts: int, tokens: int, ep_size: int) -> dict[str, list[float]]:
    """Seconds of all the routing, an eighth of the tokens padding; both are first checked to agree."""
    device = args.device
    logits = (2 * torch.randn(PROJECTIONS, experts, tokens, device=device)).requires_grad_()
    lambda_logit = (2 * torch.randn(tokens, device=device)).requires_grad_()
    mask = torch.arange(tokens, device=device) % 8 > 0
    of_probs = torch.randn_like(logits)
    of_sums = torch.randn(1, PROJECTIONS, 2 * experts + 3, device=device) / tokens
    spec = RoutingSpec(torch.float32, target_num_experts=2, ep_size=ep_size)

    def step(run: Callable) -> list[Tensor]:
        probs, lam, sums, plan = run(logits, lambda_logit, mask, spec)
        cotangents = (of_probs, of_sums.expand_as(sums))
        grads = torch.autograd.grad((probs, sums), (logits, lambda_logit), cotangents)
        return [probs.detach(), lam, sums.detach().sum(0), *([] if plan is None else [plan]), *grads]

    agree(step(fused_routing), step(routing_reference))
    runs = {FUSED: fused_routing, PLAIN: routing_reference}
    return timed(args, {name: functools.partial(step, run) for name, run in runs.items()})


def sparsegen_table(args: argparse.Namespace) -> tuple[str, list[dict]]:
    rows, cells = [["E", "tokens", *(f"{n}, ms" for n in variants()), "autograd / ours", "ours", "faster"]], []
    for experts in args.experts:
        for tokens in args.tokens:
            seconds = measure(args, experts, tokens)
            ours = PAIRS if experts <= ops.PAIRWISE_MAX_EXPERTS else SORT
            faster = min((PAIRS, SORT), key=lambda name: harness.spread(seconds[name])[0])
            rows.append([str(experts), str(tokens), *_times(seconds), _ratio(seconds, REFERENCE, ours), ours, faster])
            cells.append({"experts": experts, "tokens": tokens, "seconds": seconds})
    return harness.table(rows), cells


def whole_table(args: argparse.Namespace) -> tuple[str, list[dict]]:
    rows, cells = [["E", "tokens", "plan", f"{FUSED}, ms", f"{PLAIN}, ms", "plain / one kernel"]], []
    for experts in args.whole_experts:
        for tokens in args.tokens:
            for ep_size in EP_SIZES:
                seconds = measure_whole(args, experts, tokens, ep_size)
                plan = f"ep_size {ep_size}" if ep_size else "-"
                rows.append([str(experts), str(tokens), plan, *_times(seconds), _ratio(seconds, PLAIN, FUSED)])
                cells.append({"experts": experts, "tokens": tokens, "ep_size": ep_size, "seconds": seconds})
    return harness.table(rows), cells


def _times(seconds: dict[str, list[float]]) -> list[str]:
    return [f"{1e3 * harness.spread(values)[0]:.2f}" for values in seconds.values()]


def _ratio(seconds: dict[str, list[float]], name: str, base: str) -> str:
    middle, low, high = harness.ratio(seconds, name, base)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="E of the first table")
    parser.add_argument("--whole_experts", type=int, nargs="+", default=[8, 16, 64], help="E of the second, even")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096], help="T")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="folder of routing.md and routing.json [benchmarks/results]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not uses_fused_routing(torch.zeros(1, device=args.device)):
        parser.error("there is no kernel for the second table: see docs/gpu.md, and unset LDMOLE_FUSED_ROUTING")
    sparsegen, cells = sparsegen_table(args)
    whole, whole_cells = whole_table(args)
    found = ", ".join(f"{k} {v}" for k, v in versions().items() if v != "not installed")
    command = f"python benchmarks/routing.py{harness.flags(args, parser.parse_args([]))}"
    markdown = (
        f"# Routing\n\nForward and backward of {PROJECTIONS} projections' logits, float32, one thread, medians of "
        f"{args.rounds} interleaved rounds. Reproduce: `{command}`.\n\n## Sparsegen\n\n{sparsegen}\n\n"
        "All variants but softmax were checked to agree.\n\n## All of an input group's routing\n\n"
        "From logits and lambda's logits to routing weights, statistics for losses and reports, and, where tokens "
        "travel, which ranks each visits; an eighth of the tokens is padding. In one kernel each way, and in plain "
        "operations.\n\n"
        f"{whole}\n\nBoth were checked to agree: weights, lambda, statistics, plan and gradients.\n\n"
        f"{harness.machine()}. {found}.\n"
    )
    values = {"machine": harness.machine(), "cells": cells, "whole": whole_cells}
    harness.write("routing", markdown, values, args.output)


if __name__ == "__main__":
    main()

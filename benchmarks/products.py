#!/usr/bin/env python
"""Products of float32 matrices on a CPU: PyTorch's choice of a library against oneDNN, in the shapes of a step.

    OMP_NUM_THREADS=2 python benchmarks/products.py

`ldmole_ds.ops.matrix_products` gives products to oneDNN where it is much faster; the table shows whether it is here.
Kinds of products, of T tokens through a layer D -> O with N = G E r + G E + H rows that read its input and R = E r rank
rows: the frozen layer forward and backward, the group's product with x, its gradients, and those with B.

The last column is the time of a first call in a shape, for which oneDNN makes a kernel, above that of the next.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import harness  # noqa: E402
import torch  # noqa: E402

from ldmole_ds.ops import matrix_products  # noqa: E402
from ldmole_ds.ops.matrix_products import ONEDNN, TORCH, MatrixProducts  # noqa: E402
from ldmole_ds.training.run_record import versions  # noqa: E402

NEW_SHAPES = 8


def products_of(
    tokens: int, in_features: int, out_features: int, rows: int, rank: int
) -> dict[str, tuple[float, Callable[[MatrixProducts], object]]]:
    """By kind: floating point operations, and how to compute it."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape) / 16

    x, weight, y = random(tokens, in_features), random(out_features, in_features), random(tokens, out_features)
    stacked, grad_rows, grad_x = random(rows, in_features), random(rows, tokens), random(tokens, in_features)
    weighted, lora_B, out = random(rank, tokens), random(rank, out_features), random(rank, tokens)
    large, wide, narrow = (
        2 * tokens * n for n in (in_features * out_features, rows * in_features, rank * out_features)
    )
    return {
        "frozen layer": (large, lambda p: p.linear(x, weight, None)),
        "frozen layer, backward": (large, lambda p: p.mm(y, weight)),
        "A, gate, lambda": (wide, lambda p: p.mm(stacked, x.t())),
        "gradient of them": (wide, lambda p: p.mm(grad_rows, x)),
        "added to that of x": (wide, lambda p: p.add_mm_(grad_x, grad_rows.t(), stacked)),
        "B, added": (narrow, lambda p: p.add_mm_(y, weighted.t(), lora_B)),
        "gradient of B": (narrow, lambda p: p.mm(weighted, y)),
        "gradient before B": (narrow, lambda p: p.mm(lora_B, y.t(), out=out)),
    }


def first_calls(tokens: int, in_features: int, out_features: int) -> float:
    """Seconds, median over new shapes, above the second call in each."""
    found, weight = [], torch.randn(out_features, in_features)
    for more in range(NEW_SHAPES):
        x, seconds = torch.randn(tokens + 1 + more, in_features), []
        for _ in range(2):
            begin = time.perf_counter()
            ONEDNN.linear(x, weight, None)
            seconds.append(time.perf_counter() - begin)
        found.append(seconds[0] - seconds[1])
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 4096], help="T")
    parser.add_argument("--layers", nargs="+", default=["576x1536", "576x192"], help="D x O of the frozen layers")
    parser.add_argument("--rows", type=int, default=208, help="N")
    parser.add_argument("--rank", type=int, default=64, help="E * r")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, help="folder of products.md and products.json [benchmarks/results]")
    args = parser.parse_args()
    if not matrix_products.is_here():
        parser.error("this PyTorch has no oneDNN: there is nothing to compare")
    torch.manual_seed(0)
    rows = [
        ["layer", "T", "product", "PyTorch, us", "oneDNN, us", "oneDNN / PyTorch", "GFLOPS of both", "new shape, us"]
    ]
    cells = []
    with torch.no_grad():
        for layer in args.layers:
            sizes = tuple(map(int, layer.split("x")))
            for tokens in args.tokens:
                new = first_calls(tokens, *sizes)
                for kind, (operations, run) in products_of(tokens, *sizes, args.rows, args.rank).items():
                    runs = {"PyTorch": functools.partial(run, TORCH), "oneDNN": functools.partial(run, ONEDNN)}
                    seconds = harness.interleaved(runs, args.rounds, warmup=3)
                    times = [harness.spread(values)[0] for values in seconds.values()]
                    ratio = "{:.2f} ({:.2f} to {:.2f})".format(*harness.ratio(seconds, "oneDNN", "PyTorch"))
                    speeds = " and ".join(f"{operations / t / 1e9:.0f}" for t in times)
                    row = [layer, str(tokens), kind, *(f"{1e6 * t:.0f}" for t in times), ratio, speeds]
                    rows.append([*row, f"{1e6 * new:.0f}" if kind == "frozen layer" else ""])
                    cells.append({"layer": layer, "tokens": tokens, "kind": kind, "seconds": seconds, "new_shape": new})
    chosen = "oneDNN" if matrix_products.multiplies("auto") else "PyTorch's library"
    library = "MKL" if torch.backends.mkl.is_available() else "another library than MKL"
    found = ", ".join(f"{k} {v}" for k, v in versions().items() if v != "not installed")
    command = f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/products.py"
    markdown = (
        f"# Products of matrices on a CPU\n\nfloat32, medians of {args.rounds} interleaved rounds; N {args.rows}, R "
        f"{args.rank}. PyTorch has {library}. From {matrix_products.FEWEST_TOKENS} tokens and "
        f"{matrix_products.FEWEST_VALUES} values of x on, `LDMOLE_CPU_PRODUCTS=auto` takes {chosen} here. Reproduce: "
        f"`{command}{harness.flags(args, parser.parse_args([]))}`.\n\n{harness.table(rows)}\n\n"
        f"{harness.machine()}. {found}.\n"
    )
    values = {"setting": {**vars(args), "output": None}, "machine": harness.machine(), "cells": cells, "chosen": chosen}
    harness.write("products", markdown, values, args.output)


if __name__ == "__main__":
    main()

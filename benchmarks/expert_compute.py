#!/usr/bin/env python
"""Dense-stacked against grouped expert products on one rank: what support makes of them, and what is chosen.

    python benchmarks/expert_compute.py                                      # one CPU core, about two minutes
    python benchmarks/expert_compute.py --device cuda --dtype bfloat16       # torch's grouped product, see below

dense      two products over all stacked experts, inactive ones with weight 0: `ldmole_ds.ops.lora_experts`
grouped    active (token, expert) pairs alone: `ldmole_ds.ops.grouped_experts`; on a GPU a plain version with torch's
           grouped product, which the package does not use

Shapes: T tokens, e experts of rank r, D in and O out features, k active experts of a token.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import harness  # noqa: E402
import torch  # noqa: E402
from peer_layers import grouped_mm  # noqa: E402
from torch import Tensor  # noqa: E402

from ldmole_ds.ops import lora_experts  # noqa: E402
from ldmole_ds.ops.expert_compute import choose_products  # noqa: E402
from ldmole_ds.ops.grouped_experts import GROUPED  # noqa: E402
from ldmole_ds.training.run_record import git_revision, versions  # noqa: E402

SUPPORTS, SCALING = [1, 2, 4, 8, 16], 2.0
# A cell counts for the choice where the better one is faster by this much.
GAP, SHARE = 1.2, 0.9


def dense_experts(x: Tensor, w: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """``(T, D), (T, 1, e), (1, e, r, D), (e, r, O) -> (T, O)``."""
    return lora_experts(x, w, lora_A, [lora_B], SCALING)


def grouped_experts(x: Tensor, w: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The same, only the active experts' products."""
    return lora_experts(x, w, lora_A, [lora_B], SCALING, GROUPED)


def plain_grouped_experts(x: Tensor, w: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The same in plain operations, with torch's grouped product on a GPU."""
    expert_N, token_N = (w[:, 0].t() != 0).nonzero(as_tuple=True)
    sizes = torch.bincount(expert_N, minlength=len(lora_B))
    h = grouped_mm(x.index_select(0, token_N), lora_A[0].transpose(1, 2), sizes)
    h = h * (w[token_N, 0, expert_N] * SCALING).unsqueeze(1)
    y = grouped_mm(h, lora_B, sizes)
    return torch.zeros_like(x[:, :1]).expand(-1, y.shape[1]).index_add(0, token_N, y)


def measure(args: argparse.Namespace) -> list[dict]:
    """Seconds of both, forward and backward, by tokens, experts and support, and what the package chooses."""
    found, d, o = [], args.in_features, args.out_features
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    on_cpu = device.type == "cpu"
    for e, r in (map(int, text.split("x")) for text in args.experts):
        for tokens, k in ((t, k) for t in args.tokens for k in SUPPORTS if k <= e):
            shapes = ((tokens, d), (1, e, r, d), (e, r, o))
            x, A, B = (torch.randn(*s, device=device, dtype=dtype) for s in shapes)
            active = torch.rand(tokens, e, device=device).topk(k, dim=1).indices
            w = torch.zeros(tokens, e, device=device).scatter(1, active, 1 / k).to(dtype).unsqueeze(1)
            leaves = [t.requires_grad_() for t in (x, w, A, B)]
            cotangent = torch.randn(tokens, o, device=device, dtype=dtype)
            dense = _step(dense_experts, leaves, cotangent)
            grouped = _step(grouped_experts if on_cpu else plain_grouped_experts, leaves, cotangent)
            _check(dense(), grouped(), w)
            rounds = 12 if e * r * tokens <= 1 << 20 else 6
            clock = time.process_time if on_cpu else time.perf_counter
            seconds = harness.interleaved({"dense": dense, "grouped": grouped}, rounds, warmup=1, clock=clock)
            found.append({"E": e, "r": r, "tokens": tokens, "k": k, "seconds": seconds, **_choice(w, A, B)})
    return found


def _choice(w: Tensor, lora_A: Tensor, lora_B: Tensor) -> dict:
    """What is chosen, and the least of the seconds that choosing takes."""
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        chosen = choose_products(w, lora_A, [lora_B])
        times.append(time.perf_counter() - begin)
    return {"chosen": "grouped" if chosen is GROUPED else "dense", "choosing": min(times)}


def _step(forward: Callable[..., Tensor], leaves: list[Tensor], cotangent: Tensor) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        y = forward(*leaves)
        y.backward(cotangent)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    return step


def _check(dense: list[Tensor], grouped: list[Tensor], w: Tensor) -> None:
    """Equal, but for the gradient of weights of 0, which grouped does not compute."""
    limit = 1e-4 if w.dtype == torch.float32 else 0.05
    for i, (a, b) in enumerate(zip(dense, grouped, strict=True)):
        a = a * (w != 0) if i == 2 else a
        assert (a - b).norm() < limit * a.norm(), f"dense and grouped differ in tensor {i}"


def judge(found: list[dict]) -> dict:
    """In how many cells with a gap the faster one is chosen."""
    clear = []
    for cell in found:
        relative = harness.ratio(cell["seconds"], "dense", "grouped")[0]
        if max(relative, 1 / relative) > GAP:
            clear.append(cell["chosen"] == ("grouped" if relative > 1 else "dense"))
    return {"cells": len(clear), "right": sum(clear), "passed": sum(clear) >= SHARE * len(clear)}


def cells_table(found: list[dict]) -> str:
    rows = [["experts x r", "tokens", "support", "dense ms", "grouped ms", "dense / grouped", "chosen"]]
    for cell in found:
        times = [f"{1e3 * harness.spread(cell['seconds'][name])[0]:.1f}" for name in ("dense", "grouped")]
        relative = harness.ratio(cell["seconds"], "dense", "grouped")
        ratio = f"{relative[0]:.2f} ({relative[1]:.2f} to {relative[2]:.2f})"
        sizes = [f"{cell['E']} x {cell['r']}", str(cell["tokens"]), str(cell["k"])]
        rows.append([*sizes, *times, ratio, cell["chosen"]])
    return harness.table(rows)


def report(args: argparse.Namespace, found: list[dict]) -> str:
    cpu = ", CPU time of one thread" if args.device == "cpu" else ""
    verdict, micro = judge(found), [1e6 * cell["choosing"] for cell in found]
    parts = [
        "# Dense-stacked and grouped expert products",
        f"One rank, D {args.in_features}, O {args.out_features}, {args.dtype}; forward and backward{cpu}. Reproduce: "
        f"`python benchmarks/expert_compute.py{harness.flags(args, parse([]))}`.",
        f"{harness.machine()}. {', '.join(f'{k} {v}' for k, v in versions().items())}.",
        cells_table(found),
        "Ratio above 1: grouped is faster; median (quartiles) over rounds. Chosen: what `LDMOLE_EXPERT_COMPUTE=auto` "
        f"does with such a batch. It is the faster one in {verdict['right']} of {verdict['cells']} cells where they "
        f"differ by more than 20 %. Choosing takes {min(micro):.0f} to {max(micro):.0f} us.",
    ]
    return "\n\n".join([*parts, ""])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--in_features", type=int, default=256, help="D")
    add("--out_features", type=int, default=256, help="O")
    add("--experts", nargs="+", default=["8x8", "16x16", "64x16", "128x32"], help="E x r of the cells")
    add("--tokens", nargs="+", type=int, default=[128, 1024], help="tokens of the cells")
    add("--output", type=Path, default=None, help="folder of expert_compute.md and .json [benchmarks/results]")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    torch.manual_seed(0)
    if args.device == "cpu":
        torch.set_num_threads(1)
    found = measure(args)
    values = {"setting": {k: v for k, v in vars(args).items() if k != "output"}, "machine": harness.machine()}
    values |= {"versions": versions(), "git_revision": git_revision(), "choice": judge(found), "cells": found}
    harness.write("expert_compute", report(args, found), values, args.output)


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Where what pays: one adapted layer under four layouts, by size of its experts and by tokens of a rank.

    python benchmarks/layer.py                                     # two gloo ranks, about eight minutes
    python benchmarks/layer.py --device cuda --dtype bfloat16 --ranks 8 --in_features 4096 --out_features 4096

ep 1 under ZeRO-2 and ZeRO-3, and expert parallelism over all ranks by weights and by tokens (`layouts.py` says what
each synchronises). Cells differ in E * r and in tokens per rank; the layouts take turns within each round, and a round
takes as long as the slowest rank. Memory is what the rank holds of the experts and the peak of a step above that. Then
what `--expert_dispatch auto` would pick in each cell. `expert_compute.py` has the experts' products alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import harness  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from expert_layers import SPARSEGEN, TOPK, Sizes, Weights, expert_group  # noqa: E402
from layouts import TOKENS, WEIGHTS, ZERO2, ZERO3, layout_step  # noqa: E402
from ranks import on_ranks  # noqa: E402

from ldmole_ds.distributed.dispatch_choice import Workload, choose_dispatch  # noqa: E402
from ldmole_ds.distributed.link import measure_link  # noqa: E402
from ldmole_ds.distributed.shared_memory import SWITCH  # noqa: E402
from ldmole_ds.training.run_record import git_revision, versions  # noqa: E402

LAYOUTS = [ZERO2, ZERO3, WEIGHTS, TOKENS]
# A cell counts for `auto` where the better of tokens and weights is faster by this much.
GAP, SHARE = 1.2, 0.9


def cells(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """E, r, tokens; the dearest last."""
    sizes = [tuple(map(int, text.split("x"))) for text in args.experts]
    return [(e, r, t) for e, r in sizes for t in args.tokens]


def measure(device: torch.device, args: argparse.Namespace) -> dict:
    """On a rank: the link, and of each cell the seconds by layout, the memory, and what auto picks."""
    topology, found = expert_group(), []
    link = measure_link(topology, device, getattr(torch, args.dtype).itemsize)
    for e, r, tokens in cells(args):
        dtype, k = getattr(torch, args.dtype), min(args.k, e)
        sizes = Sizes(tokens, args.in_features, args.out_features, e, r, k, dtype)
        weights = Weights.make(sizes, topology.rank, device)
        router = {"router": args.router, "lambda_hidden": args.lambda_hidden}
        steps = {name: layout_step(name, weights, sizes, topology, **router) for name in LAYOUTS}
        peaks = {name: harness.peak_of(step.run) for name, step in steps.items()}
        memory = {name: (step.held + peaks[name][0]) / 2**20 for name, step in steps.items()}
        took = torch.tensor([sum(seconds for _, seconds in peaks.values())], device=device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        rounds = max(args.least_rounds, min(args.rounds, int(args.seconds / took.item())))
        runs = {name: step.run for name, step in steps.items()}
        seconds = harness.interleaved(runs, rounds, warmup=1 if rounds > args.least_rounds else 0, before=dist.barrier)
        choice = choose_dispatch(
            Workload(tokens, active_experts=k, itemsize=dtype.itemsize),
            link,
            ep_size=topology.ep_size,
            num_experts=e,
            r=r,
            in_features=args.in_features,
            out_features=[args.out_features],
        )
        predicted = {"mode": choice.mode, TOKENS: choice.tokens_seconds, WEIGHTS: choice.weights_seconds}
        found.append({"E": e, "r": r, "tokens": tokens, "seconds": seconds, "memory": memory, "auto": predicted})
        if topology.rank == 0:
            print(cell_line(found[-1]), flush=True)
    return {"link": vars(link), "cells": found}


def merge(results: list[dict]) -> dict:
    """The slowest rank in each round, the largest memory."""
    merged = []
    for same in zip(*(r["cells"] for r in results), strict=True):
        seconds = {n: [max(t) for t in zip(*(c["seconds"][n] for c in same), strict=True)] for n in LAYOUTS}
        merged.append(
            {**same[0], "seconds": seconds, "memory": {n: max(c["memory"][n] for c in same) for n in LAYOUTS}}
        )
    return {"link": results[0]["link"], "cells": merged}


def middle(cell: dict, name: str) -> float:
    return harness.spread(cell["seconds"][name])[0]


def cell_line(cell: dict) -> str:
    times = ", ".join(f"{name} {1e3 * middle(cell, name):.1f} ms" for name in LAYOUTS)
    return f"E*r {cell['E'] * cell['r']}, {cell['tokens']} tokens: {times}; auto: {cell['auto']['mode']}"


def cells_table(found: list[dict]) -> str:
    rows = [["E * r", "tokens per rank", *(f"{n}: ms, MB" for n in LAYOUTS), "tokens / weights", "fastest", "auto"]]
    for cell in found:
        relative = harness.ratio(cell["seconds"], TOKENS, WEIGHTS)
        spreads = {n: [1e3 * v for v in harness.spread(cell["seconds"][n])] for n in LAYOUTS}
        rows.append(
            [
                f"{cell['E']} x {cell['r']}",
                str(cell["tokens"]),
                *(f"{s[0]:.1f} ({s[1]:.1f} to {s[2]:.1f}), {cell['memory'][n]:.0f}" for n, s in spreads.items()),
                f"{relative[0]:.2f} ({relative[1]:.2f} to {relative[2]:.2f})",
                min(LAYOUTS, key=lambda n: middle(cell, n)),
                cell["auto"]["mode"],
            ]
        )
    return harness.table(rows)


def judge(found: list[dict]) -> dict:
    """In how many cells with a gap auto picks the faster of tokens and weights."""
    clear = {}
    for i, cell in enumerate(found):
        relative = harness.ratio(cell["seconds"], TOKENS, WEIGHTS)[0]
        if max(relative, 1 / relative) > GAP:
            clear[i] = cell["auto"]["mode"] == (TOKENS if relative < 1 else WEIGHTS)
    return {"cells": len(clear), "right": sum(clear.values()), "passed": sum(clear.values()) >= SHARE * len(clear)}


def report(args: argparse.Namespace, result: dict) -> str:
    link, verdict = result["link"], judge(result["cells"])
    rounds = [len(cell["seconds"][TOKENS]) for cell in result["cells"]]
    learned = f"LD-MoLE's router with {args.k} experts a token on average (lambda hidden {args.lambda_hidden})"
    router = learned if args.router == SPARSEGEN else f"top-{args.k}"
    shared = os.environ.get(SWITCH, "auto")
    parts = [
        "# Where what pays",
        f"One adapted layer, D {args.in_features}, O {args.out_features}, {router}, {args.dtype}, {args.ranks} "
        f"ranks ({'NCCL' if args.device == 'cuda' else f'gloo, {SWITCH}={shared}, one thread each'}); "
        "forward, backward and gradient synchronisation, frozen layer included. Reproduce: "
        f"`python benchmarks/layer.py{harness.flags(args, parse([]))}`.",
        f"{harness.machine()}. {', '.join(f'{k} {v}' for k, v in versions().items())}.",
        cells_table(result["cells"]),
        f"Times: median (quartiles) over {min(rounds)} to {max(rounds)} rounds, slowest rank. Memory: experts held, "
        "and the peak of a step above.",
        f"`auto` (measured at the start: {', '.join(f'{k} {v:.3g}' for k, v in link.items())}) picks the faster of "
        f"tokens and weights in {verdict['right']} of {verdict['cells']} cells where they differ by more than 20 %.",
    ]
    return "\n\n".join([*parts, ""])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"], help="cpu: gloo ranks; cuda: NCCL, one GPU a rank")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--ranks", type=int, default=2, help="of the one EP group")
    add("--in_features", type=int, default=256, help="D")
    add("--out_features", type=int, default=256, help="O")
    add("--experts", nargs="+", default=["8x8", "64x16", "128x32", "256x64"], help="E x r of the cells")
    add("--tokens", nargs="+", type=int, default=[128, 1024, 8192], help="tokens of a rank of the cells")
    add("--k", type=int, default=4, help="experts of a token, on average")
    add(
        "--router",
        default=SPARSEGEN,
        choices=[SPARSEGEN, TOPK],
        help="LD-MoLE's, its lambda set to k; or a fixed top-k",
    )
    add("--lambda_hidden", type=int, default=256, help="of sparsegen")
    add("--rounds", type=int, default=15, help="most timed rounds of a cell")
    add("--least_rounds", type=int, default=3, help="fewest timed rounds of a cell")
    add("--seconds", type=float, default=15, help="aim of a cell between the two")
    add("--output", type=Path, default=None, help="folder of layer.md and layer.json [benchmarks/results]")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.device == "cpu":
        torch.set_num_threads(1)
    result = merge(on_ranks(measure, args.ranks, args.device, args))
    values = {"setting": {k: v for k, v in vars(args).items() if k != "output"}, "machine": harness.machine()}
    values |= {"versions": versions(), "git_revision": git_revision(), "auto": judge(result["cells"]), **result}
    harness.write("layer", report(args, result), values, args.output)


if __name__ == "__main__":
    main()

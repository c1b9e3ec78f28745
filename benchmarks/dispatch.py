#!/usr/bin/env python
"""One expert-parallel layer on the ranks of this machine, forward and backward: ours against its peers.

    python benchmarks/dispatch.py                                          # two CPU ranks of one thread each
    python benchmarks/dispatch.py --device cuda --dtype bfloat16 --ranks 8 --tokens 8192 --in_features 4096 ...

The frozen linear layer alone; this package's layer in both ways of dispatch; DeepSpeed's MoE layer (no dropping, from
the installed package); and a dropless dispatch by (token, expert) with grouped GEMM, as AutoEP and torchtitan do it,
written out in `peer_layers.py`. All have the same top-k routing and are first checked to give the same output and
gradients. Each takes its turn in every round; a round's time is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import harness  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from dispatch_report import name_of, plot, report  # noqa: E402
from expert_layers import Formulation, Sizes, Weights, expert_group  # noqa: E402
from peer_layers import FROZEN, TOKENS, WEIGHTS, formulations  # noqa: E402
from ranks import counting_bytes, on_ranks, within_slow_link  # noqa: E402
from traveling import plot_spans, spans_of_step  # noqa: E402

from ldmole_ds.training.run_record import git_revision, versions  # noqa: E402


def check_equal(layers: dict[str, Formulation], weights: Weights) -> dict[str, float]:
    """Largest norm-wise relative difference of output and gradients from ours in weights mode, by formulation.

    Raises:
        AssertionError: One is not the same layer.
    """
    found = {}
    for name, layer in layers.items():
        if name != FROZEN:
            y, grad_x = layer.step(weights.x, weights.cotangent)
            found[name] = {"y": y, "x": grad_x, **layer.gradients()}
    expected, limit = found[WEIGHTS], 1e-4 if weights.x.dtype == torch.float32 else 0.1
    worst = {
        name: max(((tensors[key] - value).norm() / value.norm()).item() for key, value in expected.items())
        for name, tensors in found.items()
    }
    assert all(value < limit for value in worst.values()), f"not the same layer: {worst}"
    return worst


def least_bytes(weights: Weights, sizes: Sizes, ranks: int, own: int) -> dict[str, float]:
    """Bytes that this rank must send in forward and backward together, by unit of dispatch, from the routing alone."""
    e, item = sizes.experts // ranks, weights.x.element_size()
    chosen = (weights.x.float() @ weights.gate.float().t()).topk(sizes.k, dim=1).indices // e
    pairs = (chosen.unsqueeze(-1) == torch.arange(ranks, device=chosen.device)).sum(1)
    pairs[:, own] = 0
    sent = torch.stack([(pairs > 0).sum(), pairs.sum()]).to(torch.float64)
    total = sent.clone()
    dist.all_reduce(total)
    # Tokens and their gradients leave this rank, results and theirs answer the tokens of others.
    row = sizes.in_features + sizes.out_features
    mean = total / ranks
    experts = sizes.experts * sizes.r * row * item
    return {
        "per (token, rank)": 2 * mean[0].item() * row * item,
        "per (token, expert)": 2 * mean[1].item() * row * item,
        "weights": 2 * (ranks - 1) / ranks * experts,
        "replicate (all-reduce)": 2 * (ranks - 1) / ranks * experts,
    }


def measure(device: torch.device, args: argparse.Namespace) -> dict:
    """On a rank: equality, bytes by direction, and seconds of each round."""
    topology = expert_group()
    sizes = Sizes(*sizes_of(args), getattr(torch, args.dtype))
    weights = Weights.make(sizes, topology.rank, device)
    layers = formulations(weights, sizes, topology)
    equality, sent = check_equal(layers, weights), {}
    for name, layer in layers.items():
        with counting_bytes() as counted:
            layer.step(weights.x, weights.cotangent)
        sent[name] = {way: sum(n for (d, _), n in counted.items() if d == way) for way in ("forward", "backward")}
    steps = {name: lambda layer=layer: layer.step(weights.x, weights.cotangent) for name, layer in layers.items()}
    seconds = harness.interleaved(steps, args.rounds, args.warmup, before=dist.barrier)
    # The least of three: other threads' buffers come and go.
    memory = {name: min(harness.peak_of(step)[0] for _ in range(3)) / 2**20 for name, step in steps.items()}
    spans = spans_of_step(layers[TOKENS], weights.x, weights.cotangent)
    return {
        "spans": spans,
        "memory": memory,
        "equality": equality,
        "bytes": sent,
        "least": least_bytes(weights, sizes, topology.ep_size, topology.ep_rank),
        "seconds": seconds,
    }


def sizes_of(args: argparse.Namespace) -> tuple[int, ...]:
    return args.tokens, args.in_features, args.out_features, args.experts, args.rank, args.k


def merge(results: list[dict]) -> dict:
    """One result of all ranks: the slowest in each round, the worst equality, the mean of the bytes sent."""
    names, ranks = results[0]["seconds"], len(results)
    return {
        "seconds": {n: [max(t) for t in zip(*(r["seconds"][n] for r in results), strict=True)] for n in names},
        "equality": {n: max(r["equality"][n] for r in results) for n in results[0]["equality"]},
        "bytes": {
            n: {way: sum(r["bytes"][n][way] for r in results) / ranks for way in ("forward", "backward")} for n in names
        },
        "memory": {n: max(r["memory"][n] for r in results) for n in names},
        "least": results[0]["least"],
        "spans": results[0]["spans"],
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"], help="cpu: gloo ranks; cuda: NCCL, one GPU a rank")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--ranks", type=int, default=2, help="of the one EP group")
    add("--tokens", type=int, default=1024, help="of a rank")
    add("--in_features", type=int, default=576, help="D")
    add("--out_features", type=int, default=576, help="O; DeepSpeed's layer takes part where it equals D")
    add("--experts", type=int, default=8, help="E, a multiple of the ranks")
    add("--rank", type=int, default=8, help="r of an expert")
    add("--k", type=int, default=4, help="experts of a token")
    add("--rounds", type=int, default=40, help="timed rounds, each with every layer once")
    add("--warmup", type=int, default=5, help="rounds before them")
    add(
        "--link", default="", help="slow the ranks' link down, as `tc netem` says it: 'delay 1ms rate 5gbit' (root, tc)"
    )
    add("--output", type=Path, default=None, help="folder of dispatch.md, .json and .png [benchmarks/results]")
    args = parser.parse_args(argv)
    if args.experts % args.ranks:
        parser.error(f"--experts {args.experts} is not a multiple of --ranks {args.ranks}")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    if args.link:
        within_slow_link(args.link)
    if args.device == "cpu":
        torch.set_num_threads(1)
    result = merge(on_ranks(measure, args.ranks, args.device, args))
    values = {"setting": {k: v for k, v in vars(args).items() if k != "output"}, "machine": harness.machine()}
    values |= {"versions": versions(), "git_revision": git_revision(), **result}
    folder, name = args.output or harness.RESULTS, name_of(args)
    harness.write(name, report(args, result, harness.flags(args, parse([]))), values, folder)
    plot(result, folder / f"{name}.png")
    plot_spans(result["spans"], folder / f"{name}_trace.png")


if __name__ == "__main__":
    main()

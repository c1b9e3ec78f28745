"""The report of `dispatch.py`: a page with tables, and a plot. ``args`` is what `dispatch.parse` returns."""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
from peer_layers import AT_ONCE, BACKEND, DEEPSPEED, PER_EXPERT, TOKENS, WEIGHTS

from ldmole_ds.training.run_record import versions

# Ours in tokens mode must be at least so many times faster than the peer, and send so many times fewer bytes.
BARS = {DEEPSPEED: (1.8, 2.0), PER_EXPERT: (1.0, None)}

_SHARED = (
    "Ours exchanges through memory that the ranks share, but in the row that says otherwise; the peers through gloo."
)


def times_table(result: dict) -> str:
    seconds, sent = result["seconds"], result["bytes"]
    head = ["layer", "ms: median (quartiles)", "it / ours, tokens", "bar"]
    rows = [[*head, "MB sent forward", "backward", "bytes / ours", "peak MB"]]
    ours = sum(sent[TOKENS].values())
    for name, values in seconds.items():
        middle, low, high = (1e3 * v for v in harness.spread(values))
        relative, (time_bar, bytes_bar) = harness.ratio(seconds, name, TOKENS), BARS.get(name, (None, None))
        bars = [f"{bar:g} x {what}" for bar, what in ((time_bar, "time"), (bytes_bar, "bytes")) if bar]
        rows.append(
            [
                name,
                f"{middle:.1f} ({low:.1f} to {high:.1f})",
                "" if name == TOKENS else f"{relative[0]:.2f} ({relative[1]:.2f} to {relative[2]:.2f})",
                ", ".join(bars),
                *(f"{sent[name][way] / 1e6:.2f}" for way in ("forward", "backward")),
                f"{sum(sent[name].values()) / ours:.2f}",
                f"{result['memory'][name]:.0f}",
            ]
        )
    return harness.table(rows)


def report(args: argparse.Namespace, result: dict, flags: str) -> str:
    """``flags`` are those of the command line."""
    least = [["unit", "least MB, both directions"]]
    least += [[unit, f"{value / 1e6:.2f}"] for unit, value in result["least"].items()]
    peers = {k: v for k, v in result["equality"].items() if k != WEIGHTS}
    return "\n\n".join(
        [
            "# One expert-parallel layer",
            f"{args.ranks} ranks ({'NCCL' if args.device == 'cuda' else 'gloo, one thread each'}), "
            f"{args.tokens} tokens a rank, D {args.in_features}, O {args.out_features}, E {args.experts}, "
            f"r {args.rank}, top-{args.k}; "
            f"{args.dtype}; forward and backward with all gradients, frozen layer included; {args.rounds} rounds"
            f"{f'; link: {args.link}' if args.link else ''}. "
            f"Reproduce: `python benchmarks/dispatch.py{flags}`.",
            f"{harness.machine()}. {', '.join(f'{k} {v}' for k, v in versions().items())}.",
            times_table(result),
            *[_SHARED] * (BACKEND in result["seconds"]),
            "Ratios are medians over rounds of the ratio within a round (quartiles). Bytes are those sent to other "
            "ranks, measured, mean over ranks. Peak memory of a step is above what is held before it.",
            harness.table(least),
            "What a rank must send at least with this routing: token and result, and the gradients of both; the "
            "weights and their gradients; the gradients of replicated experts.",
            "Same layer: output and every gradient within "
            + ", ".join(f"{value:.0e} ({name})" for name, value in peers.items())
            + " of ours in weights mode (norm-wise, worst tensor).",
            f"Overlap: without it ours takes {harness.ratio(result['seconds'], AT_ONCE, TOKENS)[0]:.2f} x as long. The "
            "trace of one step:",
            f"![times]({name_of(args)}.png)",
            f"![trace]({name_of(args)}_trace.png)",
            "",
        ]
    )


def name_of(args: argparse.Namespace) -> str:
    """Of the files written."""
    return "dispatch_slow_link" if args.link else "dispatch"


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = sorted(result["seconds"], key=lambda name: harness.spread(result["seconds"][name])[0])
    spreads = [[1e3 * v for v in harness.spread(result["seconds"][name])] for name in order]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 2.6), sharey=True, layout="constrained")
    errors = [[m - low for m, low, _ in spreads], [high - m for m, _, high in spreads]]
    left.barh(order, [m for m, _, _ in spreads], xerr=errors, color=["#c44" if n == TOKENS else "#89a" for n in order])
    left.set_xlabel("forward and backward, ms")
    for way, start in (("forward", None), ("backward", "forward")):
        offsets = [result["bytes"][n][start] / 1e6 if start else 0 for n in order]
        right.barh(order, [result["bytes"][n][way] / 1e6 for n in order], left=offsets, label=way)
    right.set_xlabel("sent by a rank, MB")
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)

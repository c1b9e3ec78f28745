"""The end of a run: what came out, what moved between ranks, where the adapter is, what to type next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from ldmole_ds.model import LDMoLEModel
from ldmole_ds.training.memory import peak_memory_bytes


def gather_rank_facts(model: LDMoLEModel) -> list[dict[str, Any]]:
    """Per rank: experts held, exchange calls, tokens and bytes sent, peak memory. Collective."""
    stats, experts = model.comm_stats, model.topology.local_experts(model.adapter_config.num_experts)
    facts = {
        "rank": model.topology.rank,
        "experts": [experts.start, experts.stop - 1],
        "calls": stats.total_calls,
        "calls_by_phase": dict(stats.calls),
        "tokens_sent": stats.rows["dispatch"],
        "bytes_sent": stats.total_bytes,
        "bytes_by_phase": dict(stats.bytes),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if model.topology.world_size == 1:
        return [facts]
    gathered: list[Any] = [None] * model.topology.world_size
    dist.all_gather_object(gathered, facts)
    return gathered


def _count(value: float, unit: str = "") -> str:
    """A number with three digits and a prefix: ``21.3 M``, ``3.11 GB``."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def format_report(report: dict[str, Any]) -> str:
    """The report as a block of aligned lines."""
    ranks = report["ranks"]
    lines = [
        ("trained", f"{report['steps']} steps in {report['seconds']:.0f} s, {report['tokens_per_second']:.0f} tokens/s")
    ]
    before, after = report["accuracy_before"], report["accuracy_after"]
    if after is not None:
        lines.append(
            ("held-out accuracy", f"{_percent(before)} before -> {after:.3f} after ({report['eval_rows']} rows)")
        )
    if report["perplexity_after"] is not None:
        before, after = report["perplexity_before"], report["perplexity_after"]
        of = f"{_count(report['eval_rows'])} documents"
        lines.append(("held-out perplexity", f"{_percent(before)} before -> {after:.3f} after ({of})"))
    if report["accuracy_by_task"]:
        of_tasks = ", ".join(f"{name} {value:.3f}" for name, value in report["accuracy_by_task"].items())
        lines.append(("mean of", of_tasks))
    routing = report["routing"]
    if routing:
        lines.append(("experts per token", f"{routing['experts_per_token']:.2f} of {report['num_experts']}"))
        if routing.get("hidden_units"):
            lines.append(
                (
                    "lambda",
                    f"mean {routing['lambda_mean']:.3f}, spread over tokens {routing['lambda_std']:.3f}, live hidden "
                    f"units {routing['live_hidden_units']:.0f} of {routing['hidden_units']:.0f} (mean over groups)",
                )
            )
    parameters = report["parameters"]
    lines.append(
        (
            "parameters",
            f"{_count(parameters['trainable'])} trainable in all, {_count(parameters['trainable_on_this_rank'])} on "
            f"each rank, {_count(parameters['base'])} frozen",
        )
    )
    for facts in ranks:
        first, last = facts["experts"]
        moved = "nothing sent" if not facts["calls"] else (
            f"{facts['calls']} all-to-all calls, {_count(facts['tokens_sent'])} tokens and "
            f"{_count(facts['bytes_sent'], 'B')} sent"
        )  # fmt: skip
        lines.append(
            (
                f"rank {facts['rank']}",
                f"experts {first}-{last} ({last - first + 1} of {report['num_experts']}), {moved}, "
                f"peak memory {_count(facts['peak_memory_bytes'], 'B')}",
            )
        )
    if report["hint"]:
        lines.append(("note", report["hint"]))
    lines.append(("adapter", report["adapter"]))
    lines.append(("next", report["next_command"]))
    width = max(len(name) for name, _ in lines)
    rule = "-" * 100
    return "\n".join(["", rule, *(f"{name:<{width}}  {text}" for name, text in lines), rule])


def layout_hint(model: LDMoLEModel) -> str | None:
    """How to see experts partitioned, when they were not."""
    if model.topology.ep_size > 1 or model.adapter_config.router == "lora":
        return None
    if model.topology.world_size > 1:
        flags = "--ep_size 2 --deepspeed ds_configs/zero2.json"
        return f"experts were replicated (ep_size 1): `{flags}` partitions them over ranks"
    return "one rank held all experts: start with `deepspeed --num_gpus 2 ...` to see them partitioned over two"


def plot_curves(log_history: list[dict], path: Path) -> None:
    """Loss, auxiliary losses, experts per token, lambda and held-out accuracy over steps, as one PNG.

    A run shorter than its logging interval, without held-out rows, has nothing to plot: no file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("cross-entropy", [("cross_entropy_loss", "training"), ("eval_loss", "held out")]),
        ("auxiliary losses", [("sparsity_loss", "sparsity"), ("load_balancing_loss", "load balancing")]),
        ("experts per token", [("experts_per_token", "mean experts per token")]),
        ("lambda", [("lambda_mean", "mean"), ("lambda_std", "spread over tokens")]),
        ("held-out accuracy", [("eval_accuracy", "accuracy")]),
    )
    panels = [(t, s) for t, s in panels if any(key in row for row in log_history for key, _ in s)]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.0), squeeze=False)
    for axis, (title, series) in zip(axes[0], panels, strict=True):
        for key, label in series:
            points = [(row["step"], row[key]) for row in log_history if key in row]
            if points:
                # Two points are a before and an after, not a course.
                style = "--" if len(points) == 2 else "-"
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linestyle=style, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)

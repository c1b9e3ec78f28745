"""The comparison as Markdown."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ldmole_ds.compare.plan import RUN_DEFAULTS, Plan, as_argv
from ldmole_ds.compare.statistics import SIGNAL_STANDARD_ERRORS

_HEAD = ["method", "lr", "accuracy (each seed)", "against plain LoRA", "experts per token", "lambda: mean, spread",
         "MFLOP per token", "tokens/s", "memory", "trainable"]  # fmt: skip


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def method_row(figures: dict[str, Any]) -> list[str]:
    """One method's row."""
    each = ", ".join(f"{a:.3f}" for a in figures["accuracies"])
    spread = "" if figures["accuracy_spread"] is None else f" ± {figures['accuracy_spread']:.3f}"
    difference = figures["difference"]
    lam = figures["lambda_mean"], figures["lambda_std"]
    return [
        figures["label"],
        f"{figures['learning_rate']:g}",
        f"{figures['accuracy']:.3f}{spread} ({each})",
        "-" if difference is None else f"{difference:+.3f} ± {figures['difference_error']:.3f}",
        f"{figures['experts_per_token']:.2f} of {figures['num_experts']}",
        "-" if lam[0] is None else f"{lam[0]:.2f}, {lam[1] or 0:.2f}",
        f"{figures['flops_per_token'] / 1e6:.4g}",
        f"{figures['tokens_per_second']:.0f}",
        f"{figures['memory_bytes'] / 1e9:.2f} GB",
        f"{figures['trainable'] / 1e6:.2f} M",
    ]


def no_signal_table(tasks: dict[str, Any]) -> str:
    """The tasks that plain LoRA did not learn, with their figures."""
    rows = [["task", "plain LoRA", "chance", "standard errors above chance", "test rows"]]
    for name, entry in tasks.items():
        s = entry["signal"]
        above = f"{s['standard_errors_above_chance']:.1f}"
        rows.append([name, f"{s['accuracy']:.3f}", f"{s['chance']:.3f}", above, str(s["rows"])])
    return markdown_table(rows)


def report_text(
    plan: Plan, results: dict[str, Any], *, command: str, hardware: str, missing: int, plots: list[Path]
) -> str:
    """The whole page.

    Args:
        plan: What was compared.
        results: Of `collect`.
        command: That repeats it.
        hardware: In words.
        missing: Cells that are not done.
        plots: By task with signal, files beside the page.
    """
    title = f"Sweep of {plan.sweep}" if plan.sweep else "Methods under one budget"
    parts = [f"# {title}", _introduction(plan)]
    if missing:
        parts.append(f"**Incomplete:** {missing} runs are not done or failed; the same command runs them.")
    shown = {name: entry for name, entry in results["tasks"].items() if entry["methods"]}
    images = {path.stem.rpartition(".")[2]: path for path in plots}
    for name, entry in shown.items():
        methods, s = entry["methods"], entry["signal"]
        first = next(iter(methods.values()))
        parts += [f"## {name}", f"{s['rows']} test rows; chance {s['chance']:.3f}."]
        parts.append(markdown_table([_HEAD, *map(method_row, methods.values())]))
        if first["selection"]:
            rates = list(first["selection"])
            rows = [[m["label"], *(f"{m['selection'][r]:.3f}" for r in rates)] for m in methods.values()]
            parts += ["Accuracy on the rows that choose the learning rate (first seed):"]
            parts.append(markdown_table([["method", *(f"lr {rate}" for rate in rates)], *rows]))
        if name in images:
            parts.append(f"![{name}]({images[name].name})")
    silent = {n: e for n, e in results["tasks"].items() if e["signal"] is not None and not e["signal"]["found"]}
    if silent:
        parts += [
            "## No signal",
            f"Plain LoRA is less than {SIGNAL_STANDARD_ERRORS:g} standard errors above chance in this budget, so that "
            "nothing more was run on these tasks:",
            no_signal_table(silent),
        ]
    waiting = [n for n, e in results["tasks"].items() if e["signal"] is None]
    if waiting:
        parts.append(f"Plain LoRA has not run yet on {', '.join(waiting)}.")
    parts += ["## Setting", f"`{command}`", setting_text(plan), _measured(), f"Hardware: {hardware}."]
    found = "; ".join(", ".join(f"{name} {version}" for name, version in row) for row in results["versions"])
    parts.append(f"Versions: {found}. Code: {', '.join(results['git_revisions'])}.")
    return "\n\n".join(parts) + "\n"


def _introduction(plan: Plan) -> str:
    seeds = ", ".join(map(str, plan.seeds))
    rate = (
        f"each takes the best of {len(plan.learning_rates)} learning rates on up to {plan.selection_rows} rows that "
        "are not reported, chosen with the first seed"
        if plan.selects
        else f"all with learning rate {plan.learning_rates[0]:g}"
    )
    return (
        f"Same rows, steps and batch for all, seeds {seeds}; {rate}. A seed sets the adapter's start and the order of "
        "rows, for all methods alike. Test rows are measured once, after training."
    )


def setting_text(plan: Plan) -> str:
    """Flags of launch/train.py, and what each method changes."""
    flags = {k: v for k, v in {**RUN_DEFAULTS, **plan.flags}.items() if k not in ("data_dir", "report_to")}
    lines = [f"All runs of `launch/train.py`: `{' '.join(as_argv(flags))}`", ""]
    for method in plan.methods:
        own = " ".join(as_argv(method.settings))
        lines.append(f"- {method.label} (`{method.name}`): " + (f"`{own}`" if own else "no other flag"))
    return "\n".join(lines)


def _measured() -> str:
    memory = (
        "the accelerator's peak allocation in training"
        if torch.cuda.is_available()
        else "the process's peak resident size in training, above its size before the model was loaded"
    )
    return (
        "Accuracy: mean ± standard deviation over seeds. Against plain LoRA: mean difference over the same seeds and "
        "rows ± its standard error, seeds and rows both taken as samples. Experts per token and lambda: mean over "
        "projections on held-out rows, lambda's spread is over tokens. MFLOP per token: counted operations of forward "
        "and backward in training, 10^6; experts that a token does not use cost nothing. "
        f"Memory: {memory}. tokens/s: of training, padding not counted."
    )


def hardware_text(parallel: int, threads: int) -> str:
    """This machine, and how runs shared it."""
    if torch.cuda.is_available():
        device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        device = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    return f"{device}; runs at a time: {parallel}, threads of each: {threads}"

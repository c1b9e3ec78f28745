"""What a comparison leaves in its folder: compare.md, compare.json, and a plot for each task with signal."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldmole_ds.compare.cell import write_atomically
from ldmole_ds.compare.plan import Plan, chosen_rate, task_signal
from ldmole_ds.compare.plot import plot_methods, plot_sweep
from ldmole_ds.compare.results import collect
from ldmole_ds.compare.table import hardware_text, report_text


def write_outputs(plan: Plan, argv: list[str], parallel: int, threads: int) -> Path:
    """Write all three from what is done so far.

    Args:
        plan: What was compared.
        argv: The command line, without the program's name.
        parallel: Runs at a time.
        threads: Of each.

    Returns:
        The Markdown page.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    results, plots = collect(plan), []
    for name, entry in results["tasks"].items():
        if entry["methods"]:
            path = plan.folder / f"compare.{name}.png"
            if plan.sweep:
                plot_sweep(entry["methods"], plan.sweep, f"{name}: LD-MoLE over {plan.sweep}", path)
            else:
                plot_methods(entry["methods"], f"{name}: test accuracy against cost", path)
            plots.append(path)
    hardware = hardware_text(parallel, threads)
    setting: dict[str, Any] = {
        "flags": plan.flags, "methods": [asdict(method) for method in plan.methods], "seeds": plan.seeds,
        "learning_rates": plan.learning_rates, "selection_rows": plan.selection_rows, "test_rows": plan.test_rows,
        "launcher": plan.launcher[1:] and plan.launcher, "sweep": plan.sweep, "hardware": hardware,
    }  # fmt: skip
    write_atomically(plan.folder / "compare.json", {"setting": setting, **results})
    page = plan.folder / "compare.md"
    missing = unfinished(plan)
    facts = {"command": repeat_command(argv), "hardware": hardware, "missing": missing, "plots": plots}
    page.write_text(report_text(plan, results, **facts), encoding="utf-8")
    return page


def repeat_command(argv: list[str]) -> str:
    """What to type for the same comparison, wherever its folder is."""
    words = [word for word in argv if word != "--tables_only" and not word.startswith("--output_dir=")]
    if "--output_dir" in words:
        place = words.index("--output_dir")
        del words[place : place + 2]
    return shlex.join(["python", "launch/compare.py", *words])


def unfinished(plan: Plan) -> int:
    """Cells that still have to run, as far as that is known: none for tasks without signal."""
    count = 0
    for task in plan.tasks:
        found = task_signal(plan, task)
        methods = plan.methods if found is None or found.found else ()
        for method in methods:
            rate, _ = chosen_rate(plan, task, method)
            cells = plan.selection(task, method)
            count += sum(cell.result() is None for cell in cells)
            finals = plan.finals(task, method, rate).values() if rate is not None else ()
            count += sum(cell.result() is None for _, cell in finals) if finals else len(plan.seeds)
    return count


def list_cells(plan: Plan) -> str:
    """The commands of a comparison, those that are done marked; of several rates, finals show the first."""
    lines = []
    for task in plan.tasks:
        for method in plan.methods:
            rate = chosen_rate(plan, task, method)[0] or plan.learning_rates[0]
            finals = [cell for _, cell in plan.finals(task, method, rate).values()]
            for cell in [*plan.selection(task, method), *finals]:
                mark = "done " if cell.result() is not None else "to do"
                lines.append(f"{mark}  {cell.title}\n       {shlex.join(cell.command)}")
    return "\n".join(lines)

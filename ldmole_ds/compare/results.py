"""From the records of cells to figures by task and method."""

from __future__ import annotations

import statistics as stats
from dataclasses import asdict
from typing import Any

from ldmole_ds.compare.methods import Method
from ldmole_ds.compare.plan import Plan, answers_of, chosen_rate, task_signal
from ldmole_ds.compare.statistics import mean_and_spread, paired_difference
from ldmole_ds.tasks import Task


def collect(plan: Plan) -> dict[str, Any]:
    """What the finished cells say.

    Returns:
        By task: ``signal`` (None: not known yet) and, where there is signal, ``methods``, see `method_figures`; and
        ``versions``, ``git_revisions``, of all cells.
    """
    tasks: dict[str, Any] = {}
    for task in plan.tasks:
        found = task_signal(plan, task)
        entry: dict[str, Any] = {"signal": None, "methods": {}}
        if found is not None:
            above = found.standard_errors_above_chance
            entry["signal"] = {**asdict(found), "standard_errors_above_chance": above, "found": found.found}
        if found is not None and found.found:
            baseline = right_answers(plan, task, plan.methods[0])
            for method in plan.methods:
                figures = method_figures(plan, task, method, baseline)
                if figures is not None:
                    entry["methods"][method.name] = figures
        tasks[task.name] = entry
    records = [record for cell in plan.possible_cells() if (record := cell.result()) is not None]
    return {
        "tasks": tasks,
        "versions": sorted({tuple(sorted(record["versions"].items())) for record in records}),
        "git_revisions": sorted({record["git_revision"] or "no checkout" for record in records}),
    }


def right_answers(plan: Plan, task: Task, method: Method) -> dict[int, list[bool]]:
    """By seed that is done: which test rows were answered right."""
    rate, _ = chosen_rate(plan, task, method)
    if rate is None:
        return {}
    results = {seed: answers.result() for seed, (_, answers) in plan.finals(task, method, rate).items()}
    found = {seed: answers_of(result) for seed, result in results.items() if result is not None}
    return {seed: [a == g for a, g in zip(f["answers"], f["gold"], strict=True)] for seed, f in found.items()}


def method_figures(plan: Plan, task: Task, method: Method, baseline: dict[int, list[bool]]) -> dict[str, Any] | None:
    """A method's figures on a task, None while no seed is done.

    Returns:
        ``label``, ``settings``, ``learning_rate``, ``selection`` (rate to accuracy), ``seeds``, ``accuracies``,
        ``accuracy``, ``accuracy_spread``, ``difference`` and ``difference_error`` (to plain LoRA, over common seeds;
        None for itself), ``experts_per_token``, ``lambda_mean``, ``lambda_std``, ``flops_per_token``,
        ``tokens_per_second``, ``memory_bytes``, ``trainable``.
    """
    rate, selection = chosen_rate(plan, task, method)
    right = right_answers(plan, task, method)
    if not right:
        return None
    accuracies = [sum(rows) / len(rows) for rows in right.values()]
    mean, spread = mean_and_spread(accuracies)
    common = sorted(right.keys() & baseline.keys())
    difference = error = None
    if common and method.name != plan.methods[0].name:
        difference, error = paired_difference([right[s] for s in common], [baseline[s] for s in common])
    cells = plan.finals(task, method, rate)
    reports = [cells[seed][0].result()["report"] for seed in right]
    routing = [report["routing"] for report in reports]

    def average(name: str) -> float | None:
        values = [row[name] for row in routing if row.get(name) is not None]
        return stats.fmean(values) if values else None

    return {
        "label": method.label,
        "settings": method.settings,
        "learning_rate": rate,
        "selection": {f"{r:g}": accuracy for r, accuracy in selection.items()},
        "seeds": list(right),
        "accuracies": accuracies,
        "accuracy": mean,
        "accuracy_spread": spread,
        "difference": difference,
        "difference_error": error,
        # Plain LoRA has no router to record anything: its one expert serves every token.
        "experts_per_token": average("experts_per_token") or 1.0,
        "num_experts": reports[0]["num_experts"],
        "lambda_mean": average("lambda_mean"),
        "lambda_std": average("lambda_std"),
        "flops_per_token": stats.fmean(report["flops_per_token"] for report in reports),
        "tokens_per_second": stats.median(report["tokens_per_second"] for report in reports),
        "memory_bytes": max(report["training_memory_bytes"] for report in reports),
        "trainable": reports[0]["parameters"]["trainable"],
    }

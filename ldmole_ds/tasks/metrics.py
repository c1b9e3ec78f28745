"""What is measured on answers: accuracy with its interval, and Matthews correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ldmole_ds.tasks.benchmarks import TASKS

Z_95 = 1.959963984540054


def wilson_interval(correct: int, rows: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share: sensible for few rows and for shares near 0 and 1 (Wilson 1927).

    Args:
        correct: Right answers.
        rows: Answers, at least 1.
        z: Quantile of the normal distribution; the default gives 95%.

    Returns:
        Lower and upper end.
    """
    share, spread = correct / rows, z * z / rows
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / rows + spread / (4 * rows))
    return max(0.0, centre - half), min(1.0, centre + half)


def matthews_correlation(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """Correlation of two classes' predictions with the truth, GLUE's metric for CoLA (Matthews 1975).

    Args:
        predicted: Of 0 and 1.
        gold: Of 0 and 1, as many.

    Returns:
        -1 to 1; 0 where either has one class only.
    """
    predicted, gold = np.asarray(predicted), np.asarray(gold)
    tp, tn = (int(np.sum((predicted == c) & (gold == c))) for c in (1, 0))
    fp, fn = (int(np.sum((predicted == c) & (gold != c))) for c in (1, 0))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


METRICS = {"matthews_correlation": matthews_correlation}
"""Beside accuracy, by the name that a task gives."""


def task_metrics(tasks: Sequence[str], predicted: Sequence[int], gold: Sequence[int]) -> dict[str, float]:
    """Accuracy, its standard error and a task's own metric, by task where there are several, and their mean.

    The mean over tasks weighs every task alike, as the paper's averages do.

    Args:
        tasks: The task of each row, empty for rows of one's own.
        predicted: Index of the option that each row's scores prefer.
        gold: Index of the right one.
    """
    tasks, predicted, gold = np.asarray(tasks), np.asarray(predicted), np.asarray(gold)
    names = sorted(set(tasks.tolist()))
    accuracies, variances, results = [], [], {}
    for name in names:
        mine = tasks == name
        accuracy, suffix = float(np.mean(predicted[mine] == gold[mine])), f"_{name}" if len(names) > 1 else ""
        accuracies.append(accuracy)
        variances.append(accuracy * (1 - accuracy) / int(mine.sum()))
        if suffix:
            results[f"accuracy{suffix}"] = accuracy
        metric = TASKS[name].metric if name else None
        if metric:
            results[f"{metric}{suffix}"] = METRICS[metric](predicted[mine], gold[mine])
    mean = {"accuracy": float(np.mean(accuracies)), "accuracy_stderr": math.sqrt(sum(variances)) / len(names)}
    return {**mean, **results}

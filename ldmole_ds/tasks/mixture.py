"""Several tasks as one training set: an order of rows that depends on nothing but the tasks and their weights.

No row is left out. One epoch takes every row of the task that is largest for its weight once, and rows of the other
tasks as often as the weights ask for, from the first row on. Tasks alternate evenly along the epoch, which the
Trainer then shuffles by its seed; neither depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from ldmole_ds.tasks.rows import DataError


def mixture_weights(mixture: str, sizes: Sequence[int]) -> list[float]:
    """What share of the epoch each task gets, up to a common factor.

    Args:
        mixture: ``size``: as many rows as each task has. ``equal``: the same number of every task. ``w1:w2:...``: so
            much of each.
        sizes: Rows of each task.

    Raises:
        DataError: None of these, another number of weights than of tasks, or a weight that is not positive.
    """
    if mixture == "size":
        return [float(size) for size in sizes]
    if mixture == "equal":
        return [1.0] * len(sizes)
    try:
        weights = [float(part) for part in mixture.split(":")]
    except ValueError:
        weights = []
    if len(weights) != len(sizes) or not all(0 < weight < float("inf") for weight in weights):
        raise DataError(
            f"--mixture {mixture!r} does not fit {len(sizes)} tasks: give equal, size, or a positive number for each, "
            f"such as {':'.join(map(str, range(1, len(sizes) + 1)))}"
        )
    return weights


def mixture_order(sizes: Sequence[int], weights: Sequence[float]) -> list[tuple[int, int]]:
    """One epoch as (task, row) pairs.

    Args:
        sizes: Rows of each task, at least 1.
        weights: Share of each task, positive.
    """
    scale = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    counts = [max(size, round(scale * weight)) for size, weight in zip(sizes, weights, strict=True)]
    # The n-th of a task's rows stands at (n + 1/2) / count of the epoch.
    places = [((n + 0.5) / count, task, n % sizes[task]) for task, count in enumerate(counts) for n in range(count)]
    return [(task, row) for _, task, row in sorted(places)]

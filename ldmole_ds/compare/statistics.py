"""What accuracies amount to: mean and spread, a paired difference with its uncertainty, and whether there is signal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SIGNAL_STANDARD_ERRORS = 3.0


def mean_and_spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; of one value there is no spread."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_difference(ours: list[list[bool]], theirs: list[list[bool]]) -> tuple[float, float]:
    """Difference of two methods' accuracies over the same seeds and rows, and its standard error.

    Seeds and rows are both samples: other seeds and other test rows would have given other figures. With d_si the
    difference in seed s of S and row i of N, the variance of its mean is

        var_s(mean_i d) / S + var_i(mean_s d) / N - residual / (S N)

    where the last term, the variance that neither seeds nor rows explain, is in both others (two crossed random
    factors). It is never taken to be less than the larger of the first two. One seed leaves the rows' part alone.

    Args:
        ours, theirs: ``[S][N]`` whether each row was answered right.

    Returns:
        Difference and standard error, as shares of rows.

    Raises:
        ValueError: Seeds or rows differ in number.
    """
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"a paired difference needs the same seeds and rows, got {a.shape} and {b.shape}")
    d_SN = a - b
    S, N = d_SN.shape
    of_seeds, of_rows, mean = d_SN.mean(1), d_SN.mean(0), float(d_SN.mean())
    rows = of_rows.var(ddof=1) / N if N > 1 else 0.0
    if S == 1:
        return mean, math.sqrt(rows)
    seeds = of_seeds.var(ddof=1) / S
    residual = d_SN - of_seeds[:, None] - of_rows[None, :] + mean
    both = (residual**2).sum() / ((S - 1) * max(N - 1, 1)) / (S * N)
    return mean, math.sqrt(max(seeds + rows - both, seeds, rows))


@dataclass(frozen=True)
class Signal:
    """Whether plain LoRA learns anything on a task in this budget.

    Attributes:
        accuracy: Of plain LoRA with the first seed.
        rows: Test rows.
        chance: What needs no question: guessing, or always the most frequent answer, whichever is better.
        standard_error: Of an accuracy at chance.
    """

    accuracy: float
    rows: int
    chance: float

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.chance * (1 - self.chance) / self.rows)

    @property
    def standard_errors_above_chance(self) -> float:
        """How far above chance, in standard errors."""
        return (self.accuracy - self.chance) / max(self.standard_error, 1e-12)

    @property
    def found(self) -> bool:
        """Whether it beats chance by three standard errors."""
        return self.standard_errors_above_chance >= SIGNAL_STANDARD_ERRORS


def signal(answers: list[int], gold: list[int], chance: float) -> Signal:
    """The signal in plain LoRA's answers.

    Args:
        answers: Index of the chosen option, by row.
        gold: Index of the right one.
        chance: Mean of 1 / (number of options).
    """
    right = sum(a == g for a, g in zip(answers, gold, strict=True))
    most_frequent = max(gold.count(option) for option in set(gold)) / len(gold)
    return Signal(right / len(gold), len(gold), max(chance, most_frequent))

"""Known answers of what accuracies amount to."""

import math

import numpy as np
import pytest

from ldmole_ds.compare.statistics import Signal, mean_and_spread, paired_difference, signal


def test_mean_and_spread():
    assert mean_and_spread([0.5]) == (0.5, None)
    mean, spread = mean_and_spread([0.5, 0.7, 0.6])
    assert mean == pytest.approx(0.6) and spread == pytest.approx(0.1)


def test_one_seed_has_the_rows_as_its_only_sample():
    ours, theirs = [[True, True, False, True]], [[False, True, False, True]]
    difference, error = paired_difference(ours, theirs)
    # differences 1, 0, 0, 0: mean 1/4, variance 1/4, over four rows
    assert (difference, error) == (0.25, 0.25)


def test_equal_answers_differ_by_nothing_for_sure():
    answers = [[True, False, True], [False, False, True]]
    assert paired_difference(answers, answers) == (0.0, 0.0)


def test_seeds_that_disagree_count_beside_rows():
    # Seed 1 gains on every row, seed 2 on none: rows say nothing, seeds differ by 1.
    ours, theirs = [[True] * 10, [False] * 10], [[False] * 10, [False] * 10]
    assert paired_difference(ours, theirs) == (0.5, pytest.approx(math.sqrt(0.5 / 2)))


def test_the_standard_error_is_that_of_new_seeds_and_new_rows():
    """Crossed effects of seeds and rows plus noise: the mean of estimated variances is the variance of the mean."""
    rng = np.random.default_rng(0)
    means, variances = [], []
    for _ in range(600):
        level = 0.5 + rng.normal(0, 0.1, (4, 1)) + rng.normal(0, 0.15, (1, 50))
        difference, error = paired_difference((rng.random((4, 50)) < level).tolist(), [[False] * 50] * 4)
        means.append(difference)
        variances.append(error**2)
    assert np.mean(variances) == pytest.approx(np.var(means), rel=0.15)


def test_other_rows_or_seeds_are_refused():
    with pytest.raises(ValueError, match="same seeds and rows"):
        paired_difference([[True, False]], [[True]])


def test_three_standard_errors_above_chance():
    # chance 0.5 of 100 rows: a standard error of 0.05
    assert Signal(0.64, 100, 0.5).standard_errors_above_chance == pytest.approx(2.8)
    assert not Signal(0.64, 100, 0.5).found
    assert Signal(0.66, 100, 0.5).found


def test_always_one_answer_is_no_signal():
    gold = [1] * 70 + [0] * 30
    found = signal([1] * 100, gold, 0.5)
    assert (found.accuracy, found.rows, found.chance) == (0.7, 100, 0.7) and not found.found
    assert signal(gold, gold, 0.5).found

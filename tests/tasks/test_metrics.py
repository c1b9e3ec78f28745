"""Known answers of every metric."""

import math

import pytest

from ldmole_ds.tasks.metrics import matthews_correlation, task_metrics, wilson_interval


@pytest.mark.parametrize(
    ("correct", "rows", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(correct, rows, low, high):
    assert wilson_interval(correct, rows) == pytest.approx((low, high), abs=5e-5)
    # By symmetry, of the wrong ones.
    assert wilson_interval(rows - correct, rows) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_interval_stays_inside_zero_and_one():
    assert wilson_interval(0, 1)[0] == 0.0 and wilson_interval(1, 1)[1] == 1.0


@pytest.mark.parametrize(
    ("predicted", "gold", "expected"),
    [
        ([1, 1, 0, 0], [1, 1, 0, 0], 1.0),
        ([0, 0, 1, 1], [1, 1, 0, 0], -1.0),
        ([1, 1, 1, 1], [1, 1, 0, 0], 0.0),  # always the larger class: accuracy hides it
        ([1, 0, 1, 0], [1, 1, 0, 0], 0.0),
        # tp 6, tn 3, fp 1, fn 2
        ([1] * 6 + [0] * 3 + [1] + [0] * 2, [1] * 6 + [0] * 3 + [0] + [1] * 2, (18 - 2) / math.sqrt(7 * 8 * 4 * 5)),
    ],
)
def test_matthews_correlation(predicted, gold, expected):
    assert matthews_correlation(predicted, gold) == pytest.approx(expected)


def test_one_task_needs_no_suffix():
    found = task_metrics(["cola"] * 4, [1, 1, 0, 1], [1, 1, 0, 0])
    assert found == pytest.approx(
        {"accuracy": 0.75, "accuracy_stderr": math.sqrt(0.75 * 0.25 / 4), "matthews_correlation": 1 / math.sqrt(3)}
    )
    assert task_metrics([""] * 2, [0, 1], [0, 0]) == pytest.approx(
        {"accuracy": 0.5, "accuracy_stderr": math.sqrt(0.125)}
    )


def test_tasks_weigh_alike_whatever_their_rows():
    tasks = ["rte", "cola", "rte", "rte", "cola", "rte"]
    found = task_metrics(tasks, [0, 1, 0, 0, 0, 1], [0, 1, 1, 1, 0, 0])
    assert found["accuracy_rte"] == 0.25 and found["accuracy_cola"] == found["matthews_correlation_cola"] == 1.0
    assert found["accuracy"] == 0.625
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 4) / 2)
    assert found.keys() == {"accuracy", "accuracy_stderr", "accuracy_cola", "accuracy_rte", "matthews_correlation_cola"}

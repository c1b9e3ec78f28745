"""The plots of a comparison and of a sweep: drawn from all methods, with and without a spread, and from one alone."""

import pytest
from matplotlib import pyplot as plt

from ldmole_ds.compare.methods import METHODS, SWEEPS
from ldmole_ds.compare.plot import plot_methods, plot_sweep


def figures(place, **settings):
    return {
        "label": f"method {place}", "settings": settings, "accuracy": 0.5 + place / 100,
        "accuracies": [0.49 + place / 100, 0.51 + place / 100], "accuracy_spread": 0.014 if place % 2 else None,
        "experts_per_token": 1.0 + place, "trainable": 1_000_000 * (place + 1),
    }  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """Figures that would have been closed."""
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    yield kept
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize("names", [list(METHODS), ["lora"], ["ld-mole", "softmax"]], ids=len)
def test_every_method_is_a_row_and_a_point_in_each_panel(tmp_path, drawn, names):
    plot_methods({name: figures(place) for place, name in enumerate(names)}, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    rows, *costs = drawn[0].axes
    assert [label.get_text() for label in rows.get_yticklabels()] == [f"method {n}" for n in range(len(names))]
    assert [len(axis.containers) for axis in (rows, *costs)] == [len(names)] * 3
    assert [c[0].get_ydata()[0] for c in costs[1].containers] == pytest.approx(
        [0.5 + n / 100 for n in range(len(names))]
    )


@pytest.mark.parametrize("values", [SWEEPS["sparsity_loss_weight"], (2,)], ids=len)
def test_a_sweep_is_a_curve_over_sorted_values(tmp_path, drawn, values):
    methods = {"lora": figures(0)} | {f"w={v}": figures(i, w=v) for i, v in reversed(list(enumerate(values, 1)))}
    plot_sweep(methods, "w", "title", tmp_path / "plot.png")
    accuracy, experts = drawn[0].axes
    assert [label.get_text() for label in accuracy.get_xticklabels()] == [f"{value:g}" for value in values]
    assert experts.lines[0].get_ydata().tolist() == [1.0 + place for place in range(1, len(values) + 1)]
    assert (tmp_path / "plot.png").stat().st_size > 5000

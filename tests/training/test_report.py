"""The report of a run: its curves."""

from ldmole_ds.training.report import plot_curves


def test_a_run_that_logged_nothing_has_no_curves(tmp_path):
    plot_curves([{"step": 1, "train_loss": 7.4}], tmp_path / "none.png")
    plot_curves([{"step": 1, "lambda_mean": 0.5}], tmp_path / "some.png")
    assert [path.name for path in tmp_path.iterdir()] == ["some.png"]

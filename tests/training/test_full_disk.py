"""A disk that is full when a run ends: one sentence on every rank instead of a traceback on some."""

from types import SimpleNamespace

import pytest

from ldmole_ds.training import finish as module
from ldmole_ds.training.finish import finish
from ldmole_ds.training.runtime import UserError
from tests.tiny import tiny_model


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def end_of_run(folder, **changes):
    nothing = dict.fromkeys(["close_window", "save_model", "save_metrics", "save_state"], lambda *args: None)
    counted = {"tokens_timed": 0, "train_seconds": 0.0, "operations": 0.0}
    state = SimpleNamespace(log_history=[], global_step=1)
    train = {"train": lambda resume_from_checkpoint: SimpleNamespace(metrics={"train_runtime": 1.0})}
    preemption = SimpleNamespace(stopped_by=None)
    trainer = SimpleNamespace(**{**nothing, **counted, **train, "state": state, "preemption": preemption, **changes})
    row = SimpleNamespace(task=None)
    data = SimpleNamespace(validation=None, train=[row], label_words=None)
    finish(trainer, tiny_model(), data, folder, None, SimpleNamespace(bytes=0))


def test_the_adapter_does_not_fit(tmp_path):
    with pytest.raises(UserError, match="No space left on device"):
        end_of_run(tmp_path, save_model=full)


def test_the_report_does_not_fit(tmp_path, monkeypatch):
    end_of_run(tmp_path)
    assert (tmp_path / "report.json").is_file()
    monkeypatch.setattr(module, "write_json", full)
    message = "holds the adapter, but its report is not whole: .*No space left on device"
    with pytest.raises(UserError, match=message):
        end_of_run(tmp_path)

"""A full disk: a run goes on without its table of metrics, and where it ends says so in one sentence on every rank."""

import contextlib
import resource
from types import SimpleNamespace

import pytest

from ldmole_ds.training import finish as module
from ldmole_ds.training import trainer as trainer_module
from ldmole_ds.training.finish import finish
from ldmole_ds.training.metrics_file import MetricsFileCallback
from ldmole_ds.training.runtime import UserError
from tests.distributed_utils import run_distributed
from tests.tiny import ragged_batch, tiny_model
from tests.training.small_trainer import Rows, make_trainer


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


def save_where_what_stands_beside_the_adapter_does_not_fit(rank, world_size, folder):
    trainer = make_trainer(tiny_model(), Rows(ragged_batch()), folder)
    trainer_module.write_atomically = full  # only rank 0 writes
    try:
        trainer.save_model()
    except OSError as error:
        return str(error)


@pytest.mark.distributed
def test_all_ranks_hear_that_a_file_beside_the_adapter_does_not_fit(tmp_path):
    for message in run_distributed(save_where_what_stands_beside_the_adapter_does_not_fit, 2, str(tmp_path)):
        assert "No space left on device (rank 0)" in message


@contextlib.contextmanager
def no_file_above(size):
    """As on a full disk, what does not fit is not written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_training_goes_on_without_a_row_of_metrics(tmp_path, caplog):
    callback = MetricsFileCallback(SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path))))
    path = callback.metrics.path

    def log(step):
        callback.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=step), None, {"loss": 1 / 3})

    with no_file_above(20):
        log(1)
    assert not path.exists() and f"{path} lacks step 1: " in caplog.text
    log(2)
    with no_file_above(path.stat().st_size + 5):
        log(3)
    assert f"{path} lacks step 3: " in caplog.text
    log(4)
    head, *rows = path.read_text().splitlines()
    assert head.startswith("step,epoch,loss,") and [row.split(",")[0] for row in rows] == ["2", "4"]

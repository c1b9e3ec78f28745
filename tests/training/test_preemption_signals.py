"""What the callback does with signals, in one process."""

import os
import signal

import pytest
from transformers import TrainerCallback

from tests.training.trainer_runs import make_trainer


class Kill(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_step_is_finished_and_saved(tmp_path, number):
    before = signal.getsignal(number)
    trainer = make_trainer(2, 1, output_dir=str(tmp_path), max_steps=9)
    trainer.add_callback(Kill(number, 3))
    trainer.train()
    assert trainer.preemption.stopped_by == signal.Signals(number).name
    assert trainer.state.global_step == 4
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert signal.getsignal(number) == before
    again = make_trainer(2, 1, output_dir=str(tmp_path), max_steps=6)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 6 and again.preemption.stopped_by is None


def test_a_run_without_signals_ends_as_ever(tmp_path):
    trainer = make_trainer(2, 1, output_dir=str(tmp_path))
    trainer.train()
    assert trainer.preemption.stopped_by is None
    assert not list(tmp_path.glob("checkpoint-*"))

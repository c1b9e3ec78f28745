"""Leaving when the cluster asks: finish the step, save, exit with a code that says "run me again".

Slurm sends a signal some time before it takes a job's nodes (``--signal=USR1@300``), clouds and Kubernetes send
SIGTERM. Any rank may get it first, so all ranks agree after every step whether one has.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

# EX_TEMPFAIL of sysexits.h: a temporary failure, try again.
EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptionCallback(TrainerCallback):
    """Stops training with a checkpoint at the end of the step in which any rank got one of `SIGNALS`.

    Attributes:
        stopped_by: The signal's name once all ranks have agreed to stop, else None.
    """

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self._received = 0
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.stopped_by, self._received = None, 0
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        self._received = number

    def on_step_end(self, args, state, control, **kwargs) -> None:
        received = self._received
        if args.world_size > 1:
            flag = torch.tensor(received, device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            received = int(flag)
        if received:
            self.stopped_by = signal.Signals(received).name
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

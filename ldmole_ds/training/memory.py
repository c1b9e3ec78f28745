"""Peak memory: of the accelerator where there is one, else of this process; of a whole run, and of training alone."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from transformers import TrainerCallback

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_forgotten = 0


def _accelerator():
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return None if accelerator.device_name() == "cpu" else accelerator


def _process_peak_bytes() -> int:
    if _STATUS.is_file():
        peak = next((line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")), None)
        if peak is not None:
            return int(peak.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_since_reset() -> int:
    """Bytes of this rank since `reset_peak_memory`, or since it began."""
    accelerator = _accelerator()
    return accelerator.max_memory_allocated() if accelerator else _process_peak_bytes()


def peak_memory_bytes() -> int:
    """Bytes of this rank since it began."""
    return max(_forgotten, peak_since_reset())


def reset_peak_memory() -> None:
    """What comes is measured alone. Where the system cannot forget a process's peak, it stays in."""
    global _forgotten
    _forgotten = peak_memory_bytes()
    accelerator = _accelerator()
    if accelerator:
        accelerator.reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")  # Linux: VmHWM starts anew at the present size
    except OSError:
        pass


class MemoryOfTraining(TrainerCallback):
    """Peak memory of the training loop, without loading and evaluation after it; made before the model is loaded.

    Attributes:
        bytes: Of the accelerator; of the process above what it was without a model where there is none.
    """

    def __init__(self) -> None:
        reset_peak_memory()
        self._without_model = peak_since_reset()
        self.bytes = 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        reset_peak_memory()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bytes = peak_since_reset() - self._without_model

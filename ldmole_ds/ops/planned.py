"""Tensors without data that stand for those of a CPU, so that a traced step takes the way of the real one.

Other fake tensors stand for a GPU's, or are a compiler's: what depends on where it runs takes plain operations there.
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class PlannedCpu(FakeTensorMode):
    """Fake tensors of a step that a CPU would run.

    Args:
        grouped_speed: As `ldmole_ds.ops.expert_compute.grouped_speed`, with the threads of the planned ranks.
    """

    def __init__(self, grouped_speed: float) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.grouped_speed = grouped_speed


def planned_cpu(tensor: Tensor) -> PlannedCpu | None:
    """Where this tensor stands for one of a CPU; None for real tensors, and for all other fake ones."""
    mode = tensor.fake_mode if isinstance(tensor, FakeTensor) else None
    return mode if isinstance(mode, PlannedCpu) else None

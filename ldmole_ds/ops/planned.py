"""Tensors without data that stand for those of a CPU or a GPU, so that a traced step takes the way of the real one.

Other fake tensors are a compiler's: what depends on where it runs takes plain operations there.
"""

from __future__ import annotations

import torch
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


class PlannedGpu(FakeTensorMode):
    """Fake tensors of a step that a GPU with Triton would run. Their device is the CPU all the same."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)


def _mode(tensor: Tensor) -> FakeTensorMode | None:
    if torch.compiler.is_compiling():  # a compiler's tensors stand for what they are
        return None
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None


def planned_cpu(tensor: Tensor) -> PlannedCpu | None:
    """Where this tensor stands for one of a CPU; None for real tensors, and for all other fake ones."""
    mode = _mode(tensor)
    return mode if isinstance(mode, PlannedCpu) else None


def is_planned_gpu(tensor: Tensor) -> bool:
    """Whether this fake tensor stands for one of a GPU."""
    return isinstance(_mode(tensor), PlannedGpu)


def on_gpu(tensor: Tensor) -> bool:
    """Whether this tensor is on a GPU, or stands for one that is."""
    return tensor.is_cuda or is_planned_gpu(tensor)

"""Which operations a step has: what of it depends on the device and on the layout."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ldmole_ds.distributed import ExpertWeights, LocalTokenDispatcher
from ldmole_ds.model import LDMoLEModel
from ldmole_ds.ops.grouped_update import Update
from ldmole_ds.ops.planned import PlannedCpu, PlannedGpu
from ldmole_ds.planner.cluster import Device
from ldmole_ds.planner.layout import Layout, Precision


class StepKind(NamedTuple):
    """A step that can be traced.

    Attributes:
        checkpointing: Whether each layer is recomputed in backward.
        grouped_speed: As of `Device`, where it is a CPU, which has kernels in C; None: a GPU, which has Triton's.
        whole: Whether an input group may run in one node (`ldmole_ds.layers.whole_group`).
    """

    checkpointing: bool = False
    grouped_speed: float | None = None
    whole: bool = False

    def fake_tensors(self) -> FakeTensorMode:
        """In which tensors stand for those of the device."""
        return PlannedGpu() if self.grouped_speed is None else PlannedCpu(self.grouped_speed)

    def prepare(self, model: LDMoLEModel) -> LDMoLEModel:
        """Let the model, which has all experts on its rank, run as it does in this step."""
        if self.checkpointing:
            model.gradient_checkpointing_enable()
        if not self.whole:
            for group in model.input_groups:
                group.dispatcher = _InParts(group.dispatcher.stats)
        return model


class _InParts(LocalTokenDispatcher):
    """In the place of one that has to do between the parts of a group."""

    def run(self, x_TD: Tensor, probs_TGE: Tensor, experts: ExpertWeights, layer: str) -> Tensor | list[Update]:
        return super().run(x_TD, probs_TGE, experts, layer)


def kind_of(layout: Layout, device: Device, precision: Precision) -> StepKind:
    """Of a step in this layout on this device: tokens travel, and ZeRO-3's hooks gather, between a group's parts.

    Nor is a group one node whose frozen layers are quantised.
    """
    whole = layout.dispatch != "tokens" and layout.zero_stage < 3 and precision.quantization == "none"
    return StepKind(layout.checkpointing, None if device.asynchronous else device.grouped_speed, whole)

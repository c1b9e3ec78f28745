"""Where ZeRO keeps the float32 weights and the optimizer's moments of this rank: the one view of all stages.

Every stage steps its base optimizer on flat buffers: stages 1 and 2 on this rank's slice of each parameter group,
stage 3 on this rank's slices of each sub-group's parameters; without ZeRO every parameter is a buffer of its own. A
`Flat` is such a buffer, the optimizer's state beside it, and the list of the parameters' runs in it.

DeepSpeed's names for them are in `_STAGE_12` and `_STAGE_3`, and looked for before any is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldmole_ds.distributed.deepspeed_private import TESTED_VERSION, private
from ldmole_ds.distributed.zero import finish_prefetches

_MASTER_12, _MASTER_3 = "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"
_STAGE_12 = ("bit16_groups", "bit16_groups_flat", "real_dp_process_group", "update_lp_params")
_STAGE_3 = (
    "fp16_groups",
    "fp16_partitioned_groups_flat",
    "sub_group_to_group_id",
    "checkpoint_event_prologue",
    "checkpoint_event_epilogue",
)


@dataclass(frozen=True)
class Run:
    """Consecutive elements of a parameter in a flat buffer.

    Attributes:
        parameter: The model's parameter.
        start: First element in the parameter, flattened.
        offset: First element in the buffer.
        numel: Length.
    """

    parameter: nn.Parameter
    start: int
    offset: int
    numel: int


@dataclass
class Flat:
    """A buffer that the base optimizer steps.

    Attributes:
        weight: One-dimensional, the weights of record (float32 under ZeRO).
        owner: The optimizer's key of the state.
        optimizer: The base optimizer.
        group: Its parameter group.
        runs: What the buffer holds; what lies between the runs is padding.
        parameters: Those of its parameter group or sub-group, also where their elements are on other ranks.
    """

    weight: Tensor
    owner: Tensor
    optimizer: torch.optim.Optimizer
    group: dict[str, Any]
    runs: list[Run]
    parameters: list[nn.Parameter]

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state of this buffer; empty before the first step."""
        return self.optimizer.state.get(self.owner, {})

    def moments(self) -> dict[str, Tensor]:
        """State with one value for each weight, one-dimensional.

        Raises:
            ValueError: The optimizer keeps other tensors, which cannot be cut at any element.
        """
        moments = {}
        for name, value in self.state.items():
            if not isinstance(value, Tensor) or name == "step":
                continue
            if value.numel() != self.weight.numel() or not value.is_floating_point():
                raise ValueError(
                    f"{type(self.optimizer).__name__} keeps {name} of shape {tuple(value.shape)} for "
                    f"{self.weight.numel()} weights, which checkpoints cannot hold: use --optim adamw_torch, or "
                    "--save_strategy no"
                )
            moments[name] = value.view(-1)
        return moments

    @property
    def step(self) -> int:
        """Optimizer steps that this buffer has seen."""
        step = self.state.get("step", self.group.get("step", 0))
        return int(step)

    def hyperparameters(self) -> dict[str, Any]:
        """Numbers of the parameter group: lr, betas, weight_decay, ..."""
        return {k: v for k, v in self.group.items() if _is_number(v) or _is_numbers(v)}

    def restore(self, moments: dict[str, Tensor], step: int, hyperparameters: dict[str, Any]) -> None:
        """Put the optimizer where it was.

        Args:
            moments: State by name, of the size of `weight`; empty if no step was made.
            step: See `step`.
            hyperparameters: See `hyperparameters`; those the group does not have are left out.
        """
        self.group.update({k: v for k, v in _tuples(hyperparameters).items() if k in self.group})
        if not moments:
            return
        state = self.optimizer.state[self.owner]
        state.update({name: value.view_as(self.owner) for name, value in moments.items()})
        if "step" in self.group:  # DeepSpeed's fused Adam counts there
            self.group["step"] = step
        elif type(self.optimizer).__module__.startswith("torch.optim"):
            on_device = self.group.get("fused") or self.group.get("capturable")
            device = self.weight.device if on_device else "cpu"
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
        else:
            state["step"] = step


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_number, value))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


class OptimizerShards:
    """All buffers of this rank.

    Args:
        model: The model that is trained.
        optimizer: What steps it: DeepSpeed's ZeRO optimizer, or one of torch's.

    Attributes:
        flats: In an order that is the same in every process of the same layout.
        replicated: Every rank holds all of them (no ZeRO).

    Raises:
        ValueError: An optimizer whose state cannot be resharded.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer
        if hasattr(optimizer, _MASTER_12):
            _check_names(optimizer, _STAGE_12)
            self.stage, self.flats = 1, list(_flats_of_stage_12(optimizer))
        elif hasattr(optimizer, _MASTER_3):
            _check_names(optimizer, _STAGE_3)
            self.stage, self.flats = 3, list(_flats_of_stage_3(optimizer))
        else:
            self.stage, self.flats = 0, list(_flats_of_torch(optimizer))

    @property
    def replicated(self) -> bool:
        """Whether all ranks hold the same buffers."""
        return self.stage == 0

    def publish(self) -> None:
        """Bring changed `Flat.weight` buffers into the model's parameters. Collective over the data-parallel ranks."""
        if self.stage == 1:
            self.optimizer.update_lp_params()
        elif self.stage == 3:
            finish_prefetches(self.model)
            self.optimizer.checkpoint_event_prologue()
            halves, masters = self.optimizer.fp16_partitioned_groups_flat, self.optimizer.fp32_partitioned_groups_flat
            for half, master in zip(halves, masters, strict=True):
                half.data.copy_(master.data)
            self.optimizer.checkpoint_event_epilogue()


def _check_names(optimizer: Any, names: tuple[str, ...]) -> None:
    for name in names:
        private(optimizer, name)


def _flats_of_stage_12(optimizer: Any) -> Iterator[Flat]:
    groups = optimizer.optimizer.param_groups
    for i, master in enumerate(optimizer.single_partition_of_fp32_groups):
        whole, rank = optimizer.bit16_groups_flat[i], dist.get_rank(group=optimizer.real_dp_process_group[i])
        first = rank * master.numel()
        runs = []
        for param in optimizer.bit16_groups[i]:
            # The parameters are views of the group's flat buffer, in an order of DeepSpeed's choice.
            at = (param.data_ptr() - whole.data_ptr()) // whole.element_size()
            if not 0 <= at <= whole.numel() - param.numel():
                raise RuntimeError(f"DeepSpeed no longer keeps parameters in its flat buffers: {TESTED_VERSION}")
            begin, end = max(at, first), min(at + param.numel(), first + master.numel())
            if begin < end:
                runs.append(Run(param, begin - at, begin - first, end - begin))
        yield Flat(master.detach(), master, optimizer.optimizer, groups[i], runs, list(optimizer.bit16_groups[i]))


def _flats_of_stage_3(optimizer: Any) -> Iterator[Flat]:
    groups = optimizer.optimizer.param_groups
    for i, (params, master) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        sizes = [private(param, "ds_numel") for param in params]
        if optimizer.fp16_partitioned_groups_flat[i] is None or master.numel() == 0 < sum(sizes):
            raise ValueError(
                "checkpoints cannot hold an optimizer that is offloaded to NVMe: set offload_optimizer.device to cpu, "
                "or --save_strategy no"
            )
        offset, runs = 0, []
        for param, size in zip(params, sizes, strict=True):
            numel = private(param, "partition_numel")()
            start = numel * dist.get_rank(group=private(param, "ds_process_group"))
            real = min(numel, size - start)
            if real > 0:
                runs.append(Run(param, start, offset, real))
            offset += numel
        yield Flat(
            master.detach(), master, optimizer.optimizer, groups[optimizer.sub_group_to_group_id[i]], runs, list(params)
        )


def _flats_of_torch(optimizer: Any) -> Iterator[Flat]:
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer":
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or type(optimizer).__name__ in ("FP16_Optimizer", "FP16_UnfusedOptimizer", "BF16_Optimizer"):
            raise ValueError(
                "checkpoints cannot hold half-precision training at ZeRO stage 0: set zero_optimization.stage to 1, or "
                "--save_strategy no"
            )
        optimizer = inner
    for group in optimizer.param_groups:
        for param in group["params"]:
            yield Flat(param.data.view(-1), param, optimizer, group, [Run(param, 0, 0, param.numel())], [param])

"""DeepSpeed's bookkeeping of experts: which parameters are some, and in which optimizer groups they stand."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

from ldmole_ds.distributed.deepspeed_private import place_expert, private


def is_initialized() -> bool:
    """Whether DeepSpeed is in use in this process and its communication is up. Does not import it."""
    deepspeed_comm = sys.modules.get("deepspeed.comm")
    return deepspeed_comm is not None and deepspeed_comm.is_initialized()


def mark_expert_parameter(param: nn.Parameter, group_name: str, edp_group: dist.ProcessGroup) -> None:
    """Tell DeepSpeed that ``param`` differs between the ranks of an EP group.

    Stages 1 and 2 read ``allreduce`` and ``group_name``; stage 3 reads the placement attributes and partitions the
    parameter over the EDP group only.
    """
    param.allreduce = False
    param.group_name = group_name
    place_expert(param, group_name, edp_group)


def is_expert_parameter(param: torch.Tensor) -> bool:
    """Whether ``param`` was marked by `mark_expert_parameter`."""
    return not getattr(param, "allreduce", True)


def split_expert_param_groups(param_groups: list[dict]) -> list[dict]:
    """Split optimizer groups into shared and expert ones, as stages 1 and 2 demand; empty groups are left out."""
    split = private("deepspeed.moe.utils", "split_params_into_different_moe_groups_for_optimizer")
    for index, group in enumerate(param_groups):
        group.setdefault("name", f"group{index}")
    return [group for group in split(param_groups) if group["params"]]

"""What we need of DeepSpeed's process groups and of its expert bookkeeping, private names included.

DeepSpeed is imported inside the functions: the runtime (loading an adapter, generating) must work without it.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

TESTED_VERSION = "this ldmole_ds is tested with deepspeed 0.19; install it with `pip install 'deepspeed>=0.19,<0.20'`"


def is_initialized() -> bool:
    """Whether DeepSpeed is in use in this process and its communication is up. Does not import it."""
    deepspeed_comm = sys.modules.get("deepspeed.comm")
    return deepspeed_comm is not None and deepspeed_comm.is_initialized()


def create_expert_groups(ep_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """DeepSpeed's (EP group, EDP group) of this rank for ``ep_size``, made on first use. Collective."""
    from deepspeed.utils import groups

    name = f"ep_size_{ep_size}"
    try:
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(ep_size)
        return groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name)
    except AttributeError as error:
        raise RuntimeError(f"DeepSpeed's expert groups are not where they were ({error}): {TESTED_VERSION}") from error


def mark_expert_parameter(param: nn.Parameter, group_name: str, edp_group: dist.ProcessGroup) -> None:
    """Tell DeepSpeed that ``param`` differs between the ranks of an EP group.

    Stages 1 and 2 read ``allreduce`` and ``group_name``; stage 3 reads the placement attributes and partitions the
    parameter over the EDP group only.
    """
    param.allreduce = False
    param.group_name = group_name
    param.ds_zero_placement_family = "autoep_expert"
    param.ds_zero_partition_group_name = group_name
    param.ds_zero_partition_process_group = edp_group


def is_expert_parameter(param: torch.Tensor) -> bool:
    """Whether ``param`` was marked by `mark_expert_parameter`."""
    return not getattr(param, "allreduce", True)


def split_expert_param_groups(param_groups: list[dict]) -> list[dict]:
    """Split optimizer groups into shared and expert ones, as stages 1 and 2 demand; empty groups are left out."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    for index, group in enumerate(param_groups):
        group.setdefault("name", f"group{index}")
    return [group for group in split_params_into_different_moe_groups_for_optimizer(param_groups) if group["params"]]

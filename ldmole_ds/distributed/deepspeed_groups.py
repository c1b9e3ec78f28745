"""What we need of DeepSpeed's process groups and of its expert bookkeeping, private names included.

DeepSpeed is imported inside the functions: the runtime (loading an adapter, generating) must work without it. Every
private name of DeepSpeed is read in this folder and under `deepspeed_names`, so that a version that moved it says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

TESTED_VERSION = "install a version that this ldmole_ds is tested with: `pip install 'deepspeed>=0.19.3,<0.20'`"


@contextmanager
def deepspeed_names(what: str) -> Iterator[None]:
    """Look names of DeepSpeed up; a missing one is a clear error.

    Args:
        what: What they belong to, for the message.

    Raises:
        RuntimeError: A name is missing; the message says which, and which version has it.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"{what}: this DeepSpeed has changed ({error}); {TESTED_VERSION}") from error


def is_initialized() -> bool:
    """Whether DeepSpeed is in use in this process and its communication is up. Does not import it."""
    deepspeed_comm = sys.modules.get("deepspeed.comm")
    return deepspeed_comm is not None and deepspeed_comm.is_initialized()


def create_expert_groups(ep_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """DeepSpeed's (EP group, EDP group) of this rank for ``ep_size``, made on first use. Collective."""
    with deepspeed_names("expert groups"):
        from deepspeed.utils import groups

        made, create = groups._get_expert_parallel_group_dict, groups._create_expert_and_data_parallel
        ep_group, edp_group = groups._get_expert_parallel_group, groups._get_expert_data_parallel_group
    name = f"ep_size_{ep_size}"
    if name not in made():
        create(ep_size)
    return ep_group(name), edp_group(name)


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
    with deepspeed_names("optimizer groups"):
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    for index, group in enumerate(param_groups):
        group.setdefault("name", f"group{index}")
    return [group for group in split(param_groups) if group["params"]]


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory op for CPU, which training does not use. Before communication."""
    with deepspeed_names("the shared-memory op"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def refresh_expert_weights(engine: object) -> None:
    """Stages 1 and 2, after loading a checkpoint: copy this rank's experts from its optimizer shard to the module."""
    with deepspeed_names("the optimizer's weights"):
        update = engine.optimizer.update_lp_params
    update()

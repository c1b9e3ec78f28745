"""The names of DeepSpeed's insides that this package uses, each looked up by `private`; those of its optimizers'
buffers are in `optimizer_shards`, with what they mean.

A version of DeepSpeed that has moved one then says so where it is first needed, and with which versions it works.
DeepSpeed is imported inside the functions: the runtime (loading an adapter, generating) must work without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

TESTED_VERSION = "install one that this ldmole_ds is tested with: `pip install 'deepspeed>=0.19.3,<0.20'`"
ENGINE_HOOK = "_configure_distributed_model"


def private(owner: object, name: str) -> Any:
    """``owner.name``, of which DeepSpeed promises nothing.

    Args:
        owner: What has the name, or the dotted name of a module to import.
        name: The attribute.

    Raises:
        RuntimeError: It is not there; names it and the tested versions.
    """
    try:
        return getattr(import_module(owner) if isinstance(owner, str) else owner, name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"this DeepSpeed has no {name} where this package looks for it ({error}): {TESTED_VERSION}"
        ) from error


def create_expert_groups(ep_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """DeepSpeed's (EP group, EDP group) of this rank for ``ep_size``, made on first use. Collective."""
    groups, name = "deepspeed.utils.groups", f"ep_size_{ep_size}"
    created = private(groups, "_get_expert_parallel_group_dict")
    create = private(groups, "_create_expert_and_data_parallel")
    ep_group = private(groups, "_get_expert_parallel_group")
    edp_group = private(groups, "_get_expert_data_parallel_group")
    if name not in created():
        create(ep_size)
    return ep_group(name), edp_group(name)


def place_expert(param: nn.Parameter, group_name: str, edp_group: dist.ProcessGroup) -> None:
    """Let stage 3 partition ``param`` over its EDP group only, and average its gradient there.

    Attributes tell it, which a version that does not know them would ignore: `check_placement` finds that out.
    """
    param.ds_zero_placement_family = "autoep_expert"
    param.ds_zero_partition_group_name = group_name
    param.ds_zero_partition_process_group = edp_group


def check_placement() -> None:
    """Stage 3 must know parameters placed by `place_expert`: before 0.19.3 it averages different experts.

    Raises:
        RuntimeError: It does not.
    """
    stage3 = private("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3")
    private(stage3, "_autoep_expert_parallel_group")


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory op for CPU, which training does not use. Before communication."""
    private("deepspeed.ops", "__compatible_ops__")["deepspeed_shm_comm"] = False


def defer_muon_compile() -> None:
    """Let DeepSpeed compile its Muon kernels when they first run, not whenever an engine starts.

    An engine imports Muon to compare types of optimizers. That import decorates kernels with ``torch.compile``, which
    loads a compiler: two seconds of every start. Nothing to do where DeepSpeed has no such module.
    """
    try:
        compiler = import_module("deepspeed.runtime.compiler")
        compile_now = compiler.compile
    except (ImportError, AttributeError):
        return

    def deferred(kernel: Callable) -> Callable:
        compiled = functools.cache(lambda: compile_now()(kernel))

        @functools.wraps(kernel)
        def run(*args: Any, **kwargs: Any) -> Any:
            # Within a compiled kernel it is part of that one.
            return (kernel if torch.compiler.is_compiling() else compiled())(*args, **kwargs)

        return run

    compiler.compile = lambda: deferred
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    except ImportError:
        pass
    finally:
        compiler.compile = compile_now


def parameters_in_flight(model: nn.Module) -> dict[nn.Parameter, Any]:
    """What stage 3 has begun to fetch and not yet used, by parameter; nothing where it does not have the model."""
    return private(model, "ds_inflight_param_registry") if hasattr(model, "ds_id") else {}


def whole_shape(param: torch.Tensor) -> torch.Size:
    """Shape of a parameter that stage 3 holds partitioned."""
    return torch.Size(private(param, "ds_shape"))

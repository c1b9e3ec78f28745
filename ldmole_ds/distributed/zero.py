"""The one place that touches ZeRO-3's gathering of parameters; a no-op elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from ldmole_ds.distributed.deepspeed_private import parameters_in_flight, private, whole_shape


def is_zero3_parameter(param: torch.Tensor) -> bool:
    """Whether ``param`` is partitioned by ZeRO-3 (its data may be absent)."""
    return hasattr(param, "ds_id")


def gathered(params: Iterable[nn.Parameter], modifier_rank: int | None = None) -> AbstractContextManager:
    """Context in which ZeRO-3 parameters are whole. Collective over their partition groups.

    Args:
        params: Parameters; those that ZeRO-3 does not hold are left alone.
        modifier_rank: Rank whose changes are kept on exit; None when nothing is changed.
    """
    partitioned = [p for p in params if is_zero3_parameter(p)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank)


def finish_prefetches(model: nn.Module) -> None:
    """Wait for parameters that ZeRO-3 has begun to fetch for a forward pass that has not come.

    After an evaluation some always are; gathering them a second time would abort.
    """
    in_flight = parameters_in_flight(model)
    for param in list(in_flight):
        in_flight.pop(param).wait()


def full_shape(param: torch.Tensor) -> torch.Size:
    """The whole parameter's shape, also while ZeRO-3 has released its data."""
    return whole_shape(param) if is_zero3_parameter(param) else param.shape


def partitioned_init(config: dict) -> AbstractContextManager:
    """Context in which modules are built already partitioned, as ``zero.Init`` does under ZeRO-3."""
    import deepspeed

    return deepspeed.zero.Init(config_dict_or_path=config)


@contextmanager
def outside_partitioned_init() -> Iterator[None]:
    """Context (or decorator) in which modules are built whole, also within ``zero.Init``.

    Its context would partition each module as it is built; the engine does it later, when it takes in the whole model.
    """
    partitioning = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if partitioning is None:
        yield
        return
    leave, enter = private(partitioning, "shutdown_init_context"), private(partitioning, "restore_init_context")
    leave()
    try:
        yield
    finally:
        enter()

"""Makes DeepSpeed's engine treat partitioned experts as experts, or refuse what it would train wrongly.

Stages 1 and 2 reduce marked parameters as experts only in a model that holds one of DeepSpeed's own MoE layers; stage 3
reads the parameters' marks and refuses such layers; stage 0 is wrong either way. The stage is known where the engine
takes the model in, so that is where an empty MoE layer, the marker, is put in or left out. `deepspeed.initialize` then
works on a model with partitioned experts without any further step.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import nn

from ldmole_ds.distributed.deepspeed_groups import is_expert_parameter
from ldmole_ds.distributed.deepspeed_private import ENGINE_HOOK, check_placement, create_expert_groups, private

MARKER_NAME = "expert_parallel_marker"


def prepare_engines() -> None:
    """Let every engine made from now on look at its model first. Nothing happens where DeepSpeed is not imported.

    Raises:
        RuntimeError: DeepSpeed's engine has changed.
    """
    module = sys.modules.get("deepspeed.runtime.engine")
    if module is None:
        return
    engine_class = private(module, "DeepSpeedEngine")
    take_in = private(engine_class, ENGINE_HOOK)
    if getattr(take_in, "prepares_experts", False):
        return

    @functools.wraps(take_in)
    def prepared(engine: Any, model: nn.Module) -> Any:
        _prepare_model(model, engine)
        return take_in(engine, model)

    prepared.prepares_experts = True
    setattr(engine_class, ENGINE_HOOK, prepared)


def _prepare_model(model: nn.Module, engine: Any) -> None:
    """Put the marker in or leave it out, by the engine's stage.

    Raises:
        ValueError: Stage 0, or a setting that partitioned experts do not survive.
    """
    names = {p.group_name for p in model.parameters() if is_expert_parameter(p)}
    if not names:
        return
    stage, ep_size = engine.zero_optimization_stage(), int(names.pop().removeprefix("ep_size_"))
    if stage == 0:
        raise ValueError(
            f"ep_size={ep_size} with ZeRO stage 0 would clip gradients wrongly and lose experts on save: set "
            "zero_optimization.stage to 1, 2 or 3, or use ep_size=1"
        )
    offload = engine.zero_offload_param()
    if offload is not None and offload.device != "none":
        raise ValueError(
            "zero_optimization.offload_param is not supported with partitioned experts: remove it, or use ep_size=1"
        )
    create_expert_groups(ep_size)
    if stage == 3:
        check_placement()
        model._modules.pop(MARKER_NAME, None)
    elif MARKER_NAME not in model._modules:
        model.add_module(MARKER_NAME, _moe_marker(ep_size))


def _moe_marker(ep_size: int) -> nn.Module:
    """An empty module of DeepSpeed's MoE type. With no local experts, no per-expert files are written or looked for."""

    class ExpertParallelMarker(private("deepspeed.moe.layer", "MoE")):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = ep_size
            self.num_local_experts = 0
            self.ep_size = ep_size
            self.expert_group_name = f"ep_size_{ep_size}"

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            if use_data_before_expert_parallel_:
                raise ValueError(
                    "use_data_before_expert_parallelism is not supported: remove it from the DeepSpeed config"
                )

        def forward(self, *args, **kwargs):
            raise RuntimeError("the expert-parallel marker is never called")

    return ExpertParallelMarker()

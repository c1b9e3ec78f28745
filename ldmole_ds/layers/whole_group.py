"""An input group's members in one node of the graph, where `ldmole_ds.ops.group_product` can do that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ldmole_ds.distributed import ExpertWeights, LocalTokenDispatcher
from ldmole_ds.distributed.zero import is_zero3_parameter
from ldmole_ds.layers.context import ForwardContext, RoutingRecord
from ldmole_ds.ops import routing_cpu, routing_triton
from ldmole_ds.ops.dropout import with_mask
from ldmole_ds.ops.expert_compute import may_be_grouped
from ldmole_ds.ops.frozen_product import is_plain
from ldmole_ds.ops.fused_routing import backend_of, uses_fused_routing
from ldmole_ds.ops.group_product import GroupWeights, group_product
from ldmole_ds.ops.routing_spec import RoutingSpec

# What the kernels between the products take. Gradients would leave float16's range.
DTYPES = {routing_cpu: (torch.float32,), routing_triton: (torch.float32, torch.bfloat16)}

if TYPE_CHECKING:
    from ldmole_ds.layers.input_group import InputGroup


def runs_whole(group: InputGroup, x: Tensor) -> bool:
    """Whether `whole_group` gives what the members of this group give one by one on x ``(..., D)``.

    In float32, or on a GPU in bfloat16, with LD-MoLE's router, all experts here or gathered here, and not so large that
    their products may be grouped, and frozen layers that are plain products.
    """
    if not group.router.uses_lambda or torch.compiler.is_compiling():
        return False
    # Another way to run moves tokens, or is watched by somebody.
    dispatcher = group.dispatcher
    if getattr(type(dispatcher), "run", None) is not LocalTokenDispatcher.run or "run" in vars(dispatcher):
        return False
    mlp, types = group.lambda_mlp, (nn.Parameter, FakeTensor)
    if any(type(w) not in types or is_zero3_parameter(w) for w in (group.lora_A, mlp.weight_in)):
        return False
    weights = (group.lora_A, group.gate, mlp.weight_in, mlp.bias_in, mlp.weight_out, mlp.bias_out)
    if any(w.dtype != x.dtype for w in weights):
        return False
    if not all(is_plain(layer.base_layer, x) for layer in group.layers):
        return False
    if not uses_fused_routing(x) or x.dtype not in DTYPES[backend_of(x)]:
        return False
    return not may_be_grouped(x.numel() // group.in_features, group.lora_A, group.out_features, group.num_experts)


def whole_group(group: InputGroup, x: Tensor, context: ForwardContext) -> list[Tensor]:
    """``W_g x`` and the update for all members, ``(..., D) -> G times (..., O_g)``."""
    x_TD = x.reshape(-1, group.in_features)
    dropped = with_mask(x_TD, group.dropout) if group.dropout and group.training else None
    mask_T, mlp = context.token_mask(x), group.lambda_mlp
    layers = [layer.base_layer for layer in group.layers]
    experts = group.dispatcher.gathered(ExpertWeights(group.lora_A, group.lora_B, group.scaling), group.name)
    weights = GroupWeights(
        [layer.weight for layer in layers],
        [layer.bias for layer in layers],
        experts.lora_A,
        list(experts.lora_B),
        group.gate,
        (mlp.weight_in, mlp.bias_in, mlp.weight_out, mlp.bias_out),
        group.scaling,
    )
    spec = RoutingSpec(x.dtype, context.target_num_experts, group.mask_padding)
    found = group_product(x_TD, mask_T, weights, spec, dropped)
    if context.recording:
        logits, probs = found.logits_GET.permute(2, 0, 1), found.probs_GET.permute(2, 0, 1)
        record = (group.name, logits, probs, found.lam_T, mask_T, found.live_units_H, found.sums)
        context.records.append(RoutingRecord(*record))
    # Not views: what a model changes in place must not be a view of a custom function's output.
    return [torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]) for y in found.outputs]

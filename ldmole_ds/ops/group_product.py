"""A whole input group as one node of the graph: frozen layers, experts, router and lambda.

Shape legend: T tokens, D in_features, O out_features, G projections, E experts, r rank, H hidden units of the lambda
MLP, N = G E r + G E + H rows, M = N, or N + G E + H in half precision.

    R = [h; u; s] = [A; G; W1] x
    lambda of s, routing weights p of u and lambda, v = scaling p h        (``csrc/group.c``, `group_kernel` on a GPU)
    y_g = W_g x + B_g v_g

The fewest operations that there can be: three forward and six backward, and two or three products for each projection.
On a GPU starting one takes longer than it runs, unless tokens are many. On a CPU a small operation between two large
products costs ten times what it costs alone: the products have taken the caches, and its code and data come from
memory. The same in separate nodes is `shared_input`, `fused_routing` and `frozen_product`, which serve every other
case; `group_product_reference` puts them together.

R is float32. bfloat16 weights and tokens are multiplied as they are (`exact_product`), and gradients of u and s go into
their products as a sum of two bfloat16 numbers each, as in `shared_input`: M rows, of which the last are what rounding
left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ldmole_ds.ops import group_cpu, group_triton, routing_triton
from ldmole_ds.ops.dropout import Dropped
from ldmole_ds.ops.fused_routing import backend_of, routing_reference
from ldmole_ds.ops.group_rows import GroupSizes
from ldmole_ds.ops.low_rank_update import LowRankUpdate
from ldmole_ds.ops.matrix_products import exact_product, products_for
from ldmole_ds.ops.routing_spec import RoutingSpec
from ldmole_ds.ops.shared_input import shared_input_reference


@dataclass(frozen=True)
class GroupWeights:
    """Everything that an input group multiplies with, in one dtype: float32, or bfloat16 where the GPU's kernels run.

    Attributes:
        frozen: G weights ``(O_g, D)``.
        biases: G biases ``(O_g,)`` or None.
        lora_A: ``(G, E, r, D)``.
        lora_B: G times ``(E, r, O_g)``.
        gate: ``(G, E, D)``.
        lambda_mlp: ``weight_in (H, D), bias_in (H,), weight_out (1, H), bias_out (1,)``.
        scaling: ``lora_alpha / r``.
    """

    frozen: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    lora_A: Tensor
    lora_B: Sequence[Tensor]
    gate: Tensor
    lambda_mlp: tuple[Tensor, Tensor, Tensor, Tensor]
    scaling: float


class GroupResult(NamedTuple):
    """What comes out.

    Attributes:
        outputs: G times ``(T, O_g)``.
        sums: As `Routing.sums`, with graph.
        logits_GET, probs_GET, lam_T: Of the router, float32, without graph.
        live_units_H: bool, hidden units that fired on some token.
    """

    outputs: list[Tensor]
    sums: Tensor
    logits_GET: Tensor
    probs_GET: Tensor
    lam_T: Tensor
    live_units_H: Tensor


class _GroupProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, dropped, mask, spec, scaling, biases, lora_A, gate, weight_in, bias_in, weight_out, bias_out, *rest
    ):
        x_TD = x if dropped is None else dropped.values
        (g, e, r, d), t, units = lora_A.shape, x_TD.shape[0], len(bias_in)
        frozen, lora_B = rest[:g], rest[g:]
        sizes = GroupSizes(t, e, g, r, units, spec.target_num_experts, spec.mask_padding, scaling)
        with_x, mlp, products = (lora_A, gate, weight_in), (bias_in, weight_out, bias_out), products_for(x_TD)
        multiply = exact_product if _in_two(x_TD) else products.mm
        rows = multiply(torch.cat([w.view(-1, d) for w in with_x]), x_TD.t())
        ctx.backend = group_triton if backend_of(rows) is routing_triton else group_cpu
        found = ctx.backend.forward(rows, mlp, mask, sizes, x_TD.dtype)
        outputs = []
        for weight, bias, B, rows_g in zip(frozen, biases, lora_B, found.weighted.unbind(), strict=True):
            outputs.append(products.add_mm_(products.linear(x, weight, bias), rows_g.t(), B.flatten(0, 1)))
        logits = rows[sizes.of_experts : sizes.of_experts + g * e].view(g, e, t)
        ctx.sizes, ctx.scale = sizes, None if dropped is None else dropped.scale
        of_x = (x_TD, None if dropped is None else dropped.keep)
        of_routing = (mask, rows, *mlp, found.lambda_logit, found.probs, found.weighted)
        # Of the weights nothing but themselves: what is stacked is stacked once more.
        ctx.save_for_backward(*of_x, *of_routing, *with_x, *rest)
        ctx.mark_non_differentiable(logits, found.probs, found.lam)
        ctx.set_materialize_grads(False)
        return *outputs, found.sums, logits, found.probs, found.lam, found.live.view(torch.bool)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        # All at once: where they were recomputed they can be asked for one time.
        x_TD, keep, mask, rows, bias_in, weight_out, bias_out, *saved = ctx.saved_tensors
        lambda_logit, probs, weighted, lora_A, gate, weight_in, *rest = saved
        sizes, g, mlp = ctx.sizes, ctx.sizes.members, (bias_in, weight_out, bias_out)
        frozen, lora_B = rest[:g], rest[g:]
        need_x, products = ctx.needs_input_grad[0], products_for(x_TD)
        num_rows = sizes.of_experts + sizes.of_routing * (2 if _in_two(x_TD) else 1)
        grad_rows, grad_x, grad_lora_B = x_TD.new_empty(num_rows, sizes.tokens), None, []
        for i, grad in enumerate(grads[:g]):
            of_member = sizes.experts * sizes.r
            grad_v = grad_rows[i * of_member : (i + 1) * of_member]
            if grad is None:
                grad_v.zero_()
                grad_lora_B.append(None)
                continue
            grad = grad.contiguous()
            if need_x:
                factors = (grad, frozen[i])
                grad_x = products.mm(*factors) if grad_x is None else products.add_mm_(grad_x, *factors)
            grad_lora_B.append(products.mm(weighted[i], grad).view_as(lora_B[i]))
            products.mm(lora_B[i].flatten(0, 1), grad.t(), out=grad_v)
        of_mlp = ctx.backend.backward(rows, mlp, mask, lambda_logit, probs, grads[g], grad_rows, sizes)
        if need_x:
            grad_x = torch.zeros_like(x_TD) if grad_x is None else grad_x
            routing = [gate.view(-1, gate.shape[-1]), weight_in]
            stacked = torch.cat([lora_A.view(-1, lora_A.shape[-1]), *routing, *(routing if _in_two(x_TD) else [])])
            if keep is None:
                products.add_mm_(grad_x, grad_rows.t(), stacked)
            else:
                Dropped(x_TD, keep, ctx.scale).add_gradient_(grad_x, products.mm(grad_rows.t(), stacked))
        of_weights = (*_weight_gradients(grad_rows, x_TD, sizes), *_mlp_gradients(of_mlp, sizes.units, x_TD.dtype))
        return grad_x, None, None, None, None, None, *of_weights, *[None] * g, *grad_lora_B


def _in_two(x_TD: Tensor) -> bool:
    """Whether float32 gradients go into products with x as sums of two numbers."""
    return x_TD.dtype == torch.bfloat16


def _weight_gradients(grad_rows: Tensor, x_TD: Tensor, sizes: GroupSizes) -> tuple[Tensor, Tensor, Tensor]:
    """Of lora_A ``(G, E, r, D)``, gate ``(G, E, D)`` and weight_in ``(H, D)``, in the dtype of x."""
    d, pieces = x_TD.shape[1], [sizes.of_experts, sizes.of_routing]
    if _in_two(x_TD):
        of_experts, rounded, rest = exact_product(grad_rows, x_TD).split([*pieces, sizes.of_routing])
        of_experts = of_experts.to(x_TD.dtype)
        of_routing = torch.add(rounded, rest, out=x_TD.new_empty(rounded.shape))
    else:
        of_experts, of_routing = products_for(x_TD).mm(grad_rows, x_TD).split(pieces)
    of_gate, of_weight_in = of_routing.split([sizes.members * sizes.experts, sizes.units])
    experts = (sizes.members, sizes.experts)
    return of_experts.view(*experts, sizes.r, d), of_gate.view(*experts, d), of_weight_in


def _mlp_gradients(of_mlp: Tensor, units: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of bias_in ``(H,)``, weight_out ``(1, H)`` and bias_out ``(1,)``."""
    of_weight_out, of_bias_in, of_bias_out = of_mlp.to(dtype).split([units, units, 1])
    return of_bias_in, of_weight_out.unsqueeze(0), of_bias_out


def group_product(
    x_TD: Tensor, mask_T: Tensor | None, weights: GroupWeights, spec: RoutingSpec, dropped: Dropped | None = None
) -> GroupResult:
    """All projections of an input group.

    Args:
        x_TD: Tokens, ``(T, D)`` contiguous, in the weights' dtype; T may be 0.
        mask_T: bool, True for tokens that are not padding; or None.
        weights: Of frozen layers, experts, router and lambda MLP.
        spec: Of the routing; without a plan.
        dropped: x after dropout, for router and experts; the frozen layers read x as it is.
    """
    mask = None if mask_T is None else mask_T.contiguous().view(torch.uint8)
    routing = [w.contiguous() for w in (weights.lora_A, weights.gate, *weights.lambda_mlp)]
    found = _GroupProduct.apply(
        x_TD, dropped, mask, spec, weights.scaling, weights.biases, *routing, *weights.frozen, *weights.lora_B
    )
    g = len(weights.frozen)
    return GroupResult(list(found[:g]), *found[g:])


def group_product_reference(
    x_TD: Tensor, mask_T: Tensor | None, weights: GroupWeights, spec: RoutingSpec, dropped: Dropped | None = None
) -> GroupResult:
    """The same from the references of its parts, differentiated by autograd; in any float dtype."""
    x_in, x_TD = x_TD, x_TD if dropped is None else x_TD * dropped.keep * dropped.scale
    weight_in, bias_in, weight_out, bias_out = weights.lambda_mlp
    g, e = weights.lora_A.shape[:2]
    h, logits, hidden_HT = shared_input_reference(x_TD, weights.lora_A, weights.gate, (weight_in, bias_in))
    logits = logits.view(g, e, -1)
    probs, lam, sums, _ = routing_reference(logits, (weight_out @ hidden_HT)[0] + bias_out, mask_T, spec)
    outputs = [
        LowRankUpdate(h[i], probs[i].to(x_in.dtype), weights.lora_B[i], weights.scaling).add_to_reference(
            F.linear(x_in, weights.frozen[i], weights.biases[i])
        )
        for i in range(g)
    ]
    return GroupResult(outputs, sums, logits, probs, lam, (hidden_HT > 0).any(1))

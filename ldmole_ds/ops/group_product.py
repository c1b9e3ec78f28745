"""A whole input group on a CPU as one node of the graph: frozen layers, experts, router and lambda.

Shape legend: T tokens, D in_features, O out_features, G projections, E experts, r rank, H hidden units of the lambda
MLP, N = G E r + G E + H rows.

    R = [h; u; s] = [A; G; W1] x
    lambda of s, routing weights p of u and lambda, v = scaling p h        (``csrc/group.c``)
    y_g = W_g x + B_g v_g

On a CPU a small operation between two large products costs ten times what it costs alone: the products have taken the
caches, and its code and data come from memory. So the fewest of them: three calls forward and four backward, and two or
three products for each projection. The same in separate nodes is `shared_input`, `fused_routing` and `frozen_product`,
which serve every other case; `group_product_reference` puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ldmole_ds.ops import cpu_kernels
from ldmole_ds.ops.fused_routing import routing_reference
from ldmole_ds.ops.low_rank_update import LowRankUpdate
from ldmole_ds.ops.matrix_products import products_for
from ldmole_ds.ops.routing_spec import RoutingSpec
from ldmole_ds.ops.shared_input import shared_input_reference


@dataclass(frozen=True)
class GroupWeights:
    """Everything that an input group multiplies with, float32.

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
        logits_GET, probs_GET, lam_T: Of the router, without graph.
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
        ctx, x_in, x_TD, mask, spec, scaling, biases, lora_A, gate, weight_in, bias_in, weight_out, bias_out, *rest
    ):
        (g, e, r, _), t, units = lora_A.shape, x_TD.shape[0], len(bias_in)
        frozen, lora_B = rest[:g], rest[g:]
        stacked = torch.cat([lora_A.flatten(0, 2), gate.flatten(0, 1), weight_in])
        products = products_for(x_TD)
        rows = products.mm(stacked, x_TD.t())
        lambda_logit, lam = x_TD.new_empty(t), x_TD.new_empty(t)
        live = x_TD.new_empty(units, dtype=torch.uint8)
        probs, sums = x_TD.new_empty(g, e, t), x_TD.new_empty(1, g, 2 * e + 3)
        weighted = x_TD.new_empty(g, e * r, t)
        ctx.sizes = (t, e, g, r, units, spec.target_num_experts, spec.mask_padding, scaling)
        mlp = (bias_in, weight_out, bias_out)
        cpu_kernels.call("group_forward", rows, *mlp, mask, lambda_logit, live, probs, lam, sums, weighted, *ctx.sizes)
        outputs = []
        for weight, bias, B, rows_g in zip(frozen, biases, lora_B, weighted.unbind(), strict=True):
            outputs.append(products.add_mm_(products.linear(x_in, weight, bias), rows_g.t(), B.flatten(0, 1)))
        logits = rows[g * e * r : g * e * (r + 1)].view(g, e, t)
        ctx.save_for_backward(
            None if x_in is x_TD else x_in, x_TD, mask, stacked, rows, lambda_logit, probs, weighted, weight_out, *rest
        )
        ctx.mark_non_differentiable(logits, probs, lam)
        ctx.set_materialize_grads(False)
        return *outputs, sums, logits, probs, lam, live.view(torch.bool)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x_in, x_TD, mask, stacked, rows, lambda_logit, probs, weighted, weight_out, *rest = ctx.saved_tensors
        t, e, g, r, units, *_ = ctx.sizes
        frozen, lora_B = rest[:g], rest[g:]
        need_in, need_x = ctx.needs_input_grad[:2]
        products = products_for(x_TD)
        grad_rows, grad_in, grad_lora_B = torch.empty_like(rows), None, []
        for i, grad in enumerate(grads[:g]):
            grad_u = grad_rows[i * e * r : (i + 1) * e * r]
            if grad is None:
                grad_u.zero_()
                grad_lora_B.append(None)
                continue
            grad = grad.contiguous()
            if need_in:
                factors = (grad, frozen[i])
                grad_in = products.mm(*factors) if grad_in is None else products.add_mm_(grad_in, *factors)
            grad_lora_B.append(products.mm(weighted[i], grad).view_as(lora_B[i]))
            products.mm(lora_B[i].flatten(0, 1), grad.t(), out=grad_u)
        grad_sums = None if grads[g] is None else grads[g].contiguous()
        grad_mlp = x_TD.new_empty(2 * units + 1)
        inputs = (rows, weight_out, mask, lambda_logit, probs, grad_sums, grad_rows)
        cpu_kernels.call("group_backward", *inputs, grad_mlp, *ctx.sizes)
        grad_x = None
        if need_x and x_in is None and grad_in is not None:  # one x: its gradient is that of x_in
            products.add_mm_(grad_in, grad_rows.t(), stacked)
        elif need_x:
            grad_x = products.mm(grad_rows.t(), stacked)
        grad_A, grad_gate, grad_in_H = torch.split_with_sizes(products.mm(grad_rows, x_TD), [g * e * r, g * e, units])
        of_weights = (grad_A.view(g, e, r, -1), grad_gate.view(g, e, -1), grad_in_H)
        grad_out, grad_bias, grad_bias_out = grad_mlp.split_with_sizes([units, units, 1])
        of_weights += (grad_bias, grad_out.view_as(weight_out), grad_bias_out)
        return grad_in, grad_x, None, None, None, None, *of_weights, *[None] * g, *grad_lora_B


def group_product(
    x_in: Tensor, x_TD: Tensor, mask_T: Tensor | None, weights: GroupWeights, spec: RoutingSpec
) -> GroupResult:
    """All projections of an input group.

    Args:
        x_in: What the frozen layers read, ``(T, D)`` contiguous float32; T may be 0.
        x_TD: What router and experts read: the same tensor, or after dropout.
        mask_T: bool, True for tokens that are not padding; or None.
        weights: Of frozen layers, experts, router and lambda MLP.
        spec: Of the routing; without a plan.
    """
    mask = None if mask_T is None else mask_T.contiguous().view(torch.uint8)
    weight_in, *small = weights.lambda_mlp
    routing = (weights.lora_A, weights.gate, weight_in, *(w.contiguous() for w in small))
    found = _GroupProduct.apply(
        x_in, x_TD, mask, spec, weights.scaling, weights.biases, *routing, *weights.frozen, *weights.lora_B
    )
    g = len(weights.frozen)
    return GroupResult(list(found[:g]), *found[g:])


def group_product_reference(
    x_in: Tensor, x_TD: Tensor, mask_T: Tensor | None, weights: GroupWeights, spec: RoutingSpec
) -> GroupResult:
    """The same from the references of its parts, differentiated by autograd; in any float dtype."""
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

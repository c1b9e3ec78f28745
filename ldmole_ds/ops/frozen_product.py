"""A frozen layer with the experts' sum, as one node of the graph that hands its input on.

    y = W x + b + scaling * sum_i p_i B_i h_i        next x = x

Projections that read the same x would each return a gradient of x, and autograd would add those tensors up one by one.
Here each product returns x beside y for the next one to read. Backward runs the other way round: the gradient of x goes
from hand to hand, and each product adds its own to it in place.

Shape legend: T tokens, D in_features, O out_features, e experts, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as all_modules

from ldmole_ds.ops.autocast import autocast_is_on
from ldmole_ds.ops.low_rank_update import LowRankUpdate, add_product, product_gradients
from ldmole_ds.ops.matrix_products import products_for

# Subclasses hold quantised or sharded weights. Fake tensors stand for plain ones.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight, bias, h_XT, p_eT, lora_B, scaling, shape, hand_on):
        ctx.save_for_backward(weight, h_XT, p_eT, lora_B)
        ctx.scaling = scaling
        y_TO = products_for(x_TD).linear(x_TD, weight, bias)
        add_product(y_TO, h_XT, p_eT, lora_B, scaling)
        y = torch.ops.aten._unsafe_view(y_TO, [*shape, y_TO.shape[1]])  # not a view: it may be changed in place
        return (y, x_TD.detach()) if hand_on else y

    @staticmethod
    def backward(ctx, grad, grad_next=None):
        weight, h_XT, p_eT, lora_B = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1]).contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            # Nobody else has the gradient of an input that was handed on: the next product made it.
            products = products_for(grad_TO)
            factors = (grad_TO, weight)
            grad_x = products.mm(*factors) if grad_next is None else products.add_mm_(grad_next, *factors)
        grads = product_gradients(grad_TO, h_XT, p_eT, lora_B, ctx.scaling, ctx.needs_input_grad[3:6])
        return grad_x, None, None, *grads, None, None, None


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        y_TO = products_for(x).linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return torch.ops.aten._unsafe_view(y_TO, [*x.shape[:-1], y_TO.shape[1]])  # it may be changed in place

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1]).contiguous()
        return products_for(grad_TO).mm(grad_TO, weight).view(*grad.shape[:-1], weight.shape[1]), None, None


def is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether calling this frozen layer on x is a product with its weight and nothing else.

    Not if it is quantised or otherwise special, if hooks or a replaced ``forward`` wait for the call (ZeRO-3 and
    offloading gather weights in them), or if autocast would change the product's dtype.
    """
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or any(getattr(layer, name) for name in _HOOKS):
        return False
    if any(getattr(all_modules, f"_global{name}") for name in _HOOKS) or autocast_is_on(x):
        return False
    weight = layer.weight
    trains = weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    return type(weight) in _PLAIN_TENSORS and weight.dtype == x.dtype and not trains


def frozen_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, ``(..., D) -> (..., O)``: a new tensor, by `products_for` where the layer `is_plain`."""
    if torch.compiler.is_compiling() or not is_plain(layer, x):
        return layer(x)
    return _FrozenLinear.apply(x, layer.weight, layer.bias)


def frozen_product(
    layer: nn.Linear, x_TD: Tensor, update: LowRankUpdate, shape: torch.Size, hand_on: bool
) -> tuple[Tensor, Tensor]:
    """``layer(x)`` with the update, and x for the next product.

    Args:
        layer: For which `is_plain` holds.
        x_TD: ``(T, D)`` in the dtype of the layer and the update.
        update: The experts' sum, in factors.
        shape: Of the tokens: that of the result without O.
        hand_on: Whether another product will read the returned x; else it is x itself.

    Returns:
        ``(*shape, O)``, and ``(T, D)``, which nothing but that product may read.
    """
    factors = (update.h_XT, update.p_eT, update.lora_B, update.scaling)
    hand_on = hand_on and x_TD.requires_grad and torch.is_grad_enabled()
    found = _FrozenProduct.apply(x_TD, layer.weight, layer.bias, *factors, shape, hand_on)
    return found if hand_on else (found, x_TD)

"""Everything that an input group multiplies its input with, as one product.

Shape legend: T tokens, D in_features, N rows of all weights together, H hidden units of the lambda MLP.

    [h; u; s] = [A; G; W1] x        hidden = relu(s + b1)

The LoRA A matrices, the routers and the lambda MLP's first layer read the same x. One product over their stacked rows
reads x once forward, and backward gives one gradient of x, where three products would read x three times and add three
gradients of its size. Only x and the ReLU's result are kept. Results are feature-major, ``(N, T)``: each weight's rows
are one contiguous block, and what is done per expert runs along the tokens.

Router and lambda MLP are computed in float32 whatever the dtype of the experts; in half precision that makes two
products, A's and theirs, and x is kept in its own dtype alone. A product of two bfloat16 numbers is exact in float32:
on a GPU theirs runs on the tensor cores, which add up in float32, so that the numbers stay the same and no float32 copy
of x is needed. Its float32 gradients go there as a sum of two bfloat16 numbers each, which keeps 16 of their bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmole_ds.ops.matrix_products import exact_product, products_for
from ldmole_ds.ops.planned import on_gpu

# (weight, bias) of the lambda MLP's first layer.
FirstLayer = tuple[Tensor, Tensor]


class _SharedInput(torch.autograd.Function):
    """Results: one for each projection of lora_A, then those in float32, of which the last has bias and ReLU.

    With ``hand_on`` also x, for `ldmole_ds.ops.frozen_product`: backward adds to what comes back, in place.
    """

    @staticmethod
    def forward(ctx, hand_on, x_TD, bias_H, lora_A, *routing):
        results: list[Tensor] = []
        for weights, wide in _products(x_TD.dtype, lora_A, routing):
            sizes = [rows for w in weights for rows in _piece_sizes(w, w is lora_A)]
            results += _rows_times_x(weights, x_TD, wide).split(sizes)
        ctx.bias_dtype = None if bias_H is None else bias_H.dtype
        if bias_H is not None:
            results[-1].add_(_cast(bias_H, True).unsqueeze(1)).relu_()
        ctx.save_for_backward(x_TD, None if bias_H is None else results[-1], lora_A, *routing)
        ctx.hand_on = hand_on
        return (*results, x_TD.detach()) if hand_on else tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        x_TD, hidden_HT, lora_A, *routing = ctx.saved_tensors
        grads, grad_bias = list(grads), None
        grad_x = grads.pop() if ctx.hand_on else None
        if hidden_HT is not None:
            grads[-1] = torch.ops.aten.threshold_backward(grads[-1], hidden_HT, 0)
            grad_bias = grads[-1].sum(1).to(ctx.bias_dtype)
        _, need_x, _, *need_weights = ctx.needs_input_grad
        grad_weights = [] if lora_A is not None else [None]
        for weights, wide in _products(x_TD.dtype, lora_A, routing):
            pieces = sum(len(_piece_sizes(w, w is lora_A)) for w in weights)
            grad_NT, grads = torch.cat(grads[:pieces]), grads[pieces:]
            halves = _in_two(grad_NT, x_TD.dtype) if wide and _on_tensor_cores(x_TD, weights) else None
            if need_x:
                grad_x = _gradient_of_x(grad_NT, halves, weights, x_TD, wide, grad_x)
            if any(need_weights):
                product = _gradient_of_weights(grad_NT, halves, x_TD, wide)
                rows = product.split([w.numel() // w.shape[-1] for w in weights])
                grad_weights += [row.view(w.shape) for row, w in zip(rows, weights, strict=True)]
        return None, grad_x, grad_bias, *(grad_weights if any(need_weights) else [None] * len(need_weights))


def _rows_times_x(weights: Sequence[Tensor], x_TD: Tensor, wide: bool) -> Tensor:
    """``(N, T)``."""
    if wide and _on_tensor_cores(x_TD, weights):
        return exact_product(_stacked(weights, False), x_TD.t())
    return products_for(x_TD).mm(_stacked(weights, wide), _cast(x_TD, wide).t())


def _gradient_of_x(
    grad_NT: Tensor, halves: Tensor | None, weights: Sequence[Tensor], x_TD: Tensor, wide: bool, grad_x: Tensor | None
) -> Tensor:
    """``(T, D)`` in the dtype of x, added to ``grad_x``."""
    if halves is not None:
        factors = halves.t(), _stacked(weights, False).repeat(2, 1)
        return torch.mm(*factors) if grad_x is None else grad_x.addmm_(*factors)
    factors, products = (grad_NT.t(), _stacked(weights, wide)), products_for(x_TD)
    if grad_x is not None and grad_x.dtype == grad_NT.dtype:
        return products.add_mm_(grad_x, *factors)
    product = products.mm(*factors).to(x_TD.dtype)
    return product if grad_x is None else grad_x.add_(product)


def _gradient_of_weights(grad_NT: Tensor, halves: Tensor | None, x_TD: Tensor, wide: bool) -> Tensor:
    """``(N, D)`` in the dtype of x."""
    if halves is not None:
        return exact_product(halves, x_TD).view(2, len(grad_NT), -1).sum(0).to(x_TD.dtype)
    return products_for(x_TD).mm(grad_NT, _cast(x_TD, wide)).to(x_TD.dtype)


def _on_tensor_cores(x_TD: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether products of x and these weights are exact in float32 and quick there; see the module docstring."""
    is_bf16 = all(t.dtype == torch.bfloat16 for t in (x_TD, *weights))  # float16 has too small a range for gradients
    return on_gpu(x_TD) and is_bf16 and len(x_TD) > 0


def _in_two(grad_NT: Tensor, dtype: torch.dtype) -> Tensor:
    """``(2 N, T)``: the gradient rounded, and what rounding left out."""
    rounded = grad_NT.to(dtype)
    return torch.cat([rounded, (grad_NT - rounded).to(dtype)])


def _products(dtype: torch.dtype, lora_A: Tensor | None, routing: Sequence[Tensor]) -> list[tuple[list[Tensor], bool]]:
    """What is multiplied together, and whether in a wider dtype than x's: router and lambda MLP, in half precision."""
    experts, routing = [] if lora_A is None else [lora_A], list(routing)
    if dtype.itemsize >= torch.float32.itemsize:
        return [(experts + routing, False)]
    return [(weights, wide) for weights, wide in ((experts, False), (routing, True)) if weights]


def _piece_sizes(weight: Tensor, by_projection: bool) -> list[int]:
    rows = weight.numel() // weight.shape[-1]
    return [rows // len(weight)] * len(weight) if by_projection else [rows]


def _cast(tensor: Tensor, wide: bool) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if wide else tensor


def _stacked(weights: Sequence[Tensor], wide: bool) -> Tensor:
    rows = [w.reshape(-1, w.shape[-1]) for w in weights]
    return _cast(torch.cat(rows) if len(rows) > 1 else rows[0], wide)


def shared_input(
    x_TD: Tensor,
    lora_A: Tensor | None,
    gate: Tensor | None,
    first_layer: FirstLayer | None,
    hand_on: bool = False,
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None, Tensor]:
    """All products of one input; see the module docstring.

    Args:
        x_TD: Tokens, ``(T, D)``; T may be 0.
        lora_A: ``(G, e, r, D)`` in the dtype of x; None when it is not wanted here.
        gate: ``(G, E, D)`` router weights, or None.
        first_layer: Weight ``(H, D)`` and bias ``(H,)`` of the lambda MLP's first layer, or None.
        hand_on: One product, and nothing else, will read the returned x (`ldmole_ds.ops.frozen_product`).

    Returns:
        h, G times ``(e * r, T)`` in the dtype of x; logits ``(G * E, T)`` and hidden ``(H, T)`` after the ReLU, both
        float32 (float64 for float64 input); None for what was not asked for. Last x, as it is.
    """
    if torch.compiler.is_compiling():
        return *shared_input_reference(x_TD, lora_A, gate, first_layer), x_TD
    weight_in, bias_in = first_layer or (None, None)
    routing = [w for w in (gate, weight_in) if w is not None]
    if lora_A is None and not routing:
        return None, None, None, x_TD
    hand_on = hand_on and x_TD.requires_grad and torch.is_grad_enabled()
    results = list(_SharedInput.apply(hand_on, x_TD, bias_in, lora_A, *routing))
    x_TD = results.pop() if hand_on else x_TD
    hidden = None if first_layer is None else results.pop()
    logits = None if gate is None else results.pop()
    return None if lora_A is None else results, logits, hidden, x_TD


def shared_input_reference(
    x_TD: Tensor, lora_A: Tensor | None, gate: Tensor | None, first_layer: FirstLayer | None
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    """The same, product by product, differentiated by autograd."""
    wide = _cast(x_TD, True)
    h = logits = hidden = None
    if lora_A is not None:
        h = [F.linear(x_TD, a.flatten(0, 1)).t() for a in lora_A]
    if gate is not None:
        logits = F.linear(wide, gate.flatten(0, 1).to(wide.dtype)).t()
    if first_layer is not None:
        weight, bias = (t.to(wide.dtype) for t in first_layer)
        hidden = F.linear(wide, weight, bias).relu().t()
    return h, logits, hidden

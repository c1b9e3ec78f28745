"""Everything that an input group multiplies its input with, as one product.

Shape legend: T tokens, D in_features, N rows of all weights together, H hidden units of the lambda MLP.

    [h; u; s] = [A; G; W1] x        hidden = relu(s + b1)

The LoRA A matrices, the routers and the lambda MLP's first layer read the same x. One product over their stacked rows
reads x once forward, and backward gives one gradient of x, where three products would read x three times and add three
gradients of its size. Only x and the ReLU's result are kept. Results are feature-major, ``(N, T)``: each weight's rows
are one contiguous block, and what is done per expert runs along the tokens.

Router and lambda MLP are computed in float32 whatever the dtype of the experts; in half precision that makes two
products, A's and theirs, and x is kept in its own dtype alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, bias_H, num_experts_rows, *weights):
        """``weights``: first those of the experts, then those computed in float32, of which the last has the bias."""
        split = num_experts_rows
        ctx.one_product = x_TD.dtype == torch.promote_types(x_TD.dtype, torch.float32)
        parts = [weights] if ctx.one_product else [weights[:split], weights[split:]]
        outputs: list[Tensor] = []
        for i, part in enumerate(parts):
            if part:
                product = _stacked(part, i) @ _wide(x_TD, i).t()
                outputs += product.split([w.shape[0] for w in part])
        if bias_H is not None:
            outputs[-1].add_(_wide(bias_H, 1).unsqueeze(1)).relu_()
        ctx.split, ctx.bias_dtype = split, None if bias_H is None else bias_H.dtype
        ctx.save_for_backward(x_TD, outputs[-1] if bias_H is not None else None, *weights)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        x_TD, hidden_HT, *weights = ctx.saved_tensors
        grads, grad_bias = list(grads), None
        if hidden_HT is not None:
            grads[-1] = torch.ops.aten.threshold_backward(grads[-1], hidden_HT, 0)
            grad_bias = grads[-1].sum(1).to(ctx.bias_dtype)
        need_x, _, _, *need_weights = ctx.needs_input_grad
        slices = [slice(None)] if ctx.one_product else [slice(ctx.split), slice(ctx.split, None)]
        grad_x, grad_weights = None, []
        for i, part in enumerate(slices):
            if not weights[part]:
                continue
            grad_NT, wide_x = torch.cat(grads[part]), _wide(x_TD, i)
            if need_x:
                product = (grad_NT.t() @ _stacked(weights[part], i)).to(x_TD.dtype)
                grad_x = product if grad_x is None else grad_x.add_(product)
            if any(need_weights):
                product = (grad_NT @ wide_x).to(x_TD.dtype)
                grad_weights += product.split([w.shape[0] for w in weights[part]])
        return grad_x, grad_bias, None, *(grad_weights or [None] * len(weights))


def _wide(x: Tensor, part: int) -> Tensor:
    """float32 (or wider) for the second part, the router's."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if part else x


def _stacked(weights: Sequence[Tensor], part: int) -> Tensor:
    return _wide(torch.cat(weights) if len(weights) > 1 else weights[0], part)


def shared_input(
    x_TD: Tensor,
    lora_A: Tensor | None,
    gate: Tensor | None,
    lambda_in: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """All products of one input; see the module docstring.

    Args:
        x_TD: Tokens, ``(T, D)``; T may be 0.
        lora_A: ``(R, D)``, all rows of the experts' A matrices, in the dtype of x; None when they are not wanted here.
        gate: ``(N, D)`` router weights, or None.
        lambda_in: Weight ``(H, D)`` and bias ``(H,)`` of the lambda MLP's first layer, or None.

    Returns:
        ``h (R, T)`` in the dtype of x, ``logits (N, T)`` and ``hidden (H, T)`` after the ReLU, both float32 (float64
        for float64 input); None for what was not asked for.
    """
    if torch.compiler.is_compiling():
        return shared_input_reference(x_TD, lora_A, gate, lambda_in)
    weight_in, bias_in = lambda_in or (None, None)
    given = [w is not None for w in (lora_A, gate, weight_in)]
    if not any(given):
        return None, None, None
    weights = [w for w in (lora_A, gate, weight_in) if w is not None]
    results = iter(_SharedInput.apply(x_TD, bias_in, int(given[0]), *weights))
    h, logits, hidden = (next(results) if there else None for there in given)
    return h, logits, hidden


def shared_input_reference(
    x_TD: Tensor,
    lora_A: Tensor | None,
    gate: Tensor | None,
    lambda_in: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same, product by product, differentiated by autograd."""
    wide = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    h = None if lora_A is None else F.linear(x_TD, lora_A).t()
    logits = None if gate is None else F.linear(wide, gate.to(wide.dtype)).t()
    hidden = None
    if lambda_in is not None:
        weight, bias = (t.to(wide.dtype) for t in lambda_in)
        hidden = F.linear(wide, weight, bias).relu().t()
    return h, logits, hidden

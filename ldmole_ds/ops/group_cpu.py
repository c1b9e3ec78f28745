"""`ldmole_ds.ops.group_product` on a CPU in float32, by ``csrc/group.c``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmole_ds.ops import cpu_kernels
from ldmole_ds.ops.group_rows import BetweenProducts, GroupSizes


def forward(
    rows: Tensor, mlp: Sequence[Tensor], mask: Tensor | None, sizes: GroupSizes, dtype: torch.dtype
) -> BetweenProducts:
    """What comes between the products; the hidden units' rows get bias and ReLU in place."""
    found = BetweenProducts.empty(rows, sizes, 1, dtype)
    written = (found.lambda_logit, found.live, found.probs, found.lam, found.sums, found.weighted)
    cpu_kernels.call("group_forward", rows, *mlp, mask, *written, *sizes)
    return found


def backward(
    rows: Tensor,
    mlp: Sequence[Tensor],
    mask: Tensor | None,
    lambda_logit: Tensor,
    probs: Tensor,
    grad_sums: Tensor | None,
    grad_rows: Tensor,
    sizes: GroupSizes,
) -> Tensor:
    """Gradients of all rows, into ``grad_rows``, whose first come as those of the weighted rows.

    Returns:
        ``(2 H + 1,)``: the gradients of weight_out, bias_in and bias_out.
    """
    grad_mlp = rows.new_empty(2 * sizes.units + 1)
    grad_sums = None if grad_sums is None else grad_sums.contiguous()
    inputs = (rows, mlp[1], mask, lambda_logit, probs, grad_sums, grad_rows)
    cpu_kernels.call("group_backward", *inputs, grad_mlp, *sizes)
    return grad_mlp

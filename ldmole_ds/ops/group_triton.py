"""`ldmole_ds.ops.group_product` on a GPU: launches the kernels of ``group_kernel.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmole_ds.ops.group_rows import BetweenProducts, GroupSizes
from ldmole_ds.ops.routing_triton import constants, tiles
from ldmole_ds.ops.triton_launch import launch

# Values of h, or of hidden units, that a program holds at a time.
TILE = 2048


def _blocks(sizes: GroupSizes, mask: Tensor | None) -> tuple[dict, int]:
    """What the kernels are compiled for, and the number of programs."""
    e_pad, block, programs = tiles(sizes.experts, sizes.tokens)
    found = constants(sizes.experts, mask, sizes.target, sizes.mask_padding, e_pad, block)
    found["R_BLOCK"] = min(_power_of_two(sizes.r), max(TILE // (e_pad * block), 1))
    found["H_BLOCK"] = min(_power_of_two(sizes.units), max(TILE // block, 16))
    return found, programs


def _numbers(sizes: GroupSizes) -> tuple[float, ...]:
    """As both kernels take them."""
    return sizes.tokens, sizes.experts, sizes.members, sizes.r, sizes.units, sizes.target, sizes.scaling


def _power_of_two(number: int) -> int:
    """That is not below it."""
    return 1 << (number - 1).bit_length()


def forward(
    rows: Tensor, mlp: Sequence[Tensor], mask: Tensor | None, sizes: GroupSizes, dtype: torch.dtype
) -> BetweenProducts:
    """What comes between the products; ``rows`` stay as they are."""
    blocks, programs = _blocks(sizes, mask)
    found = BetweenProducts.empty(rows, sizes, programs, dtype)
    launch(
        "group_kernel.group_forward_kernel",
        programs,
        *(rows, *mlp, rows if mask is None else mask),
        *(found.lambda_logit, found.live, found.probs, found.lam, found.sums, found.weighted),
        *_numbers(sizes),
        **blocks,
    )
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

    In half precision router and lambda MLP have a second time as many rows, of what rounding left out of theirs.

    Returns:
        ``(2 H + 1,)`` float32: the gradients of weight_out, bias_in and bias_out.
    """
    blocks, programs = _blocks(sizes, mask)
    grad_mlp = rows.new_empty(programs, 2 * sizes.units + 1)
    bias_in, weight_out, _ = mlp
    launch(
        "group_kernel.group_backward_kernel",
        programs,
        *(rows, bias_in, weight_out, rows if mask is None else mask, lambda_logit),
        *(rows if grad_sums is None else grad_sums, grad_rows, grad_mlp),
        *_numbers(sizes),
        *((0, 0, 0) if grad_sums is None else grad_sums.stride()),
        HAS_GRAD_SUMS=grad_sums is not None,
        SPLIT=len(grad_rows) > sizes.of_experts + sizes.of_routing,
        **blocks,
    )
    return grad_mlp.sum(0)

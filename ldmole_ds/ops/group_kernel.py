"""Triton kernels of `ldmole_ds.ops.group_product`: what comes between an input group's products, one launch each way.

T tokens, G members, E experts, r rank, H hidden units of the lambda MLP. ``rows`` is the float32 product of all that
the group multiplies its input with, tokens innermost:

    G * E * r rows h = A x      then G * E rows of router logits      then H rows before the lambda MLP's bias and ReLU

Forward makes lambda of the last, routing weights p of the logits and lambda, and ``scaling * p * h``. Backward turns
the gradient of that into the gradient of all rows. Each reads and writes every row once. Routing is that of
`ldmole_ds.ops.sparsegen_block`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ldmole_ds.ops.sparsegen_block import (
    gradients_of,
    lambda_of,
    load_logits,
    sparsegen_of,
    store_sums,
    tokens_of_block,
)


@triton.jit
def _hidden_units(rows, at, bias_in, units, in_units, in_tokens):
    """``relu(s + b)`` of some units, ``(H_BLOCK, BLOCK_T)``; NaN stays NaN, and what is outside is 0."""
    here = in_units[:, None] & in_tokens[None, :]
    bias = tl.load(bias_in + units, mask=in_units, other=0.0).to(tl.float32)
    value = tl.load(rows + at, mask=here, other=0.0) + bias[:, None]
    return tl.where(here, tl.where(value < 0, 0.0, value), 0.0)


@triton.jit
def _store_gradient(grad_rows, at, rest_at, value, here, SPLIT: tl.constexpr):
    """In the dtype of the products; with SPLIT what rounding leaves out as well: the sum has twice the bits."""
    rounded = value.to(grad_rows.dtype.element_ty)
    tl.store(grad_rows + at, rounded, mask=here)
    if SPLIT:
        rest = (value - rounded.to(tl.float32)).to(grad_rows.dtype.element_ty)
        tl.store(grad_rows + rest_at, rest, mask=here)


@triton.jit
def group_forward_kernel(
    rows,  # (G E r + G E + H, T) float32
    bias_in,  # (H,)
    weight_out,  # (H,)
    bias_out,  # (1,)
    mask,  # (T,) uint8; not read without HAS_MASK
    lambda_logits,  # (T,) float32 out
    live,  # (H,) uint8 out: 1 where a unit fires on some token; comes as zeros
    probs,  # (G, E, T) float32 out
    lambdas,  # (T,) float32 out
    sums,  # (programs, G, 2 E + 3) float32 out
    weighted,  # (G E r, T) out
    num_tokens,
    num_experts,
    num_members,
    lora_rank,
    num_units,
    target,
    scaling,
    LAMBDA_TOP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_PADDING: tl.constexpr,
    SPARSITY: tl.constexpr,
    E_PAD: tl.constexpr,
    R_BLOCK: tl.constexpr,
    H_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0)
    tokens, in_tokens, real, routed = tokens_of_block(mask, num_tokens, HAS_MASK, MASK_PADDING, BLOCK_T)
    experts = tl.arange(0, E_PAD)
    in_experts = experts < num_experts
    here = in_experts[:, None] & in_tokens[None, :]
    num_pairs = num_members * num_experts

    logit = tl.zeros((BLOCK_T,), dtype=tl.float32) + tl.load(bias_out).to(tl.float32)
    for first in range(0, num_units, H_BLOCK):
        units = first + tl.arange(0, H_BLOCK)
        in_units = units < num_units
        at = (num_pairs * lora_rank + num_pairs + units).to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        hidden = _hidden_units(rows, at, bias_in, units, in_units, in_tokens)
        weight = tl.load(weight_out + units, mask=in_units, other=0.0).to(tl.float32)
        logit += tl.sum(hidden * weight[:, None], axis=0)
        fires = tl.max(tl.where(hidden > 0, 1, 0), axis=1)
        tl.store(live + units, fires.to(tl.uint8), mask=in_units & (fires > 0))  # all programs write the same
    lam, slack, lambda_is_good = lambda_of(logit, LAMBDA_TOP)
    tl.store(lambda_logits + tokens, logit, mask=in_tokens)
    tl.store(lambdas + tokens, lam, mask=in_tokens)

    for member in range(num_members):
        pairs = member * num_experts + experts
        at = (num_pairs * lora_rank + pairs).to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        z, largest, good = load_logits(rows, at, in_experts, in_tokens, lambda_is_good)
        _, _, _, p = sparsegen_of(z, slack)
        is_broken = in_tokens & (good == 0)
        weight = tl.where(is_broken[None, :], float("nan"), p)
        weight = tl.where(routed[None, :], weight, 0.0)
        tl.store(probs + pairs.to(tl.int64)[:, None] * num_tokens + tokens[None, :], weight, mask=here)
        row = sums + (program * num_members + member) * (2 * num_experts + 3)
        store_sums(row, z, p, largest, lam, real, routed, good, is_broken, experts, num_experts, target, SPARSITY)

        for first in range(0, lora_rank, R_BLOCK):
            rows_of_A = first + tl.arange(0, R_BLOCK)
            of_h = (pairs.to(tl.int64)[:, None] * lora_rank + rows_of_A[None, :])[:, :, None] * num_tokens
            of_h += tokens[None, None, :]
            inside = here[:, None, :] & (rows_of_A < lora_rank)[None, :, None]
            h = tl.load(rows + of_h, mask=inside, other=0.0)
            h *= (weight * scaling)[:, None, :]
            tl.store(weighted + of_h, h.to(weighted.dtype.element_ty), mask=inside)


@triton.jit
def group_backward_kernel(
    rows,  # as forward
    bias_in,  # (H,)
    weight_out,  # (H,)
    mask,  # (T,) uint8; not read without HAS_MASK
    lambda_logits,  # (T,) float32
    grad_sums,  # (programs, G, 2 E + 3) by strides; not read without HAS_GRAD_SUMS
    grad_rows,  # in: G E r rows, the gradient of `weighted`; out: that of all rows, and with SPLIT G E + H rows more
    grad_mlp,  # (programs, 2 H + 1) float32 out: of weight_out, bias_in and bias_out
    num_tokens,
    num_experts,
    num_members,
    lora_rank,
    num_units,
    target,
    scaling,
    sums_stride_program,
    sums_stride_g,
    sums_stride_column,
    LAMBDA_TOP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_PADDING: tl.constexpr,
    SPARSITY: tl.constexpr,
    HAS_GRAD_SUMS: tl.constexpr,
    SPLIT: tl.constexpr,
    E_PAD: tl.constexpr,
    R_BLOCK: tl.constexpr,
    H_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0)
    tokens, in_tokens, real, routed = tokens_of_block(mask, num_tokens, HAS_MASK, MASK_PADDING, BLOCK_T)
    experts = tl.arange(0, E_PAD)
    in_experts = experts < num_experts
    here = in_experts[:, None] & in_tokens[None, :]
    num_pairs = num_members * num_experts
    num_rest = num_pairs + num_units  # rows from a gradient to what its rounding left out

    logit = tl.load(lambda_logits + tokens, mask=in_tokens, other=0.0)
    lam, slack, lambda_is_good = lambda_of(logit, LAMBDA_TOP)
    grad_lam = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for member in range(num_members):
        pairs = member * num_experts + experts
        at = (num_pairs * lora_rank + pairs).to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        rest_at = (num_pairs * lora_rank + num_rest + pairs).to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        z, largest, good = load_logits(rows, at, in_experts, in_tokens, lambda_is_good)
        support, k, centred, p = sparsegen_of(z, slack)
        counts = routed & good
        weight = tl.where(counts[None, :], p, 0.0)

        grad = tl.zeros((E_PAD, BLOCK_T), dtype=tl.float32)
        for first in range(0, lora_rank, R_BLOCK):
            rows_of_A = first + tl.arange(0, R_BLOCK)
            of_h = (pairs.to(tl.int64)[:, None] * lora_rank + rows_of_A[None, :])[:, :, None] * num_tokens
            of_h += tokens[None, None, :]
            inside = here[:, None, :] & (rows_of_A < lora_rank)[None, :, None]
            h = tl.load(rows + of_h, mask=inside, other=0.0)
            grad_h = tl.load(grad_rows + of_h, mask=inside, other=0.0).to(tl.float32) * scaling
            grad += tl.sum(grad_h * h, axis=1)
            tl.debug_barrier()  # of a small tile each warp has a copy, and one of them writes over what all read
            tl.store(grad_rows + of_h, (grad_h * weight[:, None, :]).to(grad_rows.dtype.element_ty), mask=inside)
        row = grad_sums + program * sums_stride_program + member * sums_stride_g
        grad_u, by_lambda = gradients_of(
            tl.where(counts[None, :], grad, 0.0),
            row,
            sums_stride_column,
            z,
            largest,
            support,
            k,
            centred,
            slack,
            lam,
            real,
            routed,
            good,
            experts,
            num_experts,
            target,
            SPARSITY,
            HAS_GRAD_SUMS,
        )
        grad_lam += by_lambda
        _store_gradient(grad_rows, at, rest_at, grad_u, here, SPLIT)

    # d lambda / d logit = 1 - sigmoid(logit)
    grad_logit = tl.where(in_tokens & lambda_is_good, grad_lam / (1.0 + tl.exp(logit)), 0.0)
    row = grad_mlp + program * (2 * num_units + 1)
    for first in range(0, num_units, H_BLOCK):
        units = first + tl.arange(0, H_BLOCK)
        in_units = units < num_units
        of_unit = num_pairs * lora_rank + num_pairs + units
        at = of_unit.to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        rest_at = (of_unit + num_rest).to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        hidden = _hidden_units(rows, at, bias_in, units, in_units, in_tokens)
        weight = tl.load(weight_out + units, mask=in_units, other=0.0).to(tl.float32)
        grad_s = tl.where(hidden > 0, weight[:, None] * grad_logit[None, :], 0.0)
        _store_gradient(grad_rows, at, rest_at, grad_s, in_units[:, None] & in_tokens[None, :], SPLIT)
        tl.store(row + units, tl.sum(hidden * grad_logit[None, :], axis=1), mask=in_units)
        tl.store(row + num_units + units, tl.sum(grad_s, axis=1), mask=in_units)
    tl.store(row + 2 * num_units, tl.sum(grad_logit, axis=0))

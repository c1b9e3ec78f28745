"""Routing of one block of tokens, in Triton: what `routing_kernel` and `group_kernel` share.

A program takes BLOCK_T tokens and goes through the members of the group one after another, with all E experts of its
tokens in registers. Tokens are innermost in memory, so each expert's row is read and written as one contiguous piece.

The support is found without a sort, by Michelot's iteration (1986): begin with all experts, and drop those at or below

    tau = (sum of z over the support - (1 - lambda)) / k        z = u - max u, k experts in the support

until none is left to drop. tau only grows, so no expert is dropped that Sparsegen keeps; a few rounds do on most
inputs, E at worst. The best expert (z = 0) always stays, whatever rounding does. The backward finds the support again
from the logits, which costs less than keeping it.

Sums over tokens are written by program and added up outside: in a fixed order, unlike atomic additions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_of_block(mask, num_tokens, HAS_MASK: tl.constexpr, MASK_PADDING: tl.constexpr, BLOCK_T: tl.constexpr):
    """This program's tokens; which of them there are, which are not padding, and which are routed. ``(BLOCK_T,)``."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_tokens = tokens < num_tokens
    real = in_tokens
    if HAS_MASK:
        real = in_tokens & (tl.load(mask + tokens, mask=in_tokens, other=0) != 0)
    routed = real if MASK_PADDING else in_tokens
    return tokens, in_tokens, real, routed


@triton.jit
def lambda_of(logit, LAMBDA_TOP: tl.constexpr):
    """``lambda, 1 - lambda`` and whether Sparsegen is defined; 1 - lambda is formed without cancellation."""
    minimum = tl.where(logit > 0, 0.0, logit)
    log_sigmoid = minimum - tl.log(1.0 + tl.exp(-tl.abs(logit)))
    slack = (1.0 - LAMBDA_TOP) - log_sigmoid
    return log_sigmoid + LAMBDA_TOP, slack, (slack > 0) & (slack < float("inf"))


@triton.jit
def load_logits(logits, rows, in_experts, in_tokens, lambda_is_good):
    """Logits ``(E_PAD, BLOCK_T)`` less their maximum (-inf where there is no number), that maximum, and good tokens."""
    u = tl.load(logits + rows, mask=in_experts[:, None] & in_tokens[None, :], other=0.0).to(tl.float32)
    not_finite = tl.where(tl.abs(u) < float("inf"), 0, 1)
    good = in_tokens & lambda_is_good & (tl.max(not_finite, axis=0) == 0)
    here = in_experts[:, None] & good[None, :]
    largest = tl.where(good, tl.max(tl.where(here, u, float("-inf")), axis=0), 0.0)
    below = tl.maximum(u - largest[None, :], -1e30)  # so that no sum of them overflows
    return tl.where(here, below, float("-inf")), largest, good


@triton.jit
def sparsegen_of(z, slack):
    """Support (1 and 0), its size, ``p - 1/k`` on it and p. Tokens without a number (all -inf) get p = 0."""
    support = tl.where(z > float("-inf"), 1.0, 0.0)
    k = tl.sum(support, axis=0)
    dropped = 1.0
    while dropped > 0:
        total = tl.sum(tl.where(support > 0, z, 0.0), axis=0)
        tau = (total - slack) / tl.maximum(k, 1.0)
        support = tl.where((z > tau[None, :]) | (z >= 0), support, 0.0)
        fewer = tl.sum(support, axis=0)
        dropped = tl.max(k - fewer, axis=0)
        k = fewer
    k = tl.maximum(k, 1.0)
    mean = tl.sum(tl.where(support > 0, z, 0.0), axis=0) / k
    centred = tl.where(support > 0, (z - mean[None, :]) / slack[None, :], 0.0)
    return support, k, centred, tl.where(support > 0, tl.maximum(centred + 1.0 / k[None, :], 0.0), 0.0)


@triton.jit
def _lambda_gap(z, experts, lam, target):
    """``relu(lower_k - lambda)``, see `ldmole_ds.ops.losses.lower_lambda`; by taking the largest ``target`` times."""
    rest, above = z, tl.zeros_like(lam)
    for _ in range(target):
        largest = tl.max(rest, axis=0)
        above += largest
        first = tl.min(tl.where(rest == largest[None, :], experts[:, None], 1 << 30), axis=0)
        rest = tl.where(experts[:, None] == first[None, :], float("-inf"), rest)
    lower = 1.0 - (above - target * tl.max(rest, axis=0))
    return tl.maximum(lower - lam, 0.0)


@triton.jit
def store_sums(
    row, z, p, largest, lam, real, routed, good, is_broken, experts, num_experts, target, SPARSITY: tl.constexpr
):
    """One member's ``2 E + 3`` numbers of `Routing.sums`, of this block's tokens."""
    in_experts = experts < num_experts
    counted = tl.where(real[None, :], p, 0.0)
    tl.store(row + experts, tl.sum(tl.where(counted > 0, 1.0, 0.0), axis=1), mask=in_experts)
    tl.store(row + num_experts + experts, tl.sum(counted, axis=1), mask=in_experts)
    scalars = row + 2 * num_experts
    counts = routed & good
    gap_sum = 0.0
    if SPARSITY:
        gap_sum = tl.sum(tl.where(counts, _lambda_gap(z, experts, lam, target), 0.0), axis=0)
    tl.store(scalars, gap_sum)
    log_sum = largest + tl.log(tl.sum(tl.exp(z), axis=0))
    tl.store(scalars + 1, tl.sum(tl.where(counts, log_sum * log_sum, 0.0), axis=0))
    tl.store(scalars + 2, tl.sum(tl.where(is_broken, 1.0, 0.0), axis=0))


@triton.jit
def gradients_of(
    grad,  # of the routing weights of tokens that count, (E_PAD, BLOCK_T) float32
    row,  # of this member in the gradient of the sums; not read without HAS_GRAD_SUMS
    column_stride,
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
    SPARSITY: tl.constexpr,
    HAS_GRAD_SUMS: tl.constexpr,
):
    """One member's gradients: of the logits ``(E_PAD, BLOCK_T)``, and its share of lambda's ``(BLOCK_T,)``."""
    in_experts = experts < num_experts
    counts = routed & good
    if HAS_GRAD_SUMS:
        of_sum = tl.load(row + (num_experts + experts) * column_stride, mask=in_experts, other=0.0)
        grad += tl.where((real & good)[None, :], of_sum[:, None], 0.0)
    grad = tl.where(support > 0, grad, 0.0)
    mean = tl.sum(grad, axis=0) / k
    grad_u = tl.where(support > 0, (grad - mean[None, :]) / slack[None, :], 0.0)
    by_lambda = tl.sum(grad_u * centred, axis=0)
    if HAS_GRAD_SUMS:
        scalars = row + 2 * num_experts * column_stride
        if SPARSITY:
            gap = _lambda_gap(z, experts, lam, target)
            by_lambda -= tl.where(gap > 0, tl.load(scalars), 0.0)
        exponentials = tl.exp(z)
        total = tl.sum(exponentials, axis=0)
        log_sum = largest + tl.log(total)
        by_z = 2.0 * tl.load(scalars + column_stride) * log_sum / total
        grad_u += tl.where(counts[None, :], exponentials * by_z[None, :], 0.0)
    return grad_u, tl.where(counts, by_lambda, 0.0)

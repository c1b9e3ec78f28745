"""Triton kernels of `ldmole_ds.ops.fused_routing`: everything between logits and routing weights, one launch each way.

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
def _lambda(logit_of_lambda, LAMBDA_TOP: tl.constexpr):
    """``lambda, 1 - lambda`` and whether Sparsegen is defined; 1 - lambda is formed without cancellation."""
    minimum = tl.where(logit_of_lambda > 0, 0.0, logit_of_lambda)
    log_sigmoid = minimum - tl.log(1.0 + tl.exp(-tl.abs(logit_of_lambda)))
    slack = (1.0 - LAMBDA_TOP) - log_sigmoid
    return log_sigmoid + LAMBDA_TOP, slack, (slack > 0) & (slack < float("inf"))


@triton.jit
def _load_rows(logits, rows, in_experts, in_tokens, lambda_is_good):
    """Logits ``(E_PAD, BLOCK_T)`` less their maximum (-inf where there is no number), that maximum, and good tokens."""
    u = tl.load(logits + rows, mask=in_experts[:, None] & in_tokens[None, :], other=0.0).to(tl.float32)
    not_finite = tl.where(tl.abs(u) < float("inf"), 0, 1)
    good = in_tokens & lambda_is_good & (tl.max(not_finite, axis=0) == 0)
    here = in_experts[:, None] & good[None, :]
    largest = tl.where(good, tl.max(tl.where(here, u, float("-inf")), axis=0), 0.0)
    below = tl.maximum(u - largest[None, :], -1e30)  # so that no sum of them overflows
    return tl.where(here, below, float("-inf")), largest, good


@triton.jit
def _sparsegen(z, slack):
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
def routing_forward_kernel(
    logits,  # (G, E, T)
    lambda_logits,  # (T,)
    mask,  # (T,) uint8; not read without HAS_MASK
    probs,  # (G, E, T) out
    lambdas,  # (T,) float32 out
    sums,  # (programs, G, 2 E + 3) float32 out
    destinations,  # (ep_size + 1, T) uint8 out; not written without PLAN
    num_tokens,
    num_experts,
    num_members,
    target,
    ep_size,
    own_rank,
    LAMBDA_TOP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_PADDING: tl.constexpr,
    SPARSITY: tl.constexpr,
    PLAN: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0)
    tokens = program * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, E_PAD)
    in_tokens, in_experts = tokens < num_tokens, experts < num_experts
    real = in_tokens
    if HAS_MASK:
        real = in_tokens & (tl.load(mask + tokens, mask=in_tokens, other=0) != 0)
    routed = real if MASK_PADDING else in_tokens

    logit = tl.load(lambda_logits + tokens, mask=in_tokens, other=0.0).to(tl.float32)
    lam, slack, lambda_is_good = _lambda(logit, LAMBDA_TOP)
    tl.store(lambdas + tokens, lam, mask=in_tokens)

    used = tl.zeros((E_PAD, BLOCK_T), dtype=tl.int32)
    broken = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for member in range(num_members):
        rows = (member * num_experts + experts).to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        z, largest, good = _load_rows(logits, rows, in_experts, in_tokens, lambda_is_good)
        _, _, _, p = _sparsegen(z, slack)
        is_broken = in_tokens & (good == 0)
        weight = tl.where(is_broken[None, :], float("nan"), p)
        weight = tl.where(routed[None, :], weight, 0.0)
        here = in_experts[:, None] & in_tokens[None, :]
        tl.store(probs + rows, weight.to(probs.dtype.element_ty), mask=here)
        if PLAN:
            used = tl.where(weight != 0, 1, used)
            broken = tl.where(is_broken, 1, broken)

        row = sums + (program * num_members + member) * (2 * num_experts + 3)
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

    if PLAN:
        for rank in range(ep_size):
            held = (experts // (num_experts // ep_size) == rank)[:, None]
            visits = tl.max(tl.where(held, used, 0), axis=0)
            visits = tl.where(rank == own_rank, 0, visits)
            tl.store(destinations + rank * num_tokens + tokens, visits.to(tl.uint8), mask=in_tokens)
        tl.store(destinations + ep_size * num_tokens + tokens, broken.to(tl.uint8), mask=in_tokens)


@triton.jit
def routing_backward_kernel(
    logits,  # (G, E, T)
    lambda_logits,  # (T,)
    mask,  # (T,) uint8
    grad_probs,  # (G, E, T) by strides; not read without HAS_GRAD_PROBS
    grad_sums,  # (programs, G, 2 E + 3) by strides; not read without HAS_GRAD_SUMS
    grad_logits,  # (G, E, T) out
    grad_lambda_logits,  # (T,) out
    num_tokens,
    num_experts,
    num_members,
    target,
    probs_stride_g,
    probs_stride_e,
    probs_stride_t,
    sums_stride_program,
    sums_stride_g,
    sums_stride_column,
    LAMBDA_TOP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_PADDING: tl.constexpr,
    SPARSITY: tl.constexpr,
    HAS_GRAD_PROBS: tl.constexpr,
    HAS_GRAD_SUMS: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0)
    tokens = program * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, E_PAD)
    in_tokens, in_experts = tokens < num_tokens, experts < num_experts
    real = in_tokens
    if HAS_MASK:
        real = in_tokens & (tl.load(mask + tokens, mask=in_tokens, other=0) != 0)
    routed = real if MASK_PADDING else in_tokens

    logit = tl.load(lambda_logits + tokens, mask=in_tokens, other=0.0).to(tl.float32)
    lam, slack, lambda_is_good = _lambda(logit, LAMBDA_TOP)
    grad_lam = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for member in range(num_members):
        rows = (member * num_experts + experts).to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        here = in_experts[:, None] & in_tokens[None, :]
        z, largest, good = _load_rows(logits, rows, in_experts, in_tokens, lambda_is_good)
        support, k, centred, _ = _sparsegen(z, slack)
        counts = routed & good

        grad = tl.zeros((E_PAD, BLOCK_T), dtype=tl.float32)
        if HAS_GRAD_PROBS:
            offsets = (tl.zeros_like(experts) + member).to(tl.int64)[:, None] * probs_stride_g
            offsets += experts.to(tl.int64)[:, None] * probs_stride_e + tokens.to(tl.int64)[None, :] * probs_stride_t
            grad += tl.load(grad_probs + offsets, mask=here & counts[None, :], other=0.0).to(tl.float32)
        if HAS_GRAD_SUMS:
            row = grad_sums + program * sums_stride_program + member * sums_stride_g
            columns = row + (num_experts + experts) * sums_stride_column
            of_sum = tl.load(columns, mask=in_experts, other=0.0)
            grad += tl.where((real & good)[None, :], of_sum[:, None], 0.0)
        grad = tl.where(support > 0, grad, 0.0)
        mean = tl.sum(grad, axis=0) / k
        grad_u = tl.where(support > 0, (grad - mean[None, :]) / slack[None, :], 0.0)
        by_lambda = tl.sum(grad_u * centred, axis=0)
        if HAS_GRAD_SUMS:
            scalars = row + 2 * num_experts * sums_stride_column
            if SPARSITY:
                gap = _lambda_gap(z, experts, lam, target)
                by_lambda -= tl.where(gap > 0, tl.load(scalars), 0.0)
            exponentials = tl.exp(z)
            total = tl.sum(exponentials, axis=0)
            log_sum = largest + tl.log(total)
            by_z = 2.0 * tl.load(scalars + sums_stride_column) * log_sum / total
            grad_u += tl.where(counts[None, :], exponentials * by_z[None, :], 0.0)
        grad_lam += tl.where(counts, by_lambda, 0.0)
        tl.store(grad_logits + rows, grad_u.to(grad_logits.dtype.element_ty), mask=here)

    # d lambda / d logit = 1 - sigmoid(logit)
    grad_logit = grad_lam / (1.0 + tl.exp(logit))
    grad_logit = tl.where(lambda_is_good, grad_logit, 0.0)
    tl.store(grad_lambda_logits + tokens, grad_logit.to(grad_lambda_logits.dtype.element_ty), mask=in_tokens)

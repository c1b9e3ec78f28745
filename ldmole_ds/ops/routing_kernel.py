"""Triton kernels of `ldmole_ds.ops.fused_routing`: everything between logits and routing weights, one launch each way.

How a program goes about it: `ldmole_ds.ops.sparsegen_block`.
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
    tokens, in_tokens, real, routed = tokens_of_block(mask, num_tokens, HAS_MASK, MASK_PADDING, BLOCK_T)
    experts = tl.arange(0, E_PAD)
    in_experts = experts < num_experts

    logit = tl.load(lambda_logits + tokens, mask=in_tokens, other=0.0).to(tl.float32)
    lam, slack, lambda_is_good = lambda_of(logit, LAMBDA_TOP)
    tl.store(lambdas + tokens, lam, mask=in_tokens)

    used = tl.zeros((E_PAD, BLOCK_T), dtype=tl.int32)
    broken = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for member in range(num_members):
        rows = (member * num_experts + experts).to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        z, largest, good = load_logits(logits, rows, in_experts, in_tokens, lambda_is_good)
        _, _, _, p = sparsegen_of(z, slack)
        is_broken = in_tokens & (good == 0)
        weight = tl.where(is_broken[None, :], float("nan"), p)
        weight = tl.where(routed[None, :], weight, 0.0)
        here = in_experts[:, None] & in_tokens[None, :]
        tl.store(probs + rows, weight.to(probs.dtype.element_ty), mask=here)
        if PLAN:
            used = tl.where(weight != 0, 1, used)
            broken = tl.where(is_broken, 1, broken)
        row = sums + (program * num_members + member) * (2 * num_experts + 3)
        store_sums(row, z, p, largest, lam, real, routed, good, is_broken, experts, num_experts, target, SPARSITY)

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
    tokens, in_tokens, real, routed = tokens_of_block(mask, num_tokens, HAS_MASK, MASK_PADDING, BLOCK_T)
    experts = tl.arange(0, E_PAD)
    in_experts = experts < num_experts

    logit = tl.load(lambda_logits + tokens, mask=in_tokens, other=0.0).to(tl.float32)
    lam, slack, lambda_is_good = lambda_of(logit, LAMBDA_TOP)
    grad_lam = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for member in range(num_members):
        rows = (member * num_experts + experts).to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        here = in_experts[:, None] & in_tokens[None, :]
        z, largest, good = load_logits(logits, rows, in_experts, in_tokens, lambda_is_good)
        support, k, centred, _ = sparsegen_of(z, slack)

        grad = tl.zeros((E_PAD, BLOCK_T), dtype=tl.float32)
        if HAS_GRAD_PROBS:
            offsets = (tl.zeros_like(experts) + member).to(tl.int64)[:, None] * probs_stride_g
            offsets += experts.to(tl.int64)[:, None] * probs_stride_e + tokens.to(tl.int64)[None, :] * probs_stride_t
            counts = routed & good
            grad += tl.load(grad_probs + offsets, mask=here & counts[None, :], other=0.0).to(tl.float32)
        row = grad_sums + program * sums_stride_program + member * sums_stride_g
        grad_u, by_lambda = gradients_of(
            grad,
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
        tl.store(grad_logits + rows, grad_u.to(grad_logits.dtype.element_ty), mask=here)

    # d lambda / d logit = 1 - sigmoid(logit)
    grad_logit = grad_lam / (1.0 + tl.exp(logit))
    grad_logit = tl.where(lambda_is_good, grad_logit, 0.0)
    tl.store(grad_lambda_logits + tokens, grad_logit.to(grad_lambda_logits.dtype.element_ty), mask=in_tokens)

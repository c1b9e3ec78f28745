"""The experts' products of active (token, expert) pairs alone, expert by expert.

Shape legend: N tokens at the experts, D in_features, G projections, e local experts, r rank, O_g out_features of
projection g, O their sum, P pairs: (projection, expert, token) with a routing weight other than 0.

    for each expert, t its tokens:    y[t] += (w_t * scaling * (x[t] A^T)) B

The same sum as `ldmole_ds.ops.lora_experts`, which computes every pair and gives inactive ones the weight 0. Where few
of many experts are active that is much less work, but each expert's share is a small product of rows that are gathered
before and added after: `ldmole_ds.ops.expert_compute` decides. Rows are gathered and added for a block of experts at a
time: few calls, rows that stay in the cache, and no tensor ``(P, D)`` or ``(P, O)``. Kept for backward are x, and of
the pairs their tokens, weights and ``A x``. Who is active is read on the host: for CPUs.

The gradient of an inactive weight is 0 here. Every router's own backward is 0 there too, so no other gradient differs:
sparsegen, top-k and ReLU multiply by their support, softmax and plain LoRA have no inactive experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmole_ds.ops.lora_experts import Products

# What is kept of the pairs, which are ordered by projection, expert and token: sizes (G * e,) int64, each expert's
# pairs; token_P int64; w_P, their weights; h_Pr, their A x.
Pairs = tuple[Tensor, Tensor, Tensor, Tensor]
# Of a block's gathered rows, unless one expert has more.
BLOCK_BYTES = 1 << 19


@dataclass
class _Block:
    """Some experts of one projection, by number among those of all; their first pair, and how many each has."""

    projection: int
    begin: int
    experts: list[int]
    sizes: list[int]

    @property
    def pairs(self) -> slice:
        return slice(self.begin, self.begin + sum(self.sizes))

    def multiply(self, rows: Tensor, matrices: Sequence[Tensor], out: Tensor) -> None:
        """Each expert's rows times its matrix."""
        for i, a, product in zip(self.experts, rows.split(self.sizes), out.split(self.sizes), strict=True):
            torch.mm(a, matrices[i], out=product)

    def contract(self, left: Tensor, right: Tensor, matrices: Sequence[Tensor]) -> None:
        """Each expert's ``left^T right`` to its matrix."""
        for i, a, b in zip(self.experts, left.t().split(self.sizes, dim=1), right.split(self.sizes), strict=True):
            torch.mm(a, b, out=matrices[i])


def _blocks(sizes: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor]) -> list[_Block]:
    """All experts that have tokens."""
    e, widest = lora_A.shape[1], max(lora_A.shape[3], *(b.shape[2] for b in lora_B))
    most, end, blocks = BLOCK_BYTES // (widest * lora_A.element_size()), 0, []
    for i, size in enumerate(sizes.tolist()):
        if size:
            if not blocks or blocks[-1].projection != i // e or end + size - blocks[-1].begin > most:
                blocks.append(_Block(i // e, end, [], []))
            blocks[-1].experts.append(i)
            blocks[-1].sizes.append(size)
            end += size
    return blocks


class _Rows:
    """Memory for rows that are needed for a moment. New memory for each would cost more than the products do."""

    def __init__(self, like: Tensor) -> None:
        self._flat = like.new_empty(0)

    def get(self, n: int, width: int) -> Tensor:
        """``(n, width)``, not initialized; what was got before is no longer valid."""
        if len(self._flat) < n * width:
            self._flat = self._flat.new_empty(n * width)
        return self._flat[: n * width].view(n, width)

    def gather(self, source: Tensor, tokens: Tensor) -> Tensor:
        """``source[tokens]``."""
        return torch.index_select(source, 0, tokens, out=self.get(len(tokens), source.shape[1]))


def grouped_forward(
    x_ND: Tensor, w_NGe: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor], scaling: float
) -> tuple[Tensor, Pairs]:
    """The module docstring's formula: ``(N, D), (N, G, e) -> y (N, O)``, and what backward needs. No graph."""
    outputs = [x_ND.new_zeros(len(x_ND), b.shape[-1]) for b in lora_B]
    pairs = add_experts(outputs, x_ND, w_NGe, lora_A, lora_B, scaling)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), pairs


def add_experts(
    outputs: Sequence[Tensor], x_ND: Tensor, w_NGe: Tensor, lora_A: Tensor, lora_B: Sequence[Tensor], scaling: float
) -> Pairs:
    """Each projection's sum is added to its ``(N, O_g)``. Columns of a wider tensor take several times as long."""
    active = w_NGe.permute(1, 2, 0) != 0
    expert_P, token_P = active.flatten(0, 1).nonzero().unbind(1)
    w_P = w_NGe.permute(1, 2, 0).masked_select(active)
    sizes = torch.bincount(expert_P, minlength=len(lora_B) * lora_A.shape[1])
    token_P, h_Pr = token_P.contiguous(), x_ND.new_empty(len(token_P), lora_A.shape[2])
    A_T, B, rows = _matrices(lora_A.transpose(2, 3)), _matrices(lora_B), _Rows(x_ND)
    for block in _blocks(sizes, lora_A, lora_B):
        tokens, h = token_P[block.pairs], h_Pr[block.pairs]
        block.multiply(rows.gather(x_ND, tokens), A_T, h)
        y = outputs[block.projection]
        part = rows.get(len(tokens), y.shape[1])
        block.multiply(h * (w_P[block.pairs] * scaling).unsqueeze(1), B, part)
        y.index_add_(0, tokens, part)
    return sizes, token_P, w_P, h_Pr


def _matrices(weights: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The matrix of every expert of every projection."""
    return [matrix for weight in weights for matrix in weight.unbind(0)]


def grouped_input_gradients(
    grad_y: Tensor,
    pairs: Pairs,
    lora_A: Tensor,
    lora_B: Sequence[Tensor],
    scaling: float,
    out_x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `grouped_forward` that earlier layers wait for: of the weights, and of h as ``(P, r)``.

    Args:
        grad_y, pairs, lora_A, lora_B, scaling: As there.
        out_x: ``(N, D)``, rows may lie apart: the gradient of x is written here.
    """
    sizes, token_P, w_P, h_Pr = pairs
    n, (num_groups, e, _, d) = len(grad_y), lora_A.shape
    grads = grad_y.split([b.shape[-1] for b in lora_B], dim=1)
    A, B_T, rows = _matrices(lora_A), _matrices([b.transpose(1, 2) for b in lora_B]), _Rows(grad_y)
    grad_h, grad_w = torch.empty_like(h_Pr), torch.empty_like(w_P)
    if out_x is not None:  # adding to rows that lie apart takes several times as long
        grad_x = out_x.zero_() if out_x.is_contiguous() else grad_y.new_zeros(n, d)
    for block in _blocks(sizes, lora_A, lora_B):
        tokens, grad_hw = token_P[block.pairs], grad_h[block.pairs]
        block.multiply(rows.gather(grads[block.projection], tokens), B_T, grad_hw)
        torch.sum(grad_hw * h_Pr[block.pairs], 1, out=grad_w[block.pairs])
        grad_hw.mul_((w_P[block.pairs] * scaling).unsqueeze(1))
        if out_x is not None:
            part = rows.get(len(tokens), d)
            block.multiply(grad_hw, A, part)
            grad_x.index_add_(0, tokens, part)
    if out_x is not None and grad_x is not out_x:
        out_x.copy_(grad_x)
    slot_P = token_P + n * torch.arange(num_groups * e).repeat_interleave(sizes)
    grad_w_GeN = w_P.new_zeros(num_groups, e, n)
    grad_w_GeN.view(-1).index_copy_(0, slot_P, grad_w.mul_(scaling))
    return grad_w_GeN.permute(2, 0, 1), grad_h


def grouped_weight_gradients(
    grad_y: Tensor,
    x_ND: Tensor,
    pairs: Pairs,
    grad_h: Tensor,
    lora_A: Tensor,
    lora_B: Sequence[Tensor],
    scaling: float,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of ``lora_A`` and of each ``lora_B``; ``grad_h`` is what `grouped_input_gradients` found."""
    sizes, token_P, w_P, h_Pr = pairs
    grads = grad_y.split([b.shape[-1] for b in lora_B], dim=1)
    grad_A, grad_B = torch.zeros_like(lora_A), [torch.zeros_like(b) for b in lora_B]
    A, B, rows = _matrices(grad_A), _matrices(grad_B), _Rows(x_ND)
    for block in _blocks(sizes, lora_A, lora_B):
        tokens = token_P[block.pairs]
        hw = h_Pr[block.pairs] * (w_P[block.pairs] * scaling).unsqueeze(1)
        block.contract(hw, rows.gather(grads[block.projection], tokens), B)
        block.contract(grad_h[block.pairs], rows.gather(x_ND, tokens), A)
    return grad_A, grad_B


GROUPED = Products(grouped_forward, grouped_input_gradients, grouped_weight_gradients)

"""Dense-stacked against grouped expert products on one rank: what the tokens' support makes of them.

dense      two products over all stacked experts, inactive ones with weight 0: `ldmole_ds.ops.lora_experts`
grouped    one row per (token, active expert), sorted by expert, two small products for each expert

Shapes: T tokens, e experts of rank r, D in and O out features, k active experts of a token.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import harness
import torch
from expert_layers import grouped_mm
from torch import Tensor

from ldmole_ds.ops import lora_experts

TOKENS, SUPPORTS = 1024, [1, 2, 4, 8, 16]


def dense_experts(x: Tensor, w_Te: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 2.0) -> Tensor:
    """``(T, D), (T, e), (e, r, D), (e, r, O) -> (T, O)``."""
    return lora_experts(x, w_Te.unsqueeze(1), lora_A.unsqueeze(0), [lora_B], scaling)


def grouped_experts(x: Tensor, w_Te: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 2.0) -> Tensor:
    """The same, only the active experts' products."""
    expert_N, token_N = (w_Te.t() != 0).nonzero(as_tuple=True)
    sizes = torch.bincount(expert_N, minlength=len(lora_A))
    h = grouped_mm(x.index_select(0, token_N), lora_A.transpose(1, 2), sizes)
    h = h * (w_Te[token_N, expert_N] * scaling).unsqueeze(1)
    y = grouped_mm(h, lora_B, sizes)
    return torch.zeros_like(x[:, :1]).expand(-1, y.shape[1]).index_add(0, token_N, y)


def measure_compute(args: argparse.Namespace) -> list[dict]:
    """Seconds of both, forward and backward, by number of experts and support."""
    found, d, o = [], args.in_features, args.out_features
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    for e, r in (map(int, text.split("x")) for text in args.experts):
        for k in (k for k in SUPPORTS if k <= e):
            x, A, B = (torch.randn(*s, device=device, dtype=dtype) for s in ((TOKENS, d), (e, r, d), (e, r, o)))
            chosen = torch.rand(TOKENS, e, device=device).topk(k, dim=1).indices
            w = torch.zeros(TOKENS, e, device=device).scatter(1, chosen, 1 / k).to(dtype)
            leaves = [t.requires_grad_() for t in (x, w, A, B)]
            cotangent = torch.randn(TOKENS, o, device=device, dtype=dtype)
            dense = _step(
                lambda x, w, A, B: lora_experts(x, w.unsqueeze(1), A.unsqueeze(0), [B], 2.0), leaves, cotangent
            )
            grouped = _step(lambda x, w, A, B: grouped_experts(x, w, A, B, 2.0), leaves, cotangent)
            _check(dense(), grouped(), w)
            rounds = 12 if e * r <= 1024 else 6
            seconds = harness.interleaved({"dense": dense, "grouped": grouped}, rounds, warmup=1)
            found.append({"E": e, "r": r, "k": k, "seconds": seconds})
    return found


def _step(forward: Callable[..., Tensor], leaves: list[Tensor], cotangent: Tensor) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        y = forward(*leaves)
        y.backward(cotangent)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    return step


def _check(dense: list[Tensor], grouped: list[Tensor], w: Tensor) -> None:
    """Equal, but for the gradient of weights of 0, which grouped does not compute."""
    limit = 1e-4 if w.dtype == torch.float32 else 0.05
    for i, (a, b) in enumerate(zip(dense, grouped, strict=True)):
        a = a * (w != 0) if i == 2 else a
        assert (a - b).norm() < limit * a.norm(), f"dense and grouped differ in tensor {i}"


def compute_table(found: list[dict]) -> str:
    rows = [["experts x r", "support", "dense ms", "grouped ms", "dense / grouped"]]
    for cell in found:
        times = [f"{1e3 * harness.spread(cell['seconds'][name])[0]:.1f}" for name in ("dense", "grouped")]
        relative = harness.ratio(cell["seconds"], "dense", "grouped")
        ratio = f"{relative[0]:.2f} ({relative[1]:.2f} to {relative[2]:.2f})"
        rows.append([f"{cell['E']} x {cell['r']}", str(cell["k"]), *times, ratio])
    return (
        harness.table(rows) + f"\n\nOne rank, {TOKENS} tokens, forward and backward; ratio above 1: grouped is faster."
    )

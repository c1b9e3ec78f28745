"""Token routings for the dispatchers, ugly ones included, and the bytes that each must move.

W ranks, P = ep_size, T local tokens, D in_features, G projections, E experts, R rank, OUT out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

D, G, E, R, OUT = 5, 2, 8, 3, [3, 4]


@dataclass(frozen=True)
class Case:
    """How many tokens each rank has, and which experts they may choose."""

    ep_size: int
    tokens: tuple[int, ...]
    experts: tuple[int, ...] = tuple(range(E))
    x_needs_grad: bool = True


CASES = {
    2: {
        "unequal token counts": Case(2, (7, 3)),
        "a rank without tokens": Case(2, (0, 6)),
        "one token in the whole group": Case(2, (0, 1)),
        "no token at all": Case(2, (0, 0)),
        "all tokens to one expert": Case(2, (5, 4), experts=(6,)),
        "an idle rank": Case(2, (5, 4), experts=(0, 2, 3)),
        "an input without gradient": Case(2, (5, 4), x_needs_grad=False),
    },
    4: {
        "four in one group": Case(4, (3, 6, 1, 4)),
        "two groups of two": Case(2, (3, 6, 1, 4)),
        "one token in the whole group": Case(4, (0, 0, 1, 0)),
        "two ranks without tokens": Case(4, (5, 0, 0, 7)),
        "all tokens to one expert": Case(4, (3, 2, 1, 4), experts=(5,)),
        "two idle ranks": Case(4, (3, 2, 1, 4), experts=(0, 1, 4)),
    },
}


def all_data(case: Case) -> dict:
    """Tokens, routing and cotangent of *every* rank, and all experts: the same on each rank."""
    generator = torch.Generator().manual_seed(11)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    allowed = torch.zeros(E).index_fill(0, torch.tensor(case.experts), 1.0)
    probs = []
    for tokens in case.tokens:
        some = torch.rand(tokens, G, E, generator=generator) < 0.3
        some[..., case.experts[0]] |= ~(some & allowed.bool()).any(-1)  # at least one expert for every token
        probs.append((randn(tokens, G, E).abs() + 0.1) * some * allowed)
    return {
        "x": [randn(tokens, D) for tokens in case.tokens],
        "probs": probs,
        "cotangent": [randn(tokens, sum(OUT)) for tokens in case.tokens],
        "A": randn(G, E, R, D),
        "B": [randn(E, R, out) for out in OUT],
    }


def expected_bytes(rank: int, case: Case, data: dict, group: list[int]) -> dict:
    """Counted from the routing matrix: a token goes once to each other rank with at least one of its experts."""
    e = E // case.ep_size

    def pairs(source: int, home: int) -> int:
        active = data["probs"][source] != 0
        start = group.index(home) * e
        return sum(bool(token[:, start : start + e].any()) for token in active)

    others = [peer for peer in group if peer != rank]
    sent, received = sum(pairs(rank, peer) for peer in others), sum(pairs(peer, rank) for peer in others)
    size, out = 8, sum(OUT)
    return {
        "counts": len(others) * 2 * 8,  # rows and the flag for non-finite routing, int64
        "dispatch": sent * (D + G * e) * size,
        "combine": received * out * size,
        "combine_backward": sent * out * size,
        "dispatch_backward": received * (D * case.x_needs_grad + G * e) * size,
    }

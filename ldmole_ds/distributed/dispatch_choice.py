"""``--expert_dispatch auto``: per input group, move tokens or move weights, whichever the link makes cheaper.

Sent by one rank, forward and backward of one micro-step, with T tokens per rank, P = ep_size, E experts of rank r, and
a group of G projections that read D values and write O in sum:

    tokens     5 exchanges, 2 T f (D + G E/P + O) values       f = remote ranks that a token visits, on average
               products of T (1 + f) tokens with E/P experts
    weights    2 collectives, (1 + 1/accumulation) (P - 1) (E/P) r (G D + O) values
               products of T tokens with E experts

or, where that is cheaper, grouped products of as many active pairs in either (`ldmole_ds.ops.expert_compute`).

A collective takes a latency plus its bytes over the bandwidth, a product its operations over their speed; all three are
measured at the start (`ldmole_ds.distributed.link`), those of rank 0 for all, so that every rank decides alike.
`tokens_phases` and `weights_phases` name the collectives as `CommStats` counts them; the planner (`ldmole_ds.planner`)
uses them too.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldmole_ds.distributed.link import Link
from ldmole_ds.ops.expert_compute import dense_operations, grouped_operations


@dataclass(frozen=True)
class Workload:
    """Sizes that decide, as configured; the same on every rank.

    Attributes:
        tokens: Of one micro-step on one rank, T: batch size times longest length.
        active_experts: Experts that a token is expected to use per projection.
        accumulation_steps: Micro-steps per optimizer step.
        itemsize: Bytes of a value.
    """

    tokens: int
    active_experts: float
    accumulation_steps: int = 1
    itemsize: int = 4


@dataclass(frozen=True)
class Choice:
    """The decision for a group, with what it rests on: seconds, products included, and bytes of a micro-step."""

    mode: str
    tokens_seconds: float
    weights_seconds: float
    tokens_bytes: float
    weights_bytes: float


def remote_ranks(ep_size: int, num_experts: int, num_projections: int, active_experts: float) -> float:
    """Expected number of other ranks that a token visits, with experts drawn evenly for every projection."""
    share = min(active_experts / num_experts, 1.0)
    return (ep_size - 1) * (1 - (1 - share) ** (num_projections * num_experts / ep_size))


@dataclass(frozen=True)
class Phase:
    """The collectives of one name that an input group runs in a micro-step: how many, and bytes sent by a rank."""

    calls: float
    bytes: float


def tokens_phases(
    sent: float,
    received: float,
    *,
    ep_size: int,
    num_experts: int,
    in_features: int,
    out_features: list[int],
    itemsize: int,
) -> dict[str, Phase]:
    """Forward and backward of an input group under ``tokens``, by the names of `CommStats`.

    Args:
        sent: Rows that this rank sends in dispatch: one per token and remote rank visited.
        received: Rows that it receives.
        ep_size, num_experts, in_features, out_features: As in `choose_dispatch`.
        itemsize: Bytes of a value.
    """
    row = (in_features + len(out_features) * num_experts // ep_size) * itemsize
    answer = sum(out_features) * itemsize
    return {
        "counts": Phase(1, (ep_size - 1) * 2 * 8),
        "dispatch": Phase(1, sent * row),
        "combine": Phase(1, received * answer),
        "combine_backward": Phase(1, sent * answer),
        "dispatch_backward": Phase(1, received * row),
    }


def weights_phases(
    *,
    ep_size: int,
    num_experts: int,
    r: int,
    in_features: int,
    out_features: list[int],
    itemsize: int,
    accumulation_steps: int = 1,
) -> dict[str, Phase]:
    """The same under ``weights``: gathered once per optimizer step, gradients reduced in every micro-step."""
    held = num_experts // ep_size * r * (len(out_features) * in_features + sum(out_features))
    moved = (ep_size - 1) * held * itemsize
    return {"gather": Phase(1 / accumulation_steps, moved / accumulation_steps), "reduce_scatter": Phase(1, moved)}


def phases_seconds(phases: dict[str, Phase], link: Link) -> float:
    """Time of these collectives, one after another."""
    return sum(phase.calls * link.latency + phase.bytes / link.bandwidth for phase in phases.values())


def choose_dispatch(
    workload: Workload,
    link: Link,
    *,
    ep_size: int,
    num_experts: int,
    r: int,
    in_features: int,
    out_features: list[int],
) -> Choice:
    """The cheaper of tokens and weights for one input group; arguments as in `InputGroup`."""
    sizes = {"ep_size": ep_size, "num_experts": num_experts, "in_features": in_features, "out_features": out_features}
    rows = workload.tokens * remote_ranks(ep_size, num_experts, len(out_features), workload.active_experts)
    tokens = tokens_phases(rows, rows, itemsize=workload.itemsize, **sizes)
    weights = weights_phases(r=r, itemsize=workload.itemsize, accumulation_steps=workload.accumulation_steps, **sizes)
    tokens_bytes, weights_bytes = (sum(phase.bytes for phase in phases.values()) for phases in (tokens, weights))
    pairs = workload.tokens * min(workload.active_experts, num_experts) * len(out_features)

    def products_seconds(rows: float, experts: int) -> float:
        layer = (experts, r, in_features, out_features)
        dense = dense_operations(rows, *layer) / link.flops
        if not link.grouped_flops:
            return dense
        return min(dense, grouped_operations(pairs, rows, *layer) / link.grouped_flops)

    tokens_seconds = phases_seconds(tokens, link) + products_seconds(workload.tokens + rows, num_experts // ep_size)
    weights_seconds = phases_seconds(weights, link) + products_seconds(workload.tokens, num_experts)
    mode = "tokens" if tokens_seconds < weights_seconds else "weights"
    return Choice(mode, tokens_seconds, weights_seconds, tokens_bytes, weights_bytes)


def explain(choices: list[Choice], workload: Workload, link: Link) -> str:
    """What was chosen and why, in a sentence or two."""
    moved = sum(c.mode == "tokens" for c in choices)

    def total(name: str) -> float:
        return sum(getattr(c, name) for c in choices)

    return (
        f"auto: tokens for {moved} of {len(choices)} input groups, weights for {len(choices) - moved}. Expected per "
        f"micro-step of {workload.tokens} tokens per rank with {workload.active_experts:g} experts in use: tokens "
        f"{total('tokens_bytes') / 1e6:.1f} MB in {total('tokens_seconds') * 1e3:.1f} ms, weights "
        f"{total('weights_bytes') / 1e6:.1f} MB in {total('weights_seconds') * 1e3:.1f} ms "
        f"(link: {link.latency * 1e6:.0f} us, {link.bandwidth / 1e9:.2f} GB/s; experts' products at "
        f"{link.flops / 1e9:.0f} GFLOPS)"
    )

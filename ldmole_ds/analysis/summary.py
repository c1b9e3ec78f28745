"""From the routing of tokens to the numbers of the page, as JSON types."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldmole_ds.analysis.collect import Prompt, Routing
from ldmole_ds.analysis.names import grid_of

TABLE_TOKENS, CONTEXT_TOKENS = 12, 8
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LAMBDA_SCALE = 1000


def summarise(routing: Routing, prompts: Sequence[Prompt], *, shown: int = 8) -> dict[str, Any]:
    """Everything that the page plots.

    Args:
        routing: Of the prompts' tokens.
        prompts: The same, in order.
        shown: How many of them are shown token by token.
    """
    grid = grid_of(routing.projections)
    experts = [len(load) for load in routing.load_JE]
    return {
        "totals": _totals(routing),
        "layers": grid.layers,
        "kinds": grid.kinds,
        "projections": [
            {"name": name, "layer": layer, "kind": kind, "experts": e, "mean": round(float(mean), 4)}
            for name, (layer, kind), e, mean in zip(
                routing.projections, grid.places, experts, routing.counts_TJ.mean(0), strict=True
            )
        ],
        "max_experts": max(experts),
        "histograms": [
            np.bincount(column, minlength=e + 1).tolist()
            for column, e in zip(routing.counts_TJ.T, experts, strict=True)
        ],
        # 1 is an even share.
        "loads": [(load * len(load) / max(load.sum(), 1)).round(4).tolist() for load in routing.load_JE],
        "lambda": _lambda(routing, grid.layers, grid.kinds, grid.places),
        "tokens": _token_table(routing, prompts),
        "prompts": _prompts(routing, prompts[:shown]),
        "groups": routing.groups,
        "lambda_scale": LAMBDA_SCALE,
    }


def _totals(routing: Routing) -> dict[str, Any]:
    even = [load.max() * len(load) / max(load.sum(), 1) for load in routing.load_JE]
    totals = {
        "tokens": len(routing.counts_TJ),
        "projections": len(routing.projections),
        "experts_per_token": float(routing.counts_TJ.mean()),
        "experts_per_token_std": float(routing.counts_TJ.mean(1).std()),
        "max_load": float(np.mean(even)),
        "dead_experts": int(sum((load == 0).sum() for load in routing.load_JE)),
        "all_experts": sum(map(len, routing.load_JE)),
    }
    if routing.lam_TN is not None:
        # As in the training log: means over projections, and of the spread over tokens.
        of_projections = np.repeat(np.arange(len(routing.groups)), [len(group) for group in routing.groups])
        totals["lambda_mean"] = float(routing.lam_TN.mean(0)[of_projections].mean())
        totals["lambda_std"] = float(routing.lam_TN.std(0)[of_projections].mean())
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in totals.items()}


def _lambda(
    routing: Routing, layers: list[str], kinds: list[str], places: list[tuple[int, int]]
) -> list[dict[str, Any]] | None:
    """By kind of input group, such as "q_proj, k_proj, v_proj": lambda over layers, its mean and quantiles."""
    if routing.lam_TN is None:
        return None
    quantiles = np.quantile(routing.lam_TN, QUANTILES, axis=0)
    lines: dict[str, list[dict]] = defaultdict(list)
    for n, members in enumerate(routing.groups):
        label = ", ".join(kinds[places[j][1]] for j in members)
        point = {"layer": places[members[0]][0], "mean": round(float(routing.lam_TN[:, n].mean()), 4)}
        lines[label].append({**point, "quantiles": quantiles[:, n].round(4).tolist()})
    return [{"label": label, "points": points} for label, points in lines.items()]


def _token_table(routing: Routing, prompts: Sequence[Prompt]) -> dict[str, list[dict]]:
    """Tokens of the vocabulary with the most and fewest experts, means over projections and occurrences."""
    means_T = routing.counts_TJ.mean(1)
    where = [(p, i) for p, prompt in enumerate(prompts) for i in range(len(prompt.ids))]
    seen: dict[int, list[int]] = defaultdict(list)
    for t, (p, i) in enumerate(where):
        seen[prompts[p].ids[i]].append(t)
    # Once may be chance, but a single prompt has hardly a token twice.
    often = {token: places for token, places in seen.items() if len(places) > 1}
    often = often if len(often) >= 2 * TABLE_TOKENS else seen
    ranked = sorted(often, key=lambda token: -means_T[often[token]].mean())
    count = min(TABLE_TOKENS, (len(ranked) + 1) // 2)

    def row(token: int, extreme: Any) -> dict[str, Any]:
        places = often[token]
        p, i = where[places[int(extreme(means_T[places]))]]
        words = prompts[p].tokens
        return {
            "token": words[i],
            "mean": round(float(means_T[places].mean()), 3),
            "occurrences": len(places),
            "before": "".join(words[max(i - CONTEXT_TOKENS, 0) : i]),
            "after": "".join(words[i + 1 : i + 1 + CONTEXT_TOKENS]),
        }

    most = [row(token, np.argmax) for token in ranked[:count]]
    return {
        "most": most,
        "fewest": [row(token, np.argmin) for token in ranked[::-1][: min(count, len(ranked) - count)]],
    }


def _prompts(routing: Routing, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    shown, start = [], 0
    for prompt in prompts:
        rows = slice(start, start + len(prompt.ids))
        entry = {"tokens": list(prompt.tokens), "counts": _packed(routing.counts_TJ[rows], "<u2")}
        if routing.lam_TN is not None:
            entry["lambdas"] = _packed((routing.lam_TN[rows] * LAMBDA_SCALE).clip(-32768, 32767).round(), "<i2")
        shown.append(entry)
        start = rows.stop
    return shown


def _packed(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()

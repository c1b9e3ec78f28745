"""Where a projection stands in the model, read from its module name: ``model.layers.3.mlp.up_proj``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Projections by layer and kind.

    Attributes:
        layers: Labels, in the model's order.
        kinds: Labels, such as ``q_proj``, in the model's order.
        places: Of each projection: index of its layer, index of its kind.
    """

    layers: list[str]
    kinds: list[str]
    places: list[tuple[int, int]]


def grid_of(names: Sequence[str]) -> Grid:
    """The layer is the first number in the name, the kind its last part, or more where that is ambiguous."""
    split = [_split(name) for name in names]
    prefixes = {prefix for prefix, _, _ in split}
    layers = list(dict.fromkeys((prefix, number) for prefix, number, _ in split))
    tails = list(dict.fromkeys(tail for _, _, tail in split))
    ends = [tail.rsplit(".", 1)[-1] for tail in tails]
    labels = ends if len(set(ends)) == len(ends) else tails
    places = [(layers.index((prefix, number)), tails.index(tail)) for prefix, number, tail in split]
    shown = [number if len(prefixes) == 1 else f"{prefix}.{number}".strip(".") for prefix, number in layers]
    return Grid(shown, labels, places)


def _split(name: str) -> tuple[str, str, str]:
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    if found is None:
        return "", "-", name
    return name[: found.start()], found.group(1), name[found.end() :]

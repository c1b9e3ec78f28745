"""The canonical form: tensors keyed by projection, with all experts in global order, whatever the layout.

A rank holds some experts of a projection (expert parallelism) and, of those, some elements (ZeRO). Both are runs of
consecutive elements of a canonical tensor, because the experts are its first dimension:

    <path>.lora_A (E, r, D)      <path>.lora_B (E, r, O)      <path>.router (E, D)
    lambda_mlp.<key>.<name>      modules_to_save under their own names

so a checkpoint of any layout is a list of such runs, and loading into another layout is their intersection with the
runs that are wanted there. Weights and optimizer moments have the same runs. (``lora_B`` is in the order in which it is
trained; the adapter file holds it as (E, O, r).)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A run of elements of a parameter held here, and where it lies in the canonical form.

    Attributes:
        key: The canonical tensor.
        canonical: First element in the canonical tensor, flattened.
        start: First element in the parameter (or in the flat buffer) held here, flattened.
        numel: Length.
    """

    key: str
    canonical: int
    start: int
    numel: int


def overlaps(spans: Iterable[Span], start: int, numel: int, offset: int = 0) -> Iterator[Span]:
    """The parts of ``spans`` within elements ``[start, start + numel)``, renumbered so that ``start`` is ``offset``."""
    for span in spans:
        first, last = max(span.start, start), min(span.start + span.numel, start + numel)
        if first < last:
            yield Span(span.key, span.canonical + first - span.start, first - start + offset, last - first)

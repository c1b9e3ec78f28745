"""The routing of every token of some prompts, as the model's own records have it.

Shape legend: T tokens that are not padding, J projections, N input groups, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ldmole_ds.layers import RoutingRecord
from ldmole_ds.model import LDMoLEModel


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, and the text of each token."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Routing:
    """What the routers did with the tokens of some prompts, one prompt after the other.

    Attributes:
        projections: Full module names, in the model's order, J: those that the prompts reach.
        groups: Members of each input group as indices into ``projections``, N.
        counts_TJ: uint16, experts per token.
        lam_TN: float32, lambda per token and group; None for routers without one.
        load_JE: For each projection its experts' activations (tokens that use it), int64 ``(E_j,)``.
    """

    projections: list[str]
    groups: list[list[int]]
    counts_TJ: np.ndarray
    lam_TN: np.ndarray | None
    load_JE: list[np.ndarray]


class _Trace:
    """Stands in for `RoutingStatistics` during a pass: keeps the choices for each token instead of their sums."""

    def __init__(self, model: LDMoLEModel) -> None:
        self.groups = [group.name for group in model.input_groups]  # from the first pass on: those that run
        self.counts: list[np.ndarray] = []
        self.lambdas: list[np.ndarray] = []
        self.load = {group.name: 0 for group in model.input_groups}

    @torch.no_grad()
    def add(self, batches: list, records: list[RoutingRecord]) -> None:
        """Add one forward pass."""
        by_group = {record.group: record for record in records}
        if not self.counts:  # some never run on text: Mamba's dt_proj, a vision tower
            self.groups = [name for name in self.groups if name in by_group]
        missing = sorted(by_group.keys() ^ set(self.groups))
        if missing or not self.groups:
            name = (missing or ["the adapted part of the model"])[0]
            raise ValueError(f"{name} did not run on all of these prompts, so that there is no routing of it to report")
        counts, lambdas = [], []
        for name in self.groups:
            record = by_group[name]
            keep = slice(None) if record.mask_T is None else record.mask_T
            active = record.probs_TGE[keep] > 0
            self.load[name] = self.load[name] + active.sum(0).cpu()
            counts.append(active.sum(-1).to(torch.int32))
            if record.lam_T is not None:
                lambdas.append(record.lam_T[keep].float())
        self.counts.append(torch.cat(counts, 1).cpu().numpy().astype(np.uint16))
        if lambdas:
            self.lambdas.append(torch.stack(lambdas, 1).cpu().numpy())


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[Prompt]:
    """Token ids and texts; a longer prompt loses its beginning.

    Raises:
        ValueError: There is no prompt with a token.
    """
    prompts = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"][-max_length:]
        if ids:
            prompts.append(Prompt(tuple(ids), tuple(_token_texts(tokenizer, ids))))
    if not prompts:
        raise ValueError("there is no prompt with any text in it: give at least one")
    return prompts


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    # A sentencepiece tokenizer drops the space that a token alone begins with.
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        f" {text}" if str(piece).startswith("\u2581") and not text.startswith(" ") else text
        for text, piece in zip(texts, pieces, strict=True)
    ]


@torch.no_grad()
def collect_routing(
    model: LDMoLEModel,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 8,
    on_batch: Callable[[int], Any] = lambda rows: None,
) -> Routing:
    """Run the prompts through the model and note what every router chose for every token.

    Args:
        model: In eval mode on one process; routing statistics that it holds are left as they are.
        prompts: At least one.
        batch_size: Prompts in one forward pass.
        on_batch: Called after each with its number of prompts, for a progress bar.

    Raises:
        ValueError: The adapter has no router (plain LoRA), or a projection runs on some of the prompts only.
    """
    if model.input_groups[0].gate is None:
        raise ValueError("this adapter is plain LoRA: one expert serves every token, and there is no routing to report")
    trace, kept = _Trace(model), model.routing
    # Prompts of one length side by side need little padding; the result is put back in order.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    device = next(model.input_groups[0].parameters()).device
    model.routing = trace
    try:
        for start in range(0, len(order), batch_size):
            batch = [prompts[i].ids for i in order[start : start + batch_size]]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in batch], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            on_batch(len(batch))
    finally:
        model.routing = kept
    return _in_order(model, trace, prompts, order)


def _in_order(model: LDMoLEModel, trace: _Trace, prompts: Sequence[Prompt], order: list[int]) -> Routing:
    starts = np.cumsum([0, *(len(prompts[i].ids) for i in order)])
    place = {prompt: position for position, prompt in enumerate(order)}
    rows = np.concatenate([np.arange(starts[place[i]], starts[place[i] + 1]) for i in range(len(prompts))])
    projections, groups = [], []
    for group in filter(lambda group: group.name in trace.groups, model.input_groups):
        groups.append(list(range(len(projections), len(projections) + len(group.members))))
        projections += group.members
    return Routing(
        projections,
        groups,
        np.concatenate(trace.counts)[rows],
        np.concatenate(trace.lambdas)[rows] if trace.lambdas else None,
        [load for name in trace.groups for load in trace.load[name].numpy()],
    )

"""Batches of encoded questions: padded on the left, with the same trailing shapes on every rank.

Legend: `B` questions, `W` tokens of the longest row, `C` candidates, `L` tokens of the longest candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ldmole_ds.tasks.tokenize import ChoiceDataset, EncodedQuestion

IGNORED_LABEL = -100
ABSENT_TOKEN = -1
MODEL_KEYS = ("input_ids", "attention_mask", "position_ids", "labels")
"""The keys of a batch that a causal LM takes; `score_candidates` takes all of them."""


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding id, else its EOS, else 0. Any id will do: what is padding is told by `attention_mask`."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


class ChoiceCollator:
    """Makes a batch of prompts followed by their right answers.

    Args:
        pad_token_id: Id written where there is no token. It may be an id that also occurs in the text.
        max_candidates: `C`, of the whole dataset.
        max_candidate_length: `L`, of the whole dataset. With `C` and `L` fixed, shapes that depend on candidates are
            the same in every batch and on every rank.
        pad_to_multiple_of: Rounds `W` up to a multiple of this.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        max_candidates: int,
        max_candidate_length: int,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of}; expected a positive number or None")
        self.pad_token_id = pad_token_id
        self.max_candidates = max_candidates
        self.max_candidate_length = max_candidate_length
        self.pad_to_multiple_of = pad_to_multiple_of

    @classmethod
    def for_datasets(
        cls, pad_token_id: int, *datasets: ChoiceDataset, pad_to_multiple_of: int | None = None
    ) -> ChoiceCollator:
        """A collator whose `C` and `L` fit all of the datasets, such as a training and a validation set."""
        return cls(
            pad_token_id,
            max_candidates=max(dataset.max_candidates for dataset in datasets),
            max_candidate_length=max(dataset.max_candidate_length for dataset in datasets),
            pad_to_multiple_of=pad_to_multiple_of,
        )

    def __call__(self, features: Sequence[EncodedQuestion]) -> dict[str, Tensor]:
        """Collates questions.

        Returns:
            All int64. For the model: `input_ids`, `attention_mask`, `position_ids` (0 at padding) and `labels` (-100
            but at the right answer), each (B, W). For scoring: `candidate_ids` (B, C, L) with -1 where there is no
            token, `candidate_lengths` (B, C), what each score is divided by, `gold` (B,) and `prompt_length` (B,), in
            tokens without padding.
        """
        rows = [(*feature.prompt_ids, *feature.candidate_ids[feature.gold]) for feature in features]
        shape = (len(rows), self._width(rows))
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED_LABEL)
        candidate_ids = torch.full((len(rows), self.max_candidates, self.max_candidate_length), ABSENT_TOKEN)
        candidate_lengths = torch.ones((len(rows), self.max_candidates), dtype=torch.int64)
        for index, (feature, row) in enumerate(zip(features, rows, strict=True)):
            self._check(feature)
            answer = feature.candidate_ids[feature.gold]
            input_ids[index, -len(row) :] = torch.tensor(row)
            attention_mask[index, -len(row) :] = 1
            labels[index, -len(answer) :] = torch.tensor(answer)
            for slot, ids in enumerate(feature.candidate_ids):
                candidate_ids[index, slot, : len(ids)] = torch.tensor(ids)
            if feature.lengths is not None:
                candidate_lengths[index, : len(feature.lengths)] = torch.tensor(feature.lengths)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids_of(attention_mask),
            "labels": labels,
            "candidate_ids": candidate_ids,
            "candidate_lengths": candidate_lengths,
            "gold": torch.tensor([feature.gold for feature in features]),
            "prompt_length": torch.tensor([len(feature.prompt_ids) for feature in features]),
        }

    def _width(self, rows: Sequence[tuple[int, ...]]) -> int:
        width = max(len(row) for row in rows)
        multiple = self.pad_to_multiple_of or 1
        return -(-width // multiple) * multiple

    def _check(self, feature: EncodedQuestion) -> None:
        candidates = len(feature.candidate_ids)
        length = max(len(ids) for ids in feature.candidate_ids)
        if candidates > self.max_candidates or length > self.max_candidate_length:
            raise ValueError(
                f"a question has {candidates} candidates of up to {length} tokens, but the collator was made for "
                f"{self.max_candidates} of up to {self.max_candidate_length}; make it with ChoiceCollator.for_datasets "
                "of every dataset in use"
            )


def position_ids_of(attention_mask: Tensor) -> Tensor:
    """Positions that count only real tokens: 0, 1, ... from the first one, and 0 at the padding before it.

    Args:
        attention_mask: (B, W) of 0 and 1.

    Returns:
        (B, W), int64.
    """
    return (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)

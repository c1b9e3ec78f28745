"""``--train_sampling_strategy group_by_length``: the rows of a step have similar lengths, in one order on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthGroups(LengthGroupedSampler):
    """The Trainer's sampler, with an order that depends on seed and epoch alone.

    The Trainer's own draws from the global generator. Dropout draws from it too, on a CPU as often as a rank has
    tokens: from the second epoch on, ranks would disagree which rows are whose.

    Args:
        lengths: Tokens of each row.
        group: Rows that are to have similar lengths: those of an optimizer step, so that the order is the same in every
            layout of ranks and accumulation.
        seed: Of the data.

    Attributes:
        epoch: Whose order comes next. Accelerate sets it by `set_epoch`.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        super().__init__(group, lengths=[int(length) for length in lengths], generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


def row_lengths(dataset: Sequence) -> Sequence[int]:
    """Tokens of each row: the data set's ``lengths``, or those of its rows' ``input_ids``.

    Raises:
        ValueError: It has neither.
    """
    if hasattr(dataset, "lengths"):
        return dataset.lengths
    try:
        return [len(row["input_ids"]) for row in dataset]
    except (KeyError, TypeError):
        raise ValueError(
            "--train_sampling_strategy group_by_length needs rows with input_ids, or a data set with lengths"
        ) from None

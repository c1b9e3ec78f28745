"""Grouping rows by length: the same order on every rank and in every layout, another in every epoch."""

import pytest
import torch
from torch.utils.data import Dataset

from ldmole_ds.tasks.tokenize import ChoiceDataset, EncodedQuestion
from ldmole_ds.training.length_groups import LengthGroups, row_lengths
from tests.tiny import ragged_batch, tiny_model
from tests.training.small_trainer import Rows, make_trainer

LENGTHS = torch.randint(1, 400, (64,), generator=torch.Generator().manual_seed(0)).tolist()


def test_the_order_depends_on_seed_and_epoch_alone():
    sampler = LengthGroups(LENGTHS, 8, seed=3)
    first = list(sampler)
    torch.rand(5)  # what dropout does, on every rank as often as it has tokens
    assert list(sampler) == first == list(LengthGroups(LENGTHS, 8, seed=3)) and sorted(first) == list(range(64))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroups(LENGTHS, 8, seed=4)) != first


def test_rows_of_a_step_have_similar_lengths():
    order = list(LengthGroups(LENGTHS, 8, seed=0))
    spread = [max(part) - min(part) for i in range(0, 64, 8) if (part := [LENGTHS[row] for row in order[i : i + 8]])]
    assert sum(spread) / len(spread) < 0.6 * (max(LENGTHS) - min(LENGTHS))


def test_lengths_of_rows():
    question = EncodedQuestion((1, 2, 3), ((4,), (5, 6)), 1)
    assert row_lengths(ChoiceDataset([question])) == [5]
    assert row_lengths([{"input_ids": [1, 2]}, {"input_ids": [1]}]) == [2, 1]
    with pytest.raises(ValueError, match="group_by_length needs rows with input_ids"):
        row_lengths([(1, 2)])


def test_the_trainer_takes_another_order_in_every_epoch(tmp_path):
    class Counted(Rows):
        def __getitem__(self, index):
            taken.append(index)
            return super().__getitem__(index)

    class WithLengths(Counted):
        @property
        def lengths(self):
            return [len(self) - i for i in range(len(self))]

    taken: list[int] = []
    rows: Dataset = WithLengths(ragged_batch(rows=8))
    settings = {"train_sampling_strategy": "group_by_length", "max_steps": -1, "num_train_epochs": 2}
    trainer = make_trainer(tiny_model(), rows, tmp_path, per_device_train_batch_size=2, **settings)
    trainer.train()
    first, second = taken[:8], taken[8:]
    assert sorted(first) == sorted(second) == list(range(8)) and first != second
    assert trainer._get_train_sampler().batch_size == 2

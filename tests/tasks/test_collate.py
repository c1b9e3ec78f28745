"""Batches, value by value."""

from types import SimpleNamespace

import pytest
import torch

from ldmole_ds.tasks import MODEL_KEYS, ChoiceCollator, ChoiceDataset, EncodedQuestion, padding_id

# The padding id, 9, is also a token of the first prompt and of an answer.
ONE = EncodedQuestion((9, 5, 6), ((7,), (9, 8)), 1)
TWO = EncodedQuestion((4,), ((7,), (3,), (2,)), 0)


def test_values():
    batch = ChoiceCollator(9, max_candidates=4, max_candidate_length=2)([ONE, TWO])
    # Rows are 3 + 2 and 1 + 1 tokens: a width of 5, with three places before the second row.
    expected = {
        "input_ids": [[9, 5, 6, 9, 8], [9, 9, 9, 4, 7]],
        "attention_mask": [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]],
        "position_ids": [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]],
        "labels": [[-100, -100, -100, 9, 8], [-100, -100, -100, -100, 7]],
        "candidate_ids": [
            [[7, -1], [9, 8], [-1, -1], [-1, -1]],
            [[7, -1], [3, -1], [2, -1], [-1, -1]],
        ],
        "candidate_lengths": [[1] * 4] * 2,
        "gold": [1, 0],
        "prompt_length": [3, 1],
    }
    assert {key: value.tolist() for key, value in batch.items()} == expected
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert set(MODEL_KEYS) < set(batch)


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (1, 5), (5, 5), (8, 8)])
def test_width_is_rounded_up(multiple, width):
    collator = ChoiceCollator(0, max_candidates=3, max_candidate_length=2, pad_to_multiple_of=multiple)
    batch = collator([ONE, TWO])
    assert {batch[key].shape for key in MODEL_KEYS} == {(2, width)}
    assert batch["attention_mask"].sum(dim=1).tolist() == [5, 2]
    assert batch["candidate_ids"].shape == (2, 3, 2)


def test_shapes_come_from_the_datasets_and_not_from_the_batch():
    collator = ChoiceCollator.for_datasets(0, ChoiceDataset([ONE]), ChoiceDataset([TWO]))
    assert [collator([feature])["candidate_ids"].shape for feature in (ONE, TWO)] == [(1, 3, 2)] * 2


@pytest.mark.parametrize(("candidates", "length"), [(2, 2), (3, 1)])
def test_a_question_that_does_not_fit(candidates, length):
    collator = ChoiceCollator(0, max_candidates=candidates, max_candidate_length=length)
    with pytest.raises(ValueError, match=r"made for .*; make it with ChoiceCollator.for_datasets"):
        collator([ONE, TWO])


def test_bad_multiple():
    with pytest.raises(ValueError, match="pad_to_multiple_of is 0; expected a positive number"):
        ChoiceCollator(0, max_candidates=2, max_candidate_length=1, pad_to_multiple_of=0)


@pytest.mark.parametrize(("pad", "eos", "expected"), [(3, 2, 3), (0, 2, 0), (None, 2, 2), (None, None, 0)])
def test_padding_id(pad, eos, expected):
    assert padding_id(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == expected

"""Answers to a whole dataset: in its order, the same as one at a time, and what they amount to."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldmole_ds.tasks import TASKS, ChoiceDataset, EncodedQuestion, score_candidates_reference
from ldmole_ds.tasks.evaluate import TaskResult, answer_all
from tests.tiny import tiny_llama


def dataset(*, lengths: bool) -> ChoiceDataset:
    """Questions of many lengths, two to four candidates, some of them equal where scores are by length."""
    generator = torch.Generator().manual_seed(5)

    def tokens(count):
        return tuple(torch.randint(1, 100, (count,), generator=generator).tolist())

    questions = []
    for n in range(11):
        candidates = [tokens(1 + (n + c) % 3) if lengths else tokens(1) for c in range(2 + n % 3)]
        candidates[-1] = candidates[0] if lengths else candidates[-1]
        sizes = tuple(3 * len(c) for c in candidates) if lengths else None
        questions.append(EncodedQuestion(tokens(1 + 5 * n % 13), tuple(candidates), n % 2, 0, sizes))
    return ChoiceDataset(questions)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_answers_are_those_of_one_question_at_a_time(lengths, batch_size):
    model, data, counted = tiny_llama().eval(), dataset(lengths=lengths), []
    with torch.no_grad():
        expected = [score_candidates_reference(model, question).argmax().item() for question in data.questions]
    assert answer_all(model, data, 0, batch_size=batch_size, on_batch=counted.append) == expected
    assert sum(counted) == len(data) and len(set(expected)) > 1


def test_length_matters_to_the_answers():
    """The test above would see scores that are not divided."""
    model, data = tiny_llama().eval(), dataset(lengths=True)
    undivided = ChoiceDataset([EncodedQuestion(q.prompt_ids, q.candidate_ids, q.gold) for q in data.questions])
    assert answer_all(model, data, 0, batch_size=4) != answer_all(model, undivided, 0, batch_size=4)


class NotANumber(nn.Module):
    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, 100)
        logits[attention_mask.sum(1) > 10] = float("nan")
        return SimpleNamespace(logits=logits)


def test_scores_that_are_no_numbers_are_no_answers():
    with pytest.raises(FloatingPointError, match=r"the scores of 3 of 11 questions are not numbers \(first: row 3\)"):
        answer_all(NotANumber(), dataset(lengths=False), 0, batch_size=4)


def test_a_result():
    questions = [
        EncodedQuestion((1,), ((2,), (3,)), gold, num_cut_tokens=cut) for gold, cut in [(0, 0), (1, 5), (1, 0)]
    ]
    four = EncodedQuestion((1,), ((2,), (3,), (4,), (5,)), 0)
    data = ChoiceDataset([*questions, four])
    result = TaskResult.of_answers(TASKS["cola"], "validation", "letters", data, [0, 1, 0, 0])
    assert (result.rows, result.correct, result.accuracy, result.truncated) == (4, 3, 0.75, 1)
    assert result.interval == pytest.approx((0.3006, 0.9544), abs=5e-5)
    assert result.chance == pytest.approx((3 / 2 + 1 / 4) / 4)
    assert result.metrics == {"matthews_correlation": pytest.approx(1 / 3**0.5)}
    assert TaskResult.of_answers(TASKS["rte"], "validation", "letters", data, [1] * 4).metrics == {}

"""Evaluation over ranks that get different numbers of rows: each row once, with the answers of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ldmole_ds.tasks import ChoiceDataset, EncodedQuestion
from ldmole_ds.tasks.evaluate import answer_all
from tests.distributed_utils import run_distributed
from tests.tiny import tiny_model, wake_experts

# Rows and batch size: an odd row out, a rank with an empty last batch, a rank with no row at all, batches of one.
CASES = [(7, 2), (9, 4), (1, 4), (5, 1)]


def dataset(rows: int, *, single_token: bool) -> ChoiceDataset:
    generator = torch.Generator().manual_seed(rows)

    def tokens(count):
        return tuple(torch.randint(1, 100, (count,), generator=generator).tolist())

    questions = []
    for n in range(rows):
        candidates = tuple(tokens(1 if single_token else 1 + (n + c) % 3) for c in range(2 + n % 3))
        questions.append(EncodedQuestion(tokens(3 + 7 * n % 11), candidates, 0))
    return ChoiceDataset(questions)


def awake_model(ep_size: int = 1):
    model = tiny_model(ep_size=ep_size)
    wake_experts(model, std=1.0)
    return model.eval()


def answers_of(model) -> list[list[int]]:
    return [
        answer_all(model, dataset(rows, single_token=single), 0, batch_size=batch_size)
        for rows, batch_size in CASES
        for single in (True, False)
    ]


def evaluate_on_ranks(rank: int, world_size: int) -> dict:
    counted: list[int] = []
    answer_all(awake_model(), dataset(7, single_token=True), 0, batch_size=2, on_batch=counted.append)
    results = {ep_size: answers_of(awake_model(ep_size)) for ep_size in (1, 2)}
    try:
        # Ranks that hold different rows: no collective of the model waits for the other, the check at the end speaks.
        answer_all(awake_model(), dataset(4 + 2 * rank, single_token=True), 0, batch_size=4)
    except RuntimeError as error:
        results["refused"] = str(error)
    dist.barrier()
    return {**results, "counted": sum(counted)}


@pytest.mark.distributed
def test_ranks_answer_as_one_process_does():
    expected = answers_of(awake_model())
    assert len({tuple(answers) for answers in expected}) == len(expected)
    for results in run_distributed(evaluate_on_ranks, 2, timeout_s=120):
        assert results[1] == expected
        assert results[2] == expected
        assert "did not answer each question once" in results["refused"]
        assert results["counted"] == 7

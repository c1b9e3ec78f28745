"""The answers of a model to all questions of a task, over any number of ranks, each question counted once.

Where experts are partitioned a forward pass has collectives, so that every rank runs as many batches as the rank with
the most; one that has none left repeats a question and drops the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ldmole_ds.tasks.benchmarks import Task
from ldmole_ds.tasks.collate import ChoiceCollator
from ldmole_ds.tasks.metrics import METRICS, wilson_interval
from ldmole_ds.tasks.scoring import score_candidates
from ldmole_ds.tasks.tokenize import ChoiceDataset


@dataclass(frozen=True)
class TaskResult:
    """How well a task was answered.

    Attributes:
        task, split, scoring: What was asked, and how.
        rows: Questions, each counted once.
        correct: Right answers.
        accuracy: Their share.
        interval: Its 95% interval (Wilson).
        chance: Mean of 1 / (number of options).
        metrics: The task's own metrics beside accuracy.
        truncated: Questions whose prompt was cut to the longest length.
        answers, gold: Index of the chosen option and of the right one, by row.
    """

    task: str
    split: str
    scoring: str
    rows: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    chance: float
    metrics: dict[str, float]
    truncated: int
    answers: list[int]
    gold: list[int]

    @classmethod
    def of_answers(cls, task: Task, split: str, scoring: str, dataset: ChoiceDataset, answers: list[int]) -> TaskResult:
        """What the answers to a dataset's questions, in its order, amount to."""
        gold = [question.gold for question in dataset.questions]
        rows, correct = len(gold), sum(answer == right for answer, right in zip(answers, gold, strict=True))
        return cls(
            task=task.name,
            split=split,
            scoring=scoring,
            rows=rows,
            correct=correct,
            accuracy=correct / rows,
            interval=wilson_interval(correct, rows),
            chance=dataset.chance,
            metrics={task.metric: METRICS[task.metric](answers, gold)} if task.metric else {},
            truncated=dataset.num_truncated,
            answers=list(answers),
            gold=gold,
        )


@torch.no_grad()
def answer_all(
    model: nn.Module,
    dataset: ChoiceDataset,
    pad_token_id: int,
    *,
    batch_size: int,
    device: str | torch.device = "cpu",
    on_batch: Callable[[int], Any] = lambda rows: None,
) -> list[int]:
    """The option that the model prefers for each question. Collective where a process group is up.

    Ranks take turns in the questions by length, so that they get as many, and batches need little padding.

    Args:
        model: In eval mode, on its device.
        dataset: The same on every rank.
        pad_token_id: Id written where there is no token.
        batch_size: Questions that a rank puts into one forward pass.
        device: Of the model.
        on_batch: Called after each batch with the number of its questions on all ranks, for a progress bar.

    Returns:
        Index of the first option with the highest score, by question, on every rank.

    Raises:
        FloatingPointError: A score is not a number; on every rank.
    """
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    # The longest first: what does not fit into memory does not fit at once.
    order = sorted(range(len(dataset)), key=lambda index: -len(dataset[index].prompt_ids))
    collator = ChoiceCollator.for_datasets(pad_token_id, dataset)
    mine: list[tuple[int, int, bool]] = []
    for start in range(0, len(order), batch_size * world_size):
        everyone = order[start : start + batch_size * world_size]
        indices = everyone[rank::world_size]
        batch = collator([dataset[index] for index in indices or order[:1]])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        scores = score_candidates(model, batch, single_token=dataset.single_token)[: len(indices)]
        broken = scores.isnan().any(dim=1).tolist()
        mine += zip(indices, scores.argmax(dim=1).tolist(), broken, strict=True)
        on_batch(len(everyone))
    of_ranks = [mine]
    if world_size > 1:
        of_ranks = [None] * world_size
        dist.all_gather_object(of_ranks, mine)
    found = sorted(answer for answers in of_ranks for answer in answers)
    if [index for index, *_ in found] != list(range(len(dataset))):
        raise RuntimeError("ranks did not answer each question once: they were given different datasets")
    broken = [index for index, _, nan in found if nan]
    if broken:
        raise FloatingPointError(
            f"the scores of {len(broken)} of {len(dataset)} questions are not numbers (first: row {broken[0] + 1}); "
            "load the model with --dtype float32 or bfloat16, or check the adapter"
        )
    return [answer for _, answer, _ in found]

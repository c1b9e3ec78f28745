"""From data arguments to encoded questions."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ldmole_ds.tasks import (
    TASKS,
    ChoiceCollator,
    ChoiceDataset,
    DataError,
    Question,
    demo_files,
    labels_from_rows,
    load_task,
    padding_id,
    questions_from_rows,
    read_labels,
    read_questions,
    tasks_of,
)
from ldmole_ds.tasks.metrics import task_metrics
from ldmole_ds.tasks.mixture import mixture_order, mixture_weights
from ldmole_ds.training.argument_groups import DataArguments


@dataclass
class ChoiceData:
    """Datasets and collator of a multiple-choice or classification run.

    Attributes:
        train, validation: Encoded questions.
        collator: Gives every batch of both the same number of candidates.
        single_token: Whether one forward pass scores all candidates.
        description: Where the rows came from.
        label_words: The answers of a text-and-label task in their order; None for multiple choice.
        validation_rows: The number that each held-out question has in its split.
        answers: Of the last evaluation, see `note_answers`.
    """

    train: ChoiceDataset
    validation: ChoiceDataset | None
    collator: ChoiceCollator
    single_token: bool
    description: str
    label_words: list[str] | None
    validation_rows: list[int] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """The data in one line."""
        rows = f"{len(self.train)} train" + (f", {len(self.validation)} held-out" if self.validation else "")
        cut = self.train.num_truncated
        return f"{rows} rows of {self.description}" + (f" ({cut} prompts cut to --max_length)" if cut else "")

    def note_answers(self, answers: list[int]) -> None:
        """Keep the answers to the held-out questions beside the right ones, in the order of the split."""
        questions = self.validation.questions
        by_row = sorted(zip(self.validation_rows, answers, questions, strict=True), key=lambda entry: entry[0])
        self.answers = {
            "answers": [answer for _, answer, _ in by_row],
            "gold": [question.gold for _, _, question in by_row],
            "chance": self.validation.chance,
        }

    @property
    def metric_names(self) -> list[str]:
        """What an evaluation finds of the held-out questions."""
        gold = [question.gold for question in self.validation.questions]
        return ["loss", *task_metrics([question.task for question in self.validation.questions], gold, gold)]

    @property
    def longest_row(self) -> int:
        """Tokens of the longest training row, answer included."""
        return self.train.longest

    def check_positions(self, limit: int | None) -> None:
        """Refuse questions longer than a model has positions for.

        Raises:
            DataError: Names the flag.
        """
        for questions in filter(None, (self.train, self.validation)):
            questions.check_positions(limit)


def demo_data_defaults() -> dict[str, str]:
    """The embedded run's data as argument defaults."""
    files = demo_files()
    return {
        "train_file": str(files["train"]),
        "validation_file": str(files["test"]),
        "label_words": str(files["labels"]),
    }


def load_choice_data(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> ChoiceData:
    """Read, check and tokenise.

    Raises:
        DataError: A row breaks the schema (file and line), a file is missing or empty.
    """
    for name in ("train", "eval"):
        limit = getattr(arguments, f"max_{name}_samples")
        if limit is not None and limit < 1:
            raise DataError(f"--max_{name}_samples must be at least 1, got {limit}")
    if arguments.packing:
        raise DataError("--packing is for rows with messages, or with prompt and completion: leave it out")
    if arguments.task:
        return _task_data(arguments, tokenizer)
    for flag, default in (("data_dir", None), ("scoring", None), ("mixture", "size")):
        if getattr(arguments, flag) != default:
            raise DataError(f"--{flag} {getattr(arguments, flag)} is for --task: name the tasks, or leave it out")
    label_words = _label_words(arguments.label_words)
    columns = {"text_column": arguments.text_column, "label_column": arguments.label_column}
    if arguments.dataset_name:
        train, validation, labels, source = _hub_questions(arguments, label_words, columns)
    elif arguments.train_file:
        labels = read_labels(arguments.train_file, **columns)
        train = read_questions(arguments.train_file, label_words=label_words, labels=labels, **columns)
        validation = None
        if arguments.validation_file:
            validation = read_questions(arguments.validation_file, label_words=label_words, labels=labels, **columns)
        source = "/".join(Path(arguments.train_file).parts[-2:])
    else:
        raise DataError("no training data: give --train_file FILE.jsonl, --task NAME or --dataset_name NAME")
    train, validation = train[: arguments.max_train_samples], (validation or [])[: arguments.max_eval_samples]
    return _encoded(train, validation, tokenizer, arguments.max_length, source, is_classification=bool(labels))


def _task_data(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> ChoiceData:
    """Training rows of all tasks mixed, held-out rows of one after the other."""
    for flag in ("train_file", "validation_file", "dataset_name", "text_column", "label_column", "label_words"):
        if getattr(arguments, flag):
            raise DataError(f"--{flag} is for rows of your own and --task for benchmarks: give one of them")
    tasks, limits = tasks_of(arguments.task), (arguments.max_train_samples, arguments.max_eval_samples)
    common = {"data_dir": arguments.data_dir, "scoring": arguments.scoring}
    train, validation, sizes = [], [], []
    for task in tasks:
        train += load_task(task, arguments.train_split, limit=limits[0], **common)
        sizes.append(len(train) - sum(sizes))
        validation += load_task(task, arguments.validation_split or task.heldout_split, limit=limits[1], **common)
    source = arguments.task if len(tasks) == 1 else f"{arguments.task}, mixed by {arguments.mixture}"
    words = len(tasks) == 1 and tasks[0] is TASKS["clinc_domains"] and arguments.scoring != "letters"
    order = mixture_order(sizes, mixture_weights(arguments.mixture, sizes))
    data = _encoded(train, validation, tokenizer, arguments.max_length, source, is_classification=words)
    starts = [sum(sizes[:task]) for task in range(len(sizes))]
    data.train.questions = [data.train.questions[starts[task] + row] for task, row in order]
    return data


def _encoded(
    train: list[Question],
    validation: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    description: str,
    *,
    is_classification: bool,
) -> ChoiceData:
    train_set = ChoiceDataset.from_questions(train, tokenizer, max_length)
    validation_set = ChoiceDataset.from_questions(validation, tokenizer, max_length) if validation else None
    order: list[int] = []
    if validation_set is not None:
        # Rows of one length side by side: less padding, same result.
        order = sorted(range(len(validation_set)), key=lambda row: len(validation_set[row].prompt_ids))
        validation_set.questions = [validation_set[row] for row in order]
    present = [s for s in (train_set, validation_set) if s is not None]
    return ChoiceData(
        train=train_set,
        validation=validation_set,
        collator=ChoiceCollator.for_datasets(padding_id(tokenizer), *present),
        single_token=all(s.single_token for s in present),
        description=description,
        label_words=[candidate.strip() for candidate in train[0].candidates] if is_classification else None,
        validation_rows=order,
    )


def check_sources(arguments: DataArguments) -> None:
    """Refuse what would be passed over: a second source of rows, and splits of rows that have none.

    Raises:
        DataError: Names the flag and the remedy.
    """
    if arguments.dataset_name:
        for flag in ("train_file", "validation_file"):
            if getattr(arguments, flag):
                raise DataError(f"--{flag} is for rows in files and --dataset_name for those of the hub: give one")
    elif not arguments.task:
        for flag, default in (("train_split", "train"), ("validation_split", None), ("dataset_config_name", None)):
            if getattr(arguments, flag) != default:
                raise DataError(
                    f"--{flag} {getattr(arguments, flag)} is for --dataset_name and --task: held-out rows of your own "
                    "come from --validation_file"
                )


def _label_words(path: str | None) -> dict[str, str] | None:
    if path is None:
        return None
    try:
        words = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # not there, not UTF-8, not JSON
        raise DataError(f"--label_words {path}: {error}; expected a JSON file of label to word") from error
    if not isinstance(words, dict):
        raise DataError(f"--label_words {path}: expected a JSON object of label to word")
    return words


def _hub_questions(arguments: DataArguments, label_words: dict | None, columns: dict[str, Any]):
    """Questions of a hub dataset's splits."""
    from datasets import ClassLabel, get_dataset_split_names, load_dataset

    name, validation_split = arguments.dataset_name, arguments.validation_split or "validation"
    try:
        train_rows = load_dataset(name, arguments.dataset_config_name, split=arguments.train_split)
        asked = arguments.validation_split is not None  # also of a part, such as train[90%:]
        has_validation = asked or validation_split in get_dataset_split_names(name, arguments.dataset_config_name)
        validation_rows = (
            load_dataset(name, arguments.dataset_config_name, split=validation_split) if has_validation else None
        )
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"--dataset_name {name!r} could not be loaded: {first} -- check the name, --dataset_config_name, "
            "--train_split and --validation_split, or give --train_file"
        ) from error
    feature = train_rows.features.get(columns["label_column"] or "label")
    names = feature.names if isinstance(feature, ClassLabel) else None
    labels = labels_from_rows(train_rows, name, label_names=names, **columns)
    common = {"label_words": label_words, "labels": labels, "label_names": names, **columns}
    train = questions_from_rows(train_rows, f"{name}[{arguments.train_split}]", **common)
    validation = None
    if validation_rows is not None:
        validation = questions_from_rows(validation_rows, f"{name}[{validation_split}]", **common)
    return train, validation, labels, name

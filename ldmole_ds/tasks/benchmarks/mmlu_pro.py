"""MMLU-Pro: questions with up to ten options.

    {"question_id": int, "question": str, "options": [str], "answer": "A" ... "J", "answer_index": int, "category": str}

The dataset has a test split and 70 worked examples, and nothing to train on. Its test split is therefore carved into
three by a hash of the question, so that every machine gets the same three and no question is in two of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

from ldmole_ds.tasks.fields import index_of_answer, required, text
from ldmole_ds.tasks.item import Item
from ldmole_ds.tasks.prompt import MAX_OPTIONS, MIN_OPTIONS
from ldmole_ds.tasks.rows import DataError, Row

_SCHEMA = '{"question": ..., "options": [...], "answer_index": ...}'
# Of a hundred parts of the official test split.
CARVED = {"train": range(0, 60), "validation": range(60, 70), "test": range(70, 100)}


def mmlu_pro_item(row: Row) -> Item:
    """One row.

    Raises:
        DataError: The row does not fit the schema.
    """
    question, options, answer = (required(row, key, _SCHEMA) for key in ("question", "options", "answer_index"))
    question = text(question, "'question'", row.where).strip()
    if not isinstance(options, list) or not MIN_OPTIONS <= len(options) <= MAX_OPTIONS:
        raise DataError(
            f"{row.where}: 'options' has the wrong form; expected a list of {MIN_OPTIONS} to {MAX_OPTIONS} strings"
        )
    return Item(
        question=question,
        cloze=f"{question}\nAnswer:",
        options=tuple(text(option, f"option {n}", row.where) for n, option in enumerate(options, start=1)),
        gold=index_of_answer(answer, "answer_index", len(options), row.where),
    )


def carve(rows: Iterable[Mapping[str, Any]], split: str) -> list[Mapping[str, Any]]:
    """The rows of the official test split that belong to a carved split, in their order.

    Raises:
        DataError: There is no such split.
    """
    if split not in CARVED:
        raise DataError(f"task mmlu_pro has no split {split!r}: use {', '.join(CARVED)}")
    return [row for row in rows if _part(row["question"]) in CARVED[split]]


def _part(question: str) -> int:
    return int.from_bytes(blake2b(question.encode(), digest_size=8).digest(), "big") % 100

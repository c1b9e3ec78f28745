"""Questions with labelled options: ARC, OpenBookQA, CommonsenseQA.

    {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}

OpenBookQA writes ``question_stem``. Labels may be A, B, C, ... or 1, 2, 3, ...; the prompt letters the options anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldmole_ds.tasks.fields import index_of_label, required, text
from ldmole_ds.tasks.item import Item
from ldmole_ds.tasks.prompt import MAX_OPTIONS, MIN_OPTIONS
from ldmole_ds.tasks.rows import DataError, Row

CHOICE_SCHEMA = '{"question": ..., "choices": {"text": [...], "label": [...]}, "answerKey": ...}'


def choice_item(row: Row, hint: str = "") -> Item:
    """One row.

    Args:
        row: The row.
        hint: What else could be meant, added to the message about a missing column.

    Raises:
        DataError: The row does not fit the schema.
    """
    expected = CHOICE_SCHEMA + hint
    stem = "question_stem" if "question" not in row.fields and "question_stem" in row.fields else "question"
    question, choices, answer = (required(row, key, expected) for key in (stem, "choices", "answerKey"))
    question = text(question, repr(stem), row.where).strip()
    options, labels = _choices(choices, row.where)
    return Item(
        question=question,
        cloze=f"{question}\nAnswer:",
        options=tuple(options),
        gold=index_of_label(answer, "answerKey", labels, row.where),
    )


def _choices(choices: Any, where: str) -> tuple[list[str], list[str]]:
    if not isinstance(choices, Mapping) or not all(isinstance(choices.get(key), list) for key in ("text", "label")):
        raise DataError(f'{where}: "choices" has the wrong form; expected {{"text": [...], "label": [...]}}')
    options = [text(value, f"option {n}", where) for n, value in enumerate(choices["text"], start=1)]
    labels = [text(value, f"option label {n}", where) for n, value in enumerate(choices["label"], start=1)]
    if len(options) != len(labels):
        raise DataError(f"{where}: choices has {len(options)} texts and {len(labels)} labels; expected as many of each")
    if not MIN_OPTIONS <= len(options) <= MAX_OPTIONS:
        raise DataError(f"{where}: the question has {len(options)} options; expected {MIN_OPTIONS} to {MAX_OPTIONS}")
    repeated = [label for label in labels if labels.count(label) > 1]
    if repeated:
        raise DataError(f"{where}: option label {repeated[0]!r} occurs twice; expected labels that differ")
    return options, labels

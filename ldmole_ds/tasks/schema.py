"""From rows to questions: which of two schemas a file has, and what each row must hold.

* Multiple choice, the schema of ARC: `{"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}`;
  OpenBookQA's `question_stem` is accepted for `question`.
* Text and label: `{"text": str, "label": str | int | bool}`, or the columns that the caller names.

The first row decides for the whole file. Both become the same thing, a prompt with a list of possible continuations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmole_ds.tasks import fields
from ldmole_ds.tasks.benchmarks.choices import CHOICE_SCHEMA, choice_item
from ldmole_ds.tasks.item import Question
from ldmole_ds.tasks.labels import LabelSet, label_name, listed
from ldmole_ds.tasks.prompt import classification_prompt
from ldmole_ds.tasks.rows import DataError, Row, number_rows, read_rows

_COLUMN_HINT = "or name the columns of a text-and-label file with --text_column and --label_column"


def read_questions(
    path: str | Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    label_words: dict[str, str] | None = None,
    labels: list[str] | None = None,
    label_names: list[str] | None = None,
) -> list[Question]:
    """Reads a file of either schema, JSON Lines or one JSON list.

    Args:
        path: The file.
        text_column: Column of the text; naming this or `label_column` says that rows are text and label.
        label_column: Column of the label.
        label_words: The word that stands for a label, where the label's own name will not do.
        labels: What `read_labels` says of the training file, so that a validation file has the same candidates in the
            same order. An empty list means that the training file is multiple choice. `None` takes this file's own.
        label_names: Names of integer labels 0, 1, ...

    Raises:
        DataError: A row does not fit; the message begins with `FILE:LINE`.
    """
    return _questions(read_rows(path), _Columns(text_column, label_column, label_names), label_words, labels)


def questions_from_rows(
    rows: Iterable[Mapping[str, Any]],
    source: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    label_words: dict[str, str] | None = None,
    labels: list[str] | None = None,
    label_names: list[str] | None = None,
) -> list[Question]:
    """As `read_questions`, for rows at hand. Messages begin with `SOURCE:ROW`, counted from 1."""
    return _questions(number_rows(rows, source), _Columns(text_column, label_column, label_names), label_words, labels)


def read_labels(
    path: str | Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    label_names: list[str] | None = None,
) -> list[str]:
    """The sorted labels of a training file, empty for multiple choice: the `labels` of its validation file."""
    return _labels(read_rows(path), _Columns(text_column, label_column, label_names))


def labels_from_rows(
    rows: Iterable[Mapping[str, Any]],
    source: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    label_names: list[str] | None = None,
) -> list[str]:
    """As `read_labels`, for rows at hand."""
    return _labels(number_rows(rows, source), _Columns(text_column, label_column, label_names))


@dataclass(frozen=True)
class _Columns:
    """The caller's word on where a text-and-label row keeps its parts."""

    text_column: str | None
    label_column: str | None
    label_names: Sequence[str] | None

    @property
    def named(self) -> bool:
        return self.text_column is not None or self.label_column is not None

    @property
    def text(self) -> str:
        return self.text_column or "text"

    @property
    def label(self) -> str:
        return self.label_column or "label"

    def looks_labelled(self, row: Row) -> bool:
        return self.text in row.fields and self.label in row.fields


def _questions(
    rows: list[Row], columns: _Columns, label_words: dict[str, str] | None, labels: list[str] | None
) -> list[Question]:
    multiple_choice = _is_multiple_choice(rows[0], columns)
    if labels is not None and multiple_choice == bool(labels):
        here, there = _schema_name(multiple_choice), _schema_name(not multiple_choice)
        raise DataError(f"{rows[0].where}: the row is {here}; expected {there}, as in the training data")
    if multiple_choice:
        for name, value in (("label_words", label_words), ("label_names", columns.label_names)):
            if value:
                raise DataError(f"{rows[0].where}: rows are multiple choice and have no use for {name}; leave it out")
        return [_choice_question(row, columns) for row in rows]
    pairs = [_text_and_label(row, columns) for row in rows]
    label_set = LabelSet.build(labels or _distinct(pairs, rows[0], columns), label_words)
    index = {label: position for position, label in enumerate(label_set.labels)}
    questions = []
    for row, (text, label) in zip(rows, pairs, strict=True):
        if label not in index:
            raise DataError(
                f"{row.where}: label {label!r} is not among the training labels; expected one of "
                f"{listed(label_set.labels)}"
            )
        prompt = classification_prompt(text, label_set.words)
        questions.append(Question(prompt, label_set.candidates, index[label]))
    return questions


def _labels(rows: list[Row], columns: _Columns) -> list[str]:
    if _is_multiple_choice(rows[0], columns):
        return []
    return _distinct([_text_and_label(row, columns) for row in rows], rows[0], columns)


def _distinct(pairs: list[tuple[str, str]], first: Row, columns: _Columns) -> list[str]:
    labels = sorted({label for _, label in pairs})
    if len(labels) < 2:
        raise DataError(
            f"{first.where}: column {columns.label!r} is {labels[0]!r} from this row to the last; expected at least "
            "two distinct labels, or another column with --label_column"
        )
    return labels


def _is_multiple_choice(first: Row, columns: _Columns) -> bool:
    if columns.named:
        return False
    keys = first.fields.keys()
    if "choices" in keys or (not columns.looks_labelled(first) and keys & {"question", "question_stem", "answerKey"}):
        return True
    if keys & {"text", "label"}:
        return False
    raise DataError(
        f"{first.where}: no known schema in the keys {listed(list(keys)) or 'of an empty object'}; expected "
        f'{CHOICE_SCHEMA} or {{"text": ..., "label": ...}}, {_COLUMN_HINT}'
    )


def _schema_name(multiple_choice: bool) -> str:
    return "multiple choice" if multiple_choice else "text and label"


def _text_and_label(row: Row, columns: _Columns) -> tuple[str, str]:
    for column in (columns.text, columns.label):
        if column in row.fields:
            continue
        if "choices" in row.fields and not columns.named:
            raise DataError(f"{row.where}: the row is multiple choice; expected text and label, as in the first row")
        raise DataError(
            f"{row.where}: no key {column!r}; expected {columns.text!r} and {columns.label!r}, "
            "or other columns with --text_column and --label_column"
        )
    text = fields.text(row.fields[columns.text], repr(columns.text), row.where)
    return text, label_name(row.fields[columns.label], row.where, columns.label, columns.label_names)


def _choice_question(row: Row, columns: _Columns) -> Question:
    if "choices" not in row.fields and columns.looks_labelled(row):
        raise DataError(f"{row.where}: the row is text and label; expected multiple choice, as in the first row")
    return choice_item(row, f", {_COLUMN_HINT}").as_question("letters")

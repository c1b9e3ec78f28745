"""The columns of a row, each checked where it is read."""

from __future__ import annotations

import numbers
from typing import Any

from ldmole_ds.tasks.rows import DataError, Row

_NO_ANSWER = "the row has no answer ({column!r} is {value!r}); expected a split whose answers are published"


def required(row: Row, column: str, expected: str) -> Any:
    """The value of a column.

    Args:
        row: The row.
        column: Its name.
        expected: What a row of this kind looks like, for the message.

    Raises:
        DataError: The row has no such column.
    """
    if column not in row.fields:
        raise DataError(f"{row.where}: no key {column!r}; expected {expected}")
    return row.fields[column]


def text(value: Any, name: str, where: str) -> str:
    """The value, if it is a string that says something.

    Raises:
        DataError: It is no string, or empty.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is of type {type(value).__name__}; expected a string")
    if not value.strip():
        raise DataError(f"{where}: {name} is empty; expected some text")
    return value


def index_of_answer(value: Any, column: str, count: int, where: str) -> int:
    """The index of the right option as some datasets write it: an integer, or its digits in a string.

    Raises:
        DataError: It is -1 or empty, which marks rows without an answer; or no index of ``count`` options.
    """
    if value in ("", -1):
        raise DataError(f"{where}: {_NO_ANSWER.format(column=column, value=value)}")
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    is_index = isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 <= value < count
    if not is_index:
        raise DataError(f"{where}: {column!r} is {value!r}; expected the index of an option, 0 to {count - 1}")
    return int(value)


def index_of_label(value: Any, column: str, labels: list[str], where: str) -> int:
    """The index of the right option as others write it: by its label.

    Raises:
        DataError: It is empty, which marks rows without an answer; or none of the labels.
    """
    if value == "":
        raise DataError(f"{where}: {_NO_ANSWER.format(column=column, value=value)}")
    if value not in labels:
        shown = ", ".join(map(repr, labels))
        raise DataError(f"{where}: {column} {value!r} is not among the option labels; expected {shown}")
    return labels.index(value)

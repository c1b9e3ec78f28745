"""Raw rows of a data file, each with the place it came from, so that every later complaint can name that place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A data file that cannot be used. The message is ``FILE:LINE: what is wrong; what is expected``."""


@dataclass(frozen=True)
class Row:
    """One row as it stands in the data.

    Attributes:
        where: `FILE:LINE`, or `SOURCE:ROW` for rows that come from no file; both count from 1.
        fields: The row's columns.
    """

    where: str
    fields: Mapping[str, Any]


def read_rows(path: str | Path) -> list[Row]:
    """Reads a JSON Lines file (one object a line, blank lines skipped) or a JSON file that holds one list of objects.

    The form is told by the content, not by the name: a file whose first character is `[` is a list.

    Raises:
        DataError: The file is missing, empty, not UTF-8, not JSON, or holds something other than objects of whole
            characters.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: the file is not UTF-8; expected JSON Lines in UTF-8") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}); expected a JSON Lines file") from None
    values = _list_items(text, path) if text.lstrip().startswith("[") else _lines(text, path)
    rows = [_row(value, f"{path}:{line}") for line, value in values]
    if not rows:
        raise DataError(f"{path}: the file has no rows; expected one JSON object a line")
    if "\\ud" in text.lower():
        for row in rows:
            _refuse_half_characters(row)
    return rows


def number_rows(rows: Iterable[Mapping[str, Any]], source: str) -> list[Row]:
    """Gives rows that come from no file, such as a hub dataset's, the place `SOURCE:ROW`, counted from 1.

    Raises:
        DataError: There are no rows, or one of them is not a mapping.
    """
    numbered = [_row(value, f"{source}:{number}") for number, value in enumerate(rows, start=1)]
    if not numbered:
        raise DataError(f"{source}: the dataset has no rows; expected at least one")
    return numbered


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: the row is {_json_type(value)}; expected a JSON object")
    return Row(where, value)


def _refuse_half_characters(row: Row) -> None:
    """JSON can escape one half of a surrogate pair alone, which no tokenizer takes and no file can be written with."""
    try:
        json.dumps(row.fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("ascii", "backslashreplace").decode()
        raise DataError(
            f"{row.where}: the row holds {half}, half of a character; expected both halves, as in \\ud83d\\ude00"
        ) from None


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    # Not str.splitlines: it also cuts at U+2028 and others, which JSON allows inside a string.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            yield line, json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{line}: not valid JSON ({error.msg}, column {error.colno}); expected one JSON object a line"
            ) from None


def _list_items(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Walks the list item by item, because `json.loads` would not say which line an item starts on."""
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    closed = text.startswith("]", position)
    line, counted_to = 1, 0
    while not closed:
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}); expected a list of objects"
            ) from None
        line += text.count("\n", counted_to, position)
        counted_to = position
        yield line, value
        position = _skip_space(text, end)
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            line += text.count("\n", counted_to, position)
            raise DataError(f"{path}:{line}: not valid JSON (no comma or ] after an item); expected a list of objects")
        if not closed:
            position = _skip_space(text, position + 1)
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        line = text.count("\n", 0, rest) + 1
        raise DataError(f"{path}:{line}: text after the end of the list; expected one JSON list and nothing else")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _json_type(value: Any) -> str:
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")

"""Labels of a text classification task: their names, their one order, and the words that stand for them in a prompt."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldmole_ds.tasks.rows import DataError

_SHOWN = 12


@dataclass(frozen=True)
class LabelSet:
    """The labels of a task in the order in which every split uses them.

    Attributes:
        labels: Label names, sorted, without repeats.
        words: The word of each label, in the same order: written in the prompt and given as the answer.
    """

    labels: tuple[str, ...]
    words: tuple[str, ...]

    @classmethod
    def build(cls, labels: Sequence[str], label_words: Mapping[str, str] | None = None) -> LabelSet:
        """Sorts the labels by name and finds a word for each.

        Args:
            labels: Label names in any order.
            label_words: A word for each label that needs one. A label without one is its own word, with underscores
                and hyphens turned to spaces.

        Raises:
            DataError: A key of `label_words` is not a label, a word is empty, or two labels share a word.
        """
        label_words = label_words or {}
        ordered = tuple(sorted(set(labels)))
        for label in label_words:
            if label not in ordered:
                raise DataError(
                    f"label_words: {label!r} is not a label of this task; expected only keys among {listed(ordered)}"
                )
        words = tuple(_word(label, label_words.get(label)) for label in ordered)
        owner: dict[str, str] = {}
        for label, word in zip(ordered, words, strict=True):
            if word in owner:
                raise DataError(
                    f"label_words: labels {owner[word]!r} and {label!r} both have the word {word!r}; "
                    "give them different words in label_words"
                )
            owner[word] = label
        return cls(ordered, words)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The answers as continuations of a prompt: each word after a space."""
        return tuple(f" {word}" for word in self.words)


def label_name(value: Any, where: str, column: str, label_names: Sequence[str] | None = None) -> str:
    """The name of a label as it stands in a row.

    Args:
        value: A string, a boolean (named `true` or `false`) or an integer (named by its digits).
        where: Place of the row, for messages.
        column: Column of the label, for messages.
        label_names: Names of integer labels 0, 1, ..., as a hub dataset's `ClassLabel` has them.

    Raises:
        DataError: The value has another type, is empty, or is an integer without a name.
    """
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: {column!r} is empty; expected the name of a label")
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, numbers.Integral):
        raise DataError(
            f"{where}: {column!r} is of type {type(value).__name__}; expected a label as a string, integer or boolean"
        )
    if label_names is None:
        return str(int(value))
    if not 0 <= value < len(label_names):
        raise DataError(
            f"{where}: {column!r} is {value}, which has no name; expected 0 to {len(label_names) - 1} "
            "(-1 marks rows without a label: use a split that has labels)"
        )
    return label_names[int(value)]


def listed(names: Sequence[str]) -> str:
    """Names joined by commas for a message, cut after a dozen."""
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _word(label: str, given: str | None) -> str:
    if given is not None and not isinstance(given, str):
        raise DataError(f"label_words: the word of {label!r} is of type {type(given).__name__}; expected a string")
    word = " ".join((re.sub(r"[_-]", " ", label) if given is None else given).split())
    # A label made of hyphens alone has no word after the replacement, so it stands for itself.
    word = label if not word and given is None else word
    if not word:
        raise DataError(f"label_words: the word of {label!r} is empty; expected a word or a short phrase")
    return word

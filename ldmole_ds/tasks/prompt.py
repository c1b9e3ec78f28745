"""Prompts: plain text that ends just before the answer, with no chat template.

Both prompts end in a colon, and every answer begins with a space, so that a byte-level BPE tokenizer meets the answer
as it met words in pre-training. A multiple-choice question is answered with the letter of an option, as in the
evaluation protocol of LD-MoLE (arXiv 2509.25684); a text is classified by naming one of the topics listed above it.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

MIN_OPTIONS = 2
MAX_OPTIONS = len(string.ascii_uppercase)


def multiple_choice_prompt(question: str, options: Sequence[str]) -> str:
    """The question, one line `A. text` for each option, and `Answer:`.

    Args:
        question: Text of the question.
        options: 2 to 26 texts. They are lettered A, B, C, ... whatever the data calls them.
    """
    lines = [f"{letter}. {option.strip()}" for letter, option in zip(_letters(options), options, strict=True)]
    return "\n".join([question.strip(), *lines, "Answer:"])


def multiple_choice_candidates(options: Sequence[str]) -> tuple[str, ...]:
    """The answers to `multiple_choice_prompt`: the letter of each option, after a space."""
    return tuple(f" {letter}" for letter in _letters(options))


def classification_prompt(text: str, words: Sequence[str]) -> str:
    """The list of topics, the text to classify, and `Topic:`.

    Args:
        text: The text. It comes after the list, so that cutting a long prompt from its left keeps the text's end.
        words: The word of each label, in the order of the task's labels.
    """
    return f"Topics: {', '.join(words)}\n\nMessage: {text.strip()}\nTopic:"


def _letters(options: Sequence[str]) -> str:
    if not MIN_OPTIONS <= len(options) <= MAX_OPTIONS:
        raise ValueError(f"a question has {len(options)} options; expected {MIN_OPTIONS} to {MAX_OPTIONS}")
    return string.ascii_uppercase[: len(options)]

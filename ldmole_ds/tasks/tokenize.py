"""From questions to token ids: a prompt that may be cut, and answers that never are.

A candidate's tokens are those that it adds to the last line of its prompt. For a byte-level BPE tokenizer they are the
tokens of the text itself; a sentencepiece tokenizer, which puts a space of its own before any text, would otherwise
read " A" as two spaces and a letter, or as a letter without its space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ldmole_ds.tasks.item import Question
from ldmole_ds.tasks.rows import DataError

# Prompts that the tokenizer gets at once.
_TOGETHER = 1000


@dataclass(frozen=True)
class EncodedQuestion:
    """Token ids of a question.

    Attributes:
        prompt_ids: The prompt, beginning with the tokenizer's BOS where it has one, never ending with its EOS.
        candidate_ids: The tokens of each candidate, without special tokens; no two are equal, none begins another
            (but with `lengths` they may).
        gold: Index of the right candidate.
        num_cut_tokens: Prompt tokens that were cut to keep to `max_length`.
        lengths, task: As of the `Question`.
    """

    prompt_ids: tuple[int, ...]
    candidate_ids: tuple[tuple[int, ...], ...]
    gold: int
    num_cut_tokens: int = 0
    lengths: tuple[int, ...] | None = None
    task: str = ""


def encode_question(tokenizer: PreTrainedTokenizerBase, question: Question, max_length: int) -> EncodedQuestion:
    """Encodes a question so that its prompt and any one of its candidates take at most `max_length` tokens.

    A prompt that is too long loses tokens from its left, after the special tokens it begins with. The room left for it
    is the same whichever candidate follows, so that every candidate is scored after the same prompt.

    Raises:
        DataError: Two candidates have the same tokens, or one has none.
        ValueError: `max_length` holds no prompt beside the longest candidate.
    """
    return encode_questions(tokenizer, [question], max_length)[0]


def encode_questions(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], max_length: int
) -> list[EncodedQuestion]:
    """The same for many: their prompts go through the tokenizer together, candidates that all share only once."""
    encoded, known = [], {}
    for start in range(0, len(questions), _TOGETHER):
        block = questions[start : start + _TOGETHER]
        prompts = _prompt_ids(tokenizer, [question.prompt for question in block])
        for question, (special_ids, text_ids) in zip(block, prompts, strict=True):
            key = (_anchor(question.prompt), tuple(question.candidates), question.lengths is None)
            if key not in known:
                known[key] = _candidate_ids(tokenizer, question)
            encoded.append(_within(max_length, special_ids, text_ids, known[key], question))
    return encoded


def _within(
    max_length: int,
    special_ids: list[int],
    text_ids: list[int],
    candidate_ids: tuple[tuple[int, ...], ...],
    question: Question,
) -> EncodedQuestion:
    longest = max(len(ids) for ids in candidate_ids)
    room = max_length - longest - len(special_ids)
    if room < 1:
        raise ValueError(
            f"max_length {max_length} cannot hold an answer of {longest} tokens, {len(special_ids)} special tokens and "
            f"any prompt; raise --max_length to at least {longest + len(special_ids) + 1}, better to several hundred"
        )
    num_cut = max(0, len(text_ids) - room)
    prompt_ids = (*special_ids, *text_ids[num_cut:])
    return EncodedQuestion(prompt_ids, candidate_ids, question.gold, num_cut, question.lengths, question.task)


class ChoiceDataset(Dataset):
    """Encoded questions, and what has to be known of all of them to give every batch one shape.

    Args:
        questions: At least one encoded question.

    Attributes:
        max_candidates: The most candidates that a question has.
        max_candidate_length: Tokens of the longest candidate.
        single_token: Whether every candidate of every question is one token, so that a single forward pass scores
            them all.
        num_truncated: Questions whose prompt was cut.
    """

    def __init__(self, questions: Sequence[EncodedQuestion]) -> None:
        if not questions:
            raise DataError("there are no questions to make a dataset of; expected at least one")
        self.questions = list(questions)
        lengths = [len(ids) for question in self.questions for ids in question.candidate_ids]
        self.max_candidates = max(len(question.candidate_ids) for question in self.questions)
        self.max_candidate_length = max(lengths)
        # Candidates of one question differ (encode_question sees to it) unless they are one text twice, so a token each
        # is a token of their own.
        self.single_token = self.max_candidate_length == 1
        self.num_truncated = sum(question.num_cut_tokens > 0 for question in self.questions)

    @classmethod
    def from_questions(
        cls, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> ChoiceDataset:
        """Encodes every question; see `encode_question`."""
        return cls(encode_questions(tokenizer, questions, max_length))

    @property
    def chance(self) -> float:
        """Accuracy of guessing: the mean of 1 / (number of options)."""
        return sum(1 / len(question.candidate_ids) for question in self.questions) / len(self.questions)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each question with its right answer."""
        return [len(q.prompt_ids) + len(q.candidate_ids[q.gold]) for q in self.questions]

    @property
    def longest(self) -> int:
        """Tokens of the longest question with its longest candidate."""
        return max(len(q.prompt_ids) + max(map(len, q.candidate_ids)) for q in self.questions)

    def check_positions(self, limit: int | None) -> None:
        """Refuse questions longer than a model has positions for.

        Raises:
            DataError: Names the flag.
        """
        if limit is not None and self.longest > limit:
            raise DataError(
                f"a question has {self.longest} tokens, but the model has {limit} positions: use --max_length {limit}"
            )

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> EncodedQuestion:
        return self.questions[index]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[tuple[list[int], list[int]]]:
    """For each prompt the special tokens that the tokenizer puts before it, and its own tokens.

    What the tokenizer puts after the prompt (an EOS) is dropped: the answer comes there.
    """
    plain = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    full = tokenizer(prompts, verbose=False)["input_ids"]
    return [_without_special(tokenizer, *ids) for ids in zip(plain, full, strict=True)]


def _without_special(
    tokenizer: PreTrainedTokenizerBase, plain: list[int], full: list[int]
) -> tuple[list[int], list[int]]:
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], plain
    raise ValueError(
        f"{type(tokenizer).__name__} encodes the text itself differently when it adds special tokens, so that a "
        "prompt's tokens cannot be told from them; use a tokenizer without this behaviour"
    )


def _anchor(prompt: str) -> str:
    """The last line stands for the whole prompt, which would take long to encode once for every candidate."""
    return prompt.rsplit("\n", 1)[-1]


def _candidate_ids(tokenizer: PreTrainedTokenizerBase, question: Question) -> tuple[tuple[int, ...], ...]:
    encoded = _continuations(tokenizer, question.prompt, question.candidates)
    if question.lengths is not None:
        # Scores by character: a text that begins another has no advantage, and one text twice is scored twice.
        return encoded
    if _first_that_begins_another(encoded) is not None:
        # " travel" would always outscore " travel alert", whose probability is that of " travel" times another. A line
        # break after each candidate makes " travel" say that it ends there.
        encoded = _continuations(tokenizer, question.prompt, [f"{text}\n" for text in question.candidates])
    clash = _first_that_begins_another(encoded)
    if clash is not None:
        one, other = (question.candidates[index] for index in clash)
        raise DataError(
            f"candidates {one!r} and {other!r} are the same to the tokenizer ({list(encoded[clash[0]])}, "
            f"{list(encoded[clash[1]])}); give the labels other words with --label_words"
        )
    return encoded


def _continuations(
    tokenizer: PreTrainedTokenizerBase, prompt: str, candidates: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    anchor = _anchor(prompt)
    joined = [anchor, *(anchor + text for text in candidates)]
    anchor_ids, *joined_ids = tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    if any(ids[: len(anchor_ids)] != anchor_ids for ids in joined_ids):
        # The tokenizer merges the end of some prompt with the answer: take every answer by itself, so that the
        # candidates of one question are still all made in one way.
        anchor_ids, joined_ids = [], tokenizer(list(candidates), add_special_tokens=False, verbose=False)["input_ids"]
    encoded = tuple(tuple(ids[len(anchor_ids) :]) for ids in joined_ids)
    for text, ids in zip(candidates, encoded, strict=True):
        if not ids:
            raise DataError(
                f"candidate {text!r} has no tokens in this tokenizer; give its label another word with --label_words"
            )
    return encoded


def _first_that_begins_another(encoded: Sequence[tuple[int, ...]]) -> tuple[int, int] | None:
    """Indices of a candidate and of another one that begins with it or equals it, if there are such."""
    if len({ids[0] for ids in encoded}) == len(encoded):
        return None
    for i, short in enumerate(encoded):
        for j, other in enumerate(encoded):
            if i != j and other[: len(short)] == short:
                return i, j
    return None

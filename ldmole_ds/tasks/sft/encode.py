"""From text with answers to tokens with answers, and to a length.

An answer begins where the tokens of the prompt alone end, since those are what the model is given. Whether they are the
first tokens of the whole text too is checked; where they are not, because the tokenizer would merge across the border,
the pieces are encoded one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from ldmole_ds.tasks.collate import IGNORED_LABEL
from ldmole_ds.tasks.rows import DataError, Row
from ldmole_ds.tasks.sft.rows import TextPair, read_example
from ldmole_ds.tasks.sft.template import AnsweredText, render_answers


@dataclass(frozen=True)
class Document:
    """Token ids, and the tokens `[start, end)` of each answer.

    Attributes:
        input_ids: Up to the end of the last answer: what follows has no loss.
        answers: At least one, in order, none at the first token.
        cut: Whether something was cut to keep to the longest length.
    """

    input_ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    cut: bool = False

    @property
    def labels(self) -> list[int]:
        """The tokens of the answers, and -100 elsewhere."""
        labels = [IGNORED_LABEL] * len(self.input_ids)
        for start, end in self.answers:
            labels[start:end] = self.input_ids[start:end]
        return labels


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> list[Document | None]:
    """The documents of a row, None for one that does not fit `max_length`.

    Raises:
        DataError: The row breaks its schema, or its tokens do not say where an answer begins.
    """
    example = read_example(row)
    if isinstance(example, TextPair):
        documents = [_encode_pair(tokenizer, example, row.where)]
    else:
        texts = render_answers(tokenizer, example, row.where)
        documents = [encode_text(tokenizer, text, row.where) for text in texts]
    return [shorten(document, max_length, tokenizer.bos_token_id) for document in documents]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: AnsweredText, where: str) -> Document:
    """Tokens of a rendered text; special tokens are those that the text has.

    Raises:
        DataError: An answer begins with the text, or the pieces do not read as the text.
    """
    borders = [place for span in text.answers for place in span]
    ids, places = _tokens_at(tokenizer, text.text, borders, where)
    answers = tuple(zip(places[0::2], places[1::2], strict=True))
    if any(start == 0 or start >= end for start, end in answers):
        raise DataError(f"{where}: an answer has no tokens, or nothing before it; expected a prompt and an answer")
    return Document(tuple(ids[: answers[-1][1]]), answers)


def _encode_pair(tokenizer: PreTrainedTokenizerBase, pair: TextPair, where: str) -> Document:
    """Plain text: the special tokens that the tokenizer begins with, prompt, completion, EOS."""
    text = AnsweredText(pair.prompt + pair.completion, ((len(pair.prompt), len(pair.prompt + pair.completion)),))
    document = encode_text(tokenizer, text, where)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, (start, end) = document.input_ids, document.answers[0]
    if bos is not None and ids[0] != bos and tokenizer("a")["input_ids"][:1] == [bos]:
        ids, start, end = (bos, *ids), start + 1, end + 1
    if eos is not None and ids[-1] != eos:
        ids, end = (*ids, eos), end + 1
    return Document(ids, ((start, end),))


def _tokens_at(
    tokenizer: PreTrainedTokenizerBase, text: str, borders: Sequence[int], where: str
) -> tuple[list[int], list[int]]:
    """Tokens of a text, and how many of them come before each of its `borders` (in characters, ascending)."""

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    ids = encode(text)
    prefixes = [encode(text[:border]) for border in borders]
    if all(ids[: len(prefix)] == prefix for prefix in prefixes):
        return ids, [len(prefix) for prefix in prefixes]
    cuts = [0, *borders, len(text)]
    pieces = [encode(text[start:end]) for start, end in zip(cuts, cuts[1:], strict=False)]
    joined = [token for piece in pieces for token in piece]
    if _decoded(tokenizer, joined) != _decoded(tokenizer, ids):
        raise DataError(
            f"{where}: this tokenizer joins the end of a prompt with the beginning of its answer; move the space or "
            "line break between them into the answer"
        )
    return joined, [sum(map(len, pieces[:i])) for i in range(1, len(borders) + 1)]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def shorten(document: Document, max_length: int, bos_token_id: int | None = None) -> Document | None:
    """The document in at most `max_length` tokens, with whole answers.

    It ends after the last answer that fits. Where not even the first one does, its prompt loses its beginning (but a
    BOS). None where that answer alone, after one token of prompt, is too long.
    """
    ids, answers = document.input_ids, document.answers
    if len(ids) <= max_length:
        return document
    fitting = tuple(span for span in answers if span[1] <= max_length)
    if fitting:
        return replace(document, input_ids=ids[: fitting[-1][1]], answers=fitting, cut=True)
    start, end = answers[0]
    first = 1 if ids[0] == bos_token_id else 0
    room = max_length - (end - start) - first
    if room < 1:
        return None
    length = first + room
    return Document((*ids[:first], *ids[start - room : end]), ((length, length + end - start),), cut=True)

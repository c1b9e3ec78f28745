"""Tokenised once per node: worker processes write a table that all ranks then map into memory.

The table's name is a hash of everything that decides its content, so that a second run, and every rank but the first,
find it. The first one holds a file lock; the table appears whole or not at all. The content does not depend on the
number of workers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ldmole_ds.tasks.rows import DataError, Row
from ldmole_ds.tasks.sft.encode import Document, encode_row

# Raise it when the same rows become other tokens, or the table other columns.
_FORMAT = 2
_WHOLE, _CUT, _LEFT_OUT = 0, 1, 2
_ROWS_PER_WORKER = 500


class DocumentDataset(Dataset):
    """Documents of a table.

    Attributes:
        num_truncated: Documents that were cut.
        num_left_out: Documents that did not fit.
        lengths: Tokens of each document, int64.
        num_answer_tokens: Tokens with a loss.
    """

    def __init__(self, table: Any, source: str, max_length: int) -> None:
        columns = table.with_format("numpy")
        state, lengths = np.asarray(columns["state"][:]), np.asarray(columns["length"][:], dtype=np.int64)
        kept = np.flatnonzero(state != _LEFT_OUT)
        self.num_truncated, self.num_left_out = int((state == _CUT).sum()), int((state == _LEFT_OUT).sum())
        if not len(kept):
            raise DataError(
                f"{source}: no answer fits --max_seq_length {max_length}, so there is nothing to train on; raise it"
            )
        self._table = table if len(kept) == len(state) else table.select(kept)
        self.lengths = lengths[kept]
        self.num_answer_tokens = int(np.asarray(columns["num_answer_tokens"][:])[kept].sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        row = self._table[int(index)]
        places = row["answers"]
        answers = tuple(zip(places[0::2], places[1::2], strict=True))
        return Document(tuple(row["input_ids"]), answers, row["state"] == _CUT)


def tokenize_rows(
    read: Callable[[], Sequence[Row]],
    fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    source: str,
    workers: int | None = None,
    cache_dir: str | Path | None = None,
) -> DocumentDataset:
    """The documents of rows, from the cache or made now.

    Args:
        read: Gives the rows; called only where they are not in the cache.
        fingerprint: Of the rows: equal for equal rows.
        tokenizer: With a chat template if rows are conversations.
        max_length: Most tokens of a document.
        source: Name of the rows, for messages and the progress bar.
        workers: Processes; None: the node's cores, fewer for few rows.
        cache_dir: Default: a folder in the cache of `datasets`.

    Raises:
        DataError: A row does not fit, or no document is left.
        OSError: The cache cannot be written.
    """
    import datasets
    from filelock import FileLock

    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "ldmole_ds")
    table = folder / cache_key(fingerprint, tokenizer, max_length)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{table}.lock"):
        if not table.is_dir():
            _write(read(), tokenizer, max_length, source, workers, table)
    return DocumentDataset(datasets.load_from_disk(str(table)), source, max_length)


def cache_key(fingerprint: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """A hash of rows, tokenizer, chat template and settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        f"{_FORMAT}",
        fingerprint,
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        json.dumps(tokenizer.chat_template),
        f"{max_length}",
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:32]


def file_fingerprint(path: str | Path, limit: int | None) -> str:
    """Of a file's bytes, its name (which messages have) and how many of its rows are used.

    Raises:
        DataError: The file cannot be read.
    """
    digest = hashlib.sha256(f"{path}:{limit}:".encode())
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a JSON Lines file") from None
    return digest.hexdigest()


def _write(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    source: str,
    workers: int | None,
    table: Path,
) -> None:
    import datasets

    cores = workers or os.cpu_count() or 1
    workers = min(cores, -(-len(rows) // _ROWS_PER_WORKER))
    # As text: messages of one column need not have the same keys.
    texts = {"where": [row.where for row in rows], "row": [json.dumps(dict(row.fields), default=str) for row in rows]}
    columns = {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "answers": datasets.Sequence(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "num_answer_tokens": datasets.Value("int32"),
        "state": datasets.Value("int8"),
    }
    scratch = table.with_name(f"{table.name}.{os.getpid()}.tmp")
    scratch.mkdir(exist_ok=True)
    had_bars = not datasets.are_progress_bars_disabled()
    try:
        encoded = datasets.Dataset.from_dict(texts).map(
            _encode_batch,
            batched=True,
            batch_size=100,
            num_proc=workers if workers > 1 else None,
            remove_columns=["where", "row"],
            features=datasets.Features(columns),
            fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
            load_from_cache_file=False,
            cache_file_name=str(scratch / "parts.arrow"),
            new_fingerprint=table.name,
            desc=f"tokenising {source}",
        )
        datasets.disable_progress_bars()
        encoded.save_to_disk(str(scratch / "table"))
        (scratch / "table").rename(table)
    finally:
        if had_bars:
            datasets.enable_progress_bars()
        shutil.rmtree(scratch, ignore_errors=True)


def _encode_batch(
    batch: Mapping[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list]:
    rows = [Row(where, json.loads(text)) for where, text in zip(batch["where"], batch["row"], strict=True)]
    documents = [document for row in rows for document in encode_row(tokenizer, row, max_length)]
    kept = [document or Document((), ()) for document in documents]
    return {
        "input_ids": [list(d.input_ids) for d in kept],
        "answers": [[place for span in d.answers for place in span] for d in kept],
        "length": [len(d.input_ids) for d in kept],
        "num_answer_tokens": [sum(end - start for start, end in d.answers) for d in kept],
        "state": [_LEFT_OUT if d is None else _CUT if d.cut else _WHOLE for d in documents],
    }

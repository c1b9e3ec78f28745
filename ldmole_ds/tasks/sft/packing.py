"""Several documents in one row, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from torch.utils.data import Dataset

from ldmole_ds.tasks.sft.encode import Document
from ldmole_ds.tasks.sft.tokens import DocumentDataset


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Which documents share a row: best fit, the longest first; each is in one row, whole.

    Args:
        lengths: Tokens of each document, at most `max_length`.
        max_length: Tokens of a row.

    Returns:
        Indices of documents by row, in an order that depends on the lengths alone.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(free, (lengths[index], -1))
        if place < len(free):
            left, row = free.pop(place)
        else:
            left, row = max_length, len(rows)
            rows.append([])
        rows[row].append(index)
        if left > lengths[index]:
            insort(free, (left - lengths[index], row))
    return rows


class PackedDataset(Dataset):
    """Rows of documents.

    Attributes:
        rows: Indices of the documents of each row.
        documents: The documents.
    """

    def __init__(self, documents: DocumentDataset, max_length: int) -> None:
        self.documents = documents
        self.rows = pack(documents.lengths.tolist(), max_length)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [int(self.documents.lengths[row].sum()) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Document]:
        return [self.documents[i] for i in self.rows[index]]

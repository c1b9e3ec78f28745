"""Batches of documents: one in a row, padded on the right, or several in a row, each attending to itself alone.

A packed batch has no `attention_mask`. Positions that start again at 0 say where a document begins, and from them the
masks of Transformers keep documents apart (eager, sdpa and flex attention; flash attention of a single row by its
variable-length kernel). That needs a forward pass without KV cache.

Legend: `B` rows, `W` tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmole_ds.tasks.collate import IGNORED_LABEL
from ldmole_ds.tasks.sft.encode import Document


class DocumentCollator:
    """One document in a row.

    Args:
        pad_token_id: Id written where there is no token.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `position_ids` and `labels` (-100 but at answers), each (B, W), int64."""
        rows = _rows([[document] for document in documents], self.pad_token_id)
        padding_mask = rows.pop("padding_mask")
        return {**rows, "attention_mask": padding_mask.long()}


class PackedCollator:
    """Several documents in a row.

    Args:
        pad_token_id: Id written where there is no token.
        one_row: Put all rows behind one another, without padding: for flash attention, which keeps documents apart in
            a single row only. Other attention would compute a mask of all tokens by all tokens.
    """

    def __init__(self, pad_token_id: int, *, one_row: bool = False) -> None:
        self.pad_token_id, self.one_row = pad_token_id, one_row

    def __call__(self, packs: Sequence[Sequence[Document]]) -> dict[str, Tensor | bool]:
        """A batch.

        Returns:
            `input_ids`, `position_ids` and `labels` (-100 but at answers), each (B, W), int64, B = 1 with `one_row`;
            `padding_mask` (B, W), bool, True for real tokens, which are what is routed; and `use_cache`, False.
        """
        if self.one_row:
            packs = [[document for pack in packs for document in pack]]
        return {**_rows(packs, self.pad_token_id), "use_cache": False}


def _rows(packs: Sequence[Sequence[Document]], pad_token_id: int) -> dict[str, Tensor]:
    shape = (len(packs), max(sum(len(d.input_ids) for d in pack) for pack in packs))
    input_ids, labels = torch.full(shape, pad_token_id), torch.full(shape, IGNORED_LABEL)
    position_ids, padding_mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for row, pack in enumerate(packs):
        start = 0
        for document in pack:
            end = start + len(document.input_ids)
            input_ids[row, start:end] = torch.tensor(document.input_ids)
            # A document's first token has no label, so none is predicted from the document before it.
            labels[row, start:end] = torch.tensor(document.labels)
            position_ids[row, start:end] = torch.arange(end - start)
            padding_mask[row, start:end] = True
            start = end
        # The padding is a document of its own.
        position_ids[row, start:] = torch.arange(shape[1] - start)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "padding_mask": padding_mask}

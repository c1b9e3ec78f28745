"""Texts that break off, each with four endings: SWAG and HellaSwag.

SWAG       {"startphrase": str, "ending0": str, ..., "ending3": str, "label": int}
HellaSwag  {"activity_label": str, "ctx": str, "endings": [str], "label": "0" | ... | "3"}
"""

from __future__ import annotations

import re

from ldmole_ds.tasks.fields import index_of_answer, required, text
from ldmole_ds.tasks.item import Item
from ldmole_ds.tasks.rows import DataError, Row

_ENDINGS = 4
_SWAG_SCHEMA = '{"startphrase": ..., "ending0": ..., ..., "ending3": ..., "label": ...}'
_HELLASWAG_SCHEMA = '{"activity_label": ..., "ctx": ..., "endings": [...], "label": ...}'


def swag_item(row: Row) -> Item:
    """One row of SWAG.

    Raises:
        DataError: The row does not fit the schema.
    """
    start, label = (required(row, key, _SWAG_SCHEMA) for key in ("startphrase", "label"))
    endings = [required(row, f"ending{n}", _SWAG_SCHEMA) for n in range(_ENDINGS)]
    return _item(text(start, "'startphrase'", row.where), endings, label, row.where)


def hellaswag_item(row: Row) -> Item:
    """One row of HellaSwag. Its activity comes before the text; the marks of WikiHow's layout are taken out.

    Raises:
        DataError: The row does not fit the schema.
    """
    keys = ("activity_label", "ctx", "endings", "label")
    activity, context, endings, label = (required(row, key, _HELLASWAG_SCHEMA) for key in keys)
    if not isinstance(endings, list) or len(endings) != _ENDINGS:
        raise DataError(f"{row.where}: 'endings' has the wrong form; expected a list of {_ENDINGS} strings")
    context = _without_marks(text(context, "'ctx'", row.where))
    start = f"{text(activity, repr('activity_label'), row.where).strip()}: {context}"
    return _item(start, [_without_marks(e) if isinstance(e, str) else e for e in endings], label, row.where)


def _item(start: str, endings: list, label: object, where: str) -> Item:
    options = tuple(text(ending, f"ending {n}", where) for n, ending in enumerate(endings))
    start = start.strip()
    return Item(
        question=f"{start}\nWhich ending is the most likely?",
        cloze=start,
        options=options,
        gold=index_of_answer(label, "label", _ENDINGS, where),
    )


def _without_marks(value: str) -> str:
    """``[header] How to x [title] Do y. [step] Then z.`` becomes ``How to x. Do y. Then z.``"""
    plain = re.sub(r"^(\s*\[(header|title|step|substeps)\])+\s*", "", value)
    plain = re.sub(r"([.?!:]?)\s*\[title\]\s*", lambda mark: f"{mark[1] or '.'} ", plain)
    return re.sub(r"\s*\[(header|step|substeps)\]\s*", " ", plain) or value

"""Messages of ten domains, from CLINC150; the embedded data.

{"text": str, "label": str}   or with "domain" for "label"
"""

from __future__ import annotations

import json
from functools import cache

from ldmole_ds.tasks.demo import demo_files
from ldmole_ds.tasks.fields import index_of_label, required, text
from ldmole_ds.tasks.item import Item
from ldmole_ds.tasks.labels import LabelSet
from ldmole_ds.tasks.prompt import classification_prompt
from ldmole_ds.tasks.rows import Row

_SCHEMA = '{"text": ..., "label": ...}'


def topic_item(row: Row) -> Item:
    """One row. Its options are the words that stand for the ten domains, in the order of the domains' names.

    Raises:
        DataError: The row does not fit the schema.
    """
    column = "domain" if "label" not in row.fields and "domain" in row.fields else "label"
    message, domain = text(required(row, "text", _SCHEMA), "'text'", row.where), required(row, column, _SCHEMA)
    domains = topics()
    return Item(
        question=f"Message: {message.strip()}\nWhich topic is it about?",
        cloze=classification_prompt(message, domains.words),
        options=domains.words,
        gold=index_of_label(domain, column, list(domains.labels), row.where),
        labels_a_class=True,
    )


@cache
def topics() -> LabelSet:
    """The ten domains and their words."""
    words = json.loads(demo_files()["labels"].read_text(encoding="utf-8"))
    return LabelSet.build(list(words), words)

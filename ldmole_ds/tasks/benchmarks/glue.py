"""Two tasks of GLUE that are answered with yes or no: CoLA and RTE.

CoLA  {"sentence": str, "label": 0 | 1}                      1: acceptable
RTE   {"sentence1": str, "sentence2": str, "label": 0 | 1}   0: entailment
"""

from __future__ import annotations

from ldmole_ds.tasks.fields import index_of_answer, required, text
from ldmole_ds.tasks.item import Item
from ldmole_ds.tasks.rows import Row

_COLA_SCHEMA = '{"sentence": ..., "label": ...}'
_RTE_SCHEMA = '{"sentence1": ..., "sentence2": ..., "label": ...}'


def cola_item(row: Row) -> Item:
    """One row of CoLA; options no and yes, in the order of its labels.

    Raises:
        DataError: The row does not fit the schema.
    """
    sentence, label = (required(row, key, _COLA_SCHEMA) for key in ("sentence", "label"))
    sentence = text(sentence, "'sentence'", row.where).strip()
    question = f"Sentence: {sentence}\nIs this sentence acceptable English?"
    return _item(question, ("no", "yes"), label, row.where)


def rte_item(row: Row) -> Item:
    """One row of RTE; options yes and no, in the order of its labels.

    Raises:
        DataError: The row does not fit the schema.
    """
    premise, claim, label = (required(row, key, _RTE_SCHEMA) for key in ("sentence1", "sentence2", "label"))
    premise, claim = (text(value, "the sentence", row.where).strip() for value in (premise, claim))
    question = f"Text: {premise}\nClaim: {claim}\nDoes the claim follow from the text?"
    return _item(question, ("yes", "no"), label, row.where)


def _item(question: str, options: tuple[str, str], label: object, where: str) -> Item:
    gold = index_of_answer(label, "label", len(options), where)
    return Item(question, f"{question}\nAnswer:", options, gold, labels_a_class=True)

"""Packed rows train as rows of one document: loss, auxiliary losses and all gradients, for every kind of attention."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from ldmole_ds.tasks.sft.collate import DocumentCollator, PackedCollator
from ldmole_ds.tasks.sft.encode import Document
from ldmole_ds.tasks.sft.packing import pack
from ldmole_ds.training.packing_check import largest_change
from tests.families import CAUSAL, SIZES, Family, awake_model, gradients
from tests.tiny import tiny_config

TOLERANCE = 1e-5
LENGTHS = (5, 11, 3, 9, 2, 7, 4, 12)
PACKS = ((0, 1, 2), (3, 4, 5), (6, 7))  # 19, 18 and 16 tokens
FAMILIES = {
    **CAUSAL,
    # Documents are longer than the window.
    "mistral, window": Family(
        hf.MistralForCausalLM, hf.MistralConfig(**SIZES, head_dim=8, sliding_window=4, tie_word_embeddings=False)
    ),
}


def documents() -> list[Document]:
    """One answer or two in each; the first token of a document may well be likely after the one before it."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in LENGTHS:
        ids = tuple(torch.randint(3, 128, (length,), generator=generator).tolist())
        answers = ((1, length),) if length < 7 else ((2, 4), (length - 2, length))
        made.append(Document(ids, answers))
    return made


def batches() -> dict[str, dict]:
    """The same documents, unpacked and packed, in rows and in one row."""
    single = documents()
    packs = [[single[i] for i in row] for row in PACKS]
    return {
        "unpacked": DocumentCollator(0)(single),
        "rows": PackedCollator(0)(packs),
        "one row": PackedCollator(0, one_row=True)(packs),
    }


def results(model, batch: dict) -> dict:
    model.zero_grad()
    outputs = model.train()(**batch)
    outputs.loss.backward()
    found = {name: grad.clone() for name, grad in gradients(model).items()}
    return {"loss": outputs.loss.detach(), **{k: v.detach() for k, v in outputs.aux_losses.items()}, **found}


def largest_difference(found: dict, expected: dict) -> float:
    return max(float((found[name] - value).norm() / value.norm().clamp(min=1e-6)) for name, value in expected.items())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_rows_give_the_same_losses_and_gradients(name, attention):
    family = FAMILIES[name]
    base = family.build()
    base.set_attn_implementation(attention)
    model = awake_model(base, tiny_config())
    made = batches()
    expected = results(model, made["unpacked"])
    assert len(expected) > 10 and all(value.isfinite().all() for value in expected.values())
    for layout in ("rows", "one row"):
        assert largest_difference(results(model, made[layout]), expected) < TOLERANCE, layout


def test_what_parity_would_miss_is_noticed():
    """Attention across documents, a target across the border, routed padding: each changes what is compared."""
    model = awake_model(CAUSAL["llama"].build(), tiny_config())
    made = batches()
    expected = results(model, made["unpacked"])
    rows = made["rows"]
    across = {**rows, "position_ids": torch.arange(19).expand(3, -1)}
    target = {**rows, "labels": rows["labels"].clone()}
    target["labels"][0, 5] = rows["input_ids"][0, 5]
    for wrong in (across, target, {**rows, "padding_mask": None}, {**rows, "use_cache": True}):
        assert largest_difference(results(model, wrong), expected) > 1e-3


def test_a_batch_is_laid_out_as_documented():
    single = [Document((7, 8, 9), ((1, 3),)), Document((4, 5), ((1, 2),)), Document((6, 3), ((1, 2),))]
    batch = PackedCollator(0)([single[:2], single[2:]])
    assert batch["input_ids"].tolist() == [[7, 8, 9, 4, 5], [6, 3, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 8, 9, -100, 5], [-100, 3, -100, -100, -100]]
    assert batch["padding_mask"].tolist() == [[True] * 5, [True] * 2 + [False] * 3]
    assert "attention_mask" not in batch and batch["use_cache"] is False
    flat = PackedCollator(0, one_row=True)([single[:2], single[2:]])
    assert flat["input_ids"].tolist() == [[7, 8, 9, 4, 5, 6, 3]] and flat["padding_mask"].all()
    padded = DocumentCollator(0)(single[:2])
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]] and "padding_mask" not in padded


@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (9, 1, 8, 2, 7, 3), (10,), (6, 6, 6), (1,) * 23])
def test_packs_hold_every_document_once(lengths):
    packs = pack(lengths, 10)
    assert sorted(i for row in packs for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 10 for row in packs)
    # No two rows fit into one.
    sums = sorted(sum(lengths[i] for i in row) for row in packs)
    assert len(sums) < 2 or sums[0] + sums[1] > 10
    assert packs == pack(lengths, 10)


class CrossAttending(torch.nn.Module):
    """A model that takes positions and then attends to all that came before."""

    def __init__(self, base):
        super().__init__()
        self.base, self.config = base, base.config

    def forward(self, input_ids, position_ids=None, **kwargs):
        return self.base(input_ids=input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_that_sees_across_documents_is_found_out(attention):
    base = CAUSAL["llama"].build()
    base.set_attn_implementation(attention)
    for collator in (PackedCollator(0), PackedCollator(0, one_row=True)):
        assert largest_change(base, collator) is None
        assert largest_change(CrossAttending(base), collator) > 1e-4

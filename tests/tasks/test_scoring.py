"""Scores of batches against the slow way, on models with rotary and with absolute positions."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ldmole_ds.tasks import (
    ChoiceCollator,
    ChoiceDataset,
    EncodedQuestion,
    accuracy,
    score_candidates,
    score_candidates_reference,
)

PAD = 0
# Prompts of very different lengths, candidates missing in places, tokens that equal the padding id.
SINGLE = ChoiceDataset(
    [
        EncodedQuestion((3, 0, 5, 6, 7, 8, 9, 4), ((10,), (11,), (0,)), 2),
        EncodedQuestion((4,), ((12,), (13,)), 0),
        EncodedQuestion((0, 2, 1), ((14,), (11,), (10,)), 1),
    ]
)
GENERAL = ChoiceDataset(
    [
        EncodedQuestion((3, 0, 5, 6, 7, 8, 9, 4), ((10, 1), (11,), (0, 3, 2), (9,)), 2),
        EncodedQuestion((4,), ((12,), (13, 0)), 0),
        EncodedQuestion((0, 2, 1), ((14,), (11, 5), (10, 5, 9)), 1),
    ]
)


def tiny_llama():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2():
    # GPT-2's own special ids lie outside so small a vocabulary.
    config = GPT2Config(
        vocab_size=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


class PassesOn(nn.Module):
    """An engine as DeepSpeed's: it takes anything and hands it to its `module`. Counts forwards."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = []

    def forward(self, *args, **kwargs):
        self.calls.append({name: value for name, value in kwargs.items() if name != "attention_mask"})
        return self.module(*args, **kwargs)


class TakesIdsAndMaskOnly(nn.Module):
    """A model with the least signature; it returns logits at every position."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def collate(dataset, **kwargs):
    return ChoiceCollator.for_datasets(PAD, dataset, **kwargs)(dataset.questions)


def check_against_reference(model, reference_model, dataset, batch, single_token):
    with torch.no_grad():
        scores = score_candidates(model, batch, single_token=single_token)
        assert scores.shape == (len(dataset), dataset.max_candidates)
        assert scores.dtype == torch.float32
        for row, question in zip(scores, dataset.questions, strict=True):
            expected = score_candidates_reference(reference_model, question)
            torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=0)
            assert torch.isneginf(row[len(expected) :]).all()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("multiple", [None, 16])
@pytest.mark.parametrize(("dataset", "single_token"), [(SINGLE, True), (SINGLE, False), (GENERAL, False)])
def test_batches_score_as_the_reference_does(make, multiple, dataset, single_token):
    model = make()
    check_against_reference(model, model, dataset, collate(dataset, pad_to_multiple_of=multiple), single_token)


def test_positions_matter_to_the_parity():
    """The check above would see wrong positions: GPT-2 scores otherwise when padding is counted."""
    model, batch = tiny_gpt2(), collate(SINGLE)
    prompts, mask = batch["input_ids"][:, :-1], batch["attention_mask"][:, :-1]
    counted = torch.arange(prompts.shape[1]).expand_as(prompts)
    with torch.no_grad():
        right = score_candidates(model, batch, single_token=True)
        logits = model(input_ids=prompts, attention_mask=mask, position_ids=counted).logits
    wrong = logits[:, -1].log_softmax(dim=-1)
    # The second question has one token of prompt after seven of padding, and the candidates 12 and 13.
    assert not torch.allclose(right[1, :2], wrong[1, [12, 13]], atol=1e-2)


@pytest.mark.parametrize(("dataset", "single_token"), [(SINGLE, True), (GENERAL, False)])
def test_the_least_signature_will_do(dataset, single_token):
    model = tiny_llama()  # rotary positions are relative, so it needs no position_ids
    check_against_reference(TakesIdsAndMaskOnly(model), model, dataset, collate(dataset), single_token)


def test_wrappers_are_looked_through():
    model = tiny_llama()
    engine = PassesOn(PassesOn(model))
    check_against_reference(engine, model, SINGLE, collate(SINGLE), True)
    assert len(engine.calls) == 1
    assert engine.calls[0].keys() == {"input_ids", "position_ids", "logits_to_keep", "use_cache"}
    assert engine.calls[0]["logits_to_keep"] == 1
    bare = PassesOn(TakesIdsAndMaskOnly(model))
    check_against_reference(bare, model, SINGLE, collate(SINGLE), True)
    assert bare.calls[0].keys() == {"input_ids"}


def test_wrappers_that_answer_for_what_they_wrap():
    """As PEFT's: `base_model` of its inner wrapper is that of the Transformers model, the part without the LM head."""

    class Answers(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self._modules["model"], name)

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    model = tiny_llama()
    engine = PassesOn(Answers(model))
    check_against_reference(engine, model, SINGLE, collate(SINGLE), True)
    assert engine.calls[0]["logits_to_keep"] == 1


@pytest.mark.parametrize("questions", [slice(0, 1), slice(1, 2), slice(0, 3)])
def test_the_number_of_forwards_does_not_depend_on_the_batch(questions):
    engine = PassesOn(tiny_llama())
    batch = ChoiceCollator.for_datasets(PAD, GENERAL)(GENERAL.questions[questions])
    with torch.no_grad():
        score_candidates(engine, batch, single_token=False)
    assert len(engine.calls) == GENERAL.max_candidates == 4
    assert len({call["input_ids"].shape for call in engine.calls}) == 1


def test_half_precision_is_scored_in_float32():
    model = tiny_llama().to(torch.bfloat16)
    with torch.no_grad():
        assert score_candidates(model, collate(SINGLE), single_token=True).dtype == torch.float32


def test_scores_carry_gradients():
    model = tiny_llama()
    scores = score_candidates(model, collate(GENERAL), single_token=False)
    scores[torch.isfinite(scores)].sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_single_token_needs_single_tokens():
    with pytest.raises(ValueError, match=r"candidates take up to 3 tokens; pass ChoiceDataset.single_token"):
        score_candidates(tiny_llama(), collate(GENERAL), single_token=True)


def test_accuracy():
    scores = torch.tensor([[-1.0, -2.0], [-3.0, -1.0], [-1.0, float("-inf")], [-2.0, -2.0]])
    # Right, right, wrong, and the first of two equals: right.
    assert accuracy(scores, torch.tensor([0, 1, 1, 0])) == 0.75

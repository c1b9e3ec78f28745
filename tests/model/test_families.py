"""Every family of base models trains as its plain dense form does, is saved, loaded, and generates."""

import logging

import pytest
import torch

from ldmole_ds.model import LDMoLEModel, get_ldmole_model
from tests.families import CAUSAL, CLASSIFIERS, FAMILIES, awake_model, dense_model, gradients
from tests.tiny import ragged_batch, tiny_config

ALL, CAUSAL_ONLY = pytest.mark.parametrize("family", FAMILIES), pytest.mark.parametrize("family", CAUSAL)


def config_of(family):
    head = FAMILIES[family].head
    return tiny_config(modules_to_save=None if head is None else [head])


def batch_of(family):
    batch = ragged_batch(rows=4, width=7)
    if family in CLASSIFIERS:
        # Padding on the right and recognisable as such: one classifier reads the first token, the other the last.
        mask = batch["attention_mask"].flip(1)
        ids = batch["input_ids"].clamp(min=3) * mask
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1])}
    return batch


def run(model, batch):
    """Output and gradients of one training step, and how often each input group ran."""
    runs = []
    handles = [g.register_forward_hook(lambda module, *_: runs.append(module.name)) for g in model.input_groups]
    output = model.train()(**batch)
    output.loss.backward()
    for handle in handles:
        handle.remove()
    return output, gradients(model), runs


def assert_same_step(model, dense, batch):
    """Outputs and all gradients; returns the runs of the model's groups."""
    (output, grads, runs), (expected, dense_grads, dense_runs) = run(model, batch), run(dense, batch)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.aux_losses, expected.aux_losses, rtol=1e-5, atol=1e-7)
    assert grads.keys() == dense_grads.keys()
    for name, value in dense_grads.items():
        assert value.norm() > 0, f"{name}: a gradient of zero compares nothing"
        assert (grads[name] - value).norm() <= 1e-5 * value.norm(), name
    assert sorted(dense_runs) == sorted(name for g in model.input_groups for name in g.members)
    return runs


@ALL
def test_a_step_is_that_of_the_dense_form_with_one_dispatch_per_group(family):
    model = awake_model(FAMILIES[family].build(), config_of(family))
    dense = dense_model(FAMILIES[family].build(), config_of(family), model)
    assert sorted(g.members for g in model.input_groups) == sorted(FAMILIES[family].groups())
    runs = assert_same_step(model, dense, batch_of(family))
    assert sorted(runs) == sorted(group.name for group in model.input_groups)


@ALL
def test_what_is_saved_loads_into_a_fresh_base(family, tmp_path):
    model, batch = awake_model(FAMILIES[family].build(), config_of(family)), batch_of(family)
    head = FAMILIES[family].head
    if head is not None:
        model.base_model.get_submodule(head).weight.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = LDMoLEModel.from_pretrained(FAMILIES[family].build(), tmp_path)
    bare = FAMILIES[family].build().eval()(**batch).logits
    with torch.no_grad():
        found, expected = loaded(**batch), model.eval()(**batch)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert not torch.allclose(found.logits, bare, atol=1e-4)


@CAUSAL_ONLY
def test_generate_with_and_without_cache_and_padding(family):
    model = awake_model(CAUSAL[family].build(), config_of(family)).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = ragged_batch(rows=2, width=6, seed=3)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert 0 < mask[0].sum() != mask[1].sum()
    tokens = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 6:]
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options)[:, 6:], tokens)
    for row in range(2):
        alone = ids[row : row + 1, mask[row] == 1]
        found = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(found[0, alone.shape[1] :], tokens[row])


@pytest.mark.parametrize("family", ["llama, tied", "gemma", "gpt2"])
def test_tied_embeddings_stay_tied_and_frozen(family):
    model = awake_model(CAUSAL[family].build(), tiny_config())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight and isinstance(head, torch.nn.Linear)
    before = embedding.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(**batch_of(family)).loss.backward()
    optimizer.step()
    assert torch.equal(embedding.weight, before) and head.weight is embedding.weight


def test_a_model_whose_groups_cannot_be_found_trains_right(caplog):
    """Its class cannot be built from the config alone: every projection then stands alone."""

    class Custom(CAUSAL["llama"].model_class):
        def __init__(self, config, extra):
            super().__init__(config)
            self.extra = extra

    def build():
        torch.manual_seed(0)
        return Custom(CAUSAL["llama"].config, extra=1)

    with caplog.at_level(logging.WARNING):
        model = awake_model(build(), tiny_config())
    assert "every projection routes and dispatches on its own" in caplog.text
    assert [len(group.members) for group in model.input_groups] == [1] * 14
    assert len(assert_same_step(model, dense_model(build(), tiny_config(), model), ragged_batch(rows=4))) == 14


def test_a_base_on_several_devices_is_refused():
    base = FAMILIES["llama"].build()
    base.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with pytest.raises(ValueError, match="spread over 0, cpu: load it without device_map"):
        get_ldmole_model(base, tiny_config())
    base.hf_device_map = {"": "cpu"}
    get_ldmole_model(base, tiny_config())


def test_an_encoder_decoder_is_refused():
    import transformers as hf

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64}
    bart = hf.BartForConditionalGeneration(hf.BartConfig(**sizes, encoder_ffn_dim=48, decoder_ffn_dim=48))
    with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder-decoder model.*decoder-only"):
        get_ldmole_model(bart, tiny_config())
    assert all(p.requires_grad for p in bart.parameters()), "a refused model is left as it was"

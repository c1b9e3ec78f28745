"""The wrapped model behaves like the model it wraps, plus auxiliary losses where there are labels."""

import inspect
import pickle
import threading

import pytest
import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers import LlamaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from ldmole_ds.model import get_ldmole_model
from ldmole_ds.ops import load_balancing_loss, router_z_loss, sparsegen, sparsity_loss
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model

KEYS = ["sparsity", "load_balancing", "router_z"]
WEIGHTS = [0.1, 0.5, 0.01]  # of `tiny_config`, in this order


def cross_entropy(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def weighted(aux_losses):
    return sum(weight * aux_losses[key] for key, weight in zip(KEYS, WEIGHTS, strict=True))


def test_loss_has_auxiliary_terms_in_training_only():
    model, batch = tiny_model(), ragged_batch()
    train, evaluation = model.train()(**batch), model.eval()(**batch)
    expected = cross_entropy(evaluation.logits, batch["labels"])
    torch.testing.assert_close(evaluation.loss, expected)
    torch.testing.assert_close(train.loss, expected + weighted(train.aux_losses))
    assert train.loss - expected > 0.1
    for output in (train, evaluation):
        assert list(output.aux_losses) == KEYS
        assert all(v.dtype == torch.float32 and v.dim() == 0 for v in output.aux_losses.values())
    assert all(value.requires_grad for value in train.aux_losses.values())


@pytest.mark.parametrize("mask_padding", [True, False])
def test_auxiliary_losses_are_means_over_tokens_and_projections(mask_padding):
    model, batch = tiny_model(tiny_config(mask_padding=mask_padding)), ragged_batch()
    logits, lams = [], []
    for group in model.input_groups:

        def watch(group, args):
            x = args[0].detach().flatten(0, 1)
            logits.extend(x @ gate.t() for gate in group.gate)
            lams.extend([group.lambda_mlp(x)[0]] * len(group.members))

        group.register_forward_pre_hook(watch)
    found = model(**batch).aux_losses
    logits_TJE, lam_TJ = torch.stack(logits, 1), torch.stack(lams, 1)
    probs_TJE = sparsegen(logits_TJE, lam_TJ)
    real = batch["attention_mask"].flatten().bool()
    assert logits_TJE.shape == (real.numel(), 14, 8) and 0 < real.sum() < real.numel()
    # The balance loss never counts padding; the others do where padding is routed.
    routed = real if mask_padding else None
    expected = {
        "sparsity": sparsity_loss(logits_TJE, lam_TJ, 2, routed),
        "load_balancing": load_balancing_loss(probs_TJE, real),
        "router_z": router_z_loss(logits_TJE, routed),
    }
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
        assert value > 0.1


def test_output_is_a_model_output_and_a_pytree():
    output = tiny_model()(**ragged_batch())
    assert isinstance(output, CausalLMOutputWithPast) and set(output) >= {"loss", "logits", "aux_losses"}
    leaves, spec = pytree.tree_flatten(output)
    assert any(leaf is output.aux_losses["sparsity"] for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(output) and again.loss is output.loss and again.aux_losses == output.aux_losses
    halved = pytree.tree_map(lambda t: t / 2 if torch.is_tensor(t) else t, output)
    assert torch.equal(halved.aux_losses["router_z"], output.aux_losses["router_z"] / 2)


def test_auxiliary_losses_survive_mixed_precision_wrapping():
    from accelerate.utils import convert_outputs_to_fp32

    model = tiny_model()
    output = convert_outputs_to_fp32(model.forward)(**ragged_batch())
    assert list(output.aux_losses) == KEYS and output.aux_losses["sparsity"].requires_grad


def test_without_labels_the_output_is_the_base_models():
    model, batch = tiny_model(), ragged_batch()
    del batch["labels"]
    output = model(**batch)
    assert type(output) is CausalLMOutputWithPast and output.loss is None


def test_tuple_outputs():
    model, batch = tiny_model(), ragged_batch()
    expected = model.train()(**batch)
    loss, logits, *_ = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(model.eval()(**batch, return_dict=False)[0], model(**batch).loss)


def test_signature_config_and_attributes_are_the_base_models():
    base = tiny_llama()
    parameters = inspect.signature(base.forward).parameters
    model = get_ldmole_model(base, tiny_config())
    assert inspect.signature(model.forward).parameters == parameters
    assert model.config is base.config and model.generation_config is base.generation_config
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.loss_type == base.loss_type == "ForCausalLM" and model.dtype == base.dtype
    base.accepts_loss_kwargs = False
    assert model.accepts_loss_kwargs is False
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


def test_evaluation_loops_are_told_to_ignore_what_are_not_logits():
    model = tiny_model()
    assert set(model.config.keys_to_ignore_at_inference) == {"past_key_values", "aux_losses"}
    assert LlamaConfig.keys_to_ignore_at_inference == ["past_key_values"]


def test_positional_arguments_are_understood():
    model, batch = tiny_model().eval(), ragged_batch()
    by_position = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    assert torch.equal(by_position.loss, model(**batch).loss)
    assert torch.equal(by_position.aux_losses["sparsity"], model(**batch).aux_losses["sparsity"])


def test_disable_adapter_is_the_bare_base_model():
    model, bare, batch = tiny_model(), tiny_llama(), ragged_batch()
    adapted, expected = model(**batch).logits, bare(**batch)
    with model.disable_adapter():
        found = model.train()(**batch)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
        with model.disable_adapter():
            pass
        assert torch.equal(model(**batch).logits, expected.logits), "an inner context must not end the outer one"
    assert torch.equal(model(**batch).logits, adapted) and not torch.equal(adapted, expected.logits)


def test_the_adapter_is_back_after_an_exception():
    model, batch = tiny_model(), ragged_batch()
    adapted, expected = model(**batch).logits, tiny_llama()(**batch).logits
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        with pytest.raises(KeyError), model.disable_adapter():
            raise KeyError
        assert torch.equal(model(**batch).logits, expected)
        raise ZeroDivisionError
    assert torch.equal(model(**batch).logits, adapted)


def test_modules_trained_in_place_cannot_be_disabled():
    model = tiny_model(tiny_config(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"\['lm_head'\].*trained in place.*load the base model a second time"):
        with model.disable_adapter():
            pass


def test_a_fresh_adapter_changes_nothing():
    batch = ragged_batch()
    model = get_ldmole_model(tiny_llama(), tiny_config())
    assert torch.equal(model(**batch).logits, tiny_llama()(**batch).logits)


def broken_gate(model):
    model.input_groups[4].gate.data[1, 2, 0] = float("nan")


def broken_lambda(model):
    model.input_groups[4].lambda_mlp.bias_out.data.fill_(float("nan"))


def infinite_gate(model):
    model.input_groups[4].gate.data[0, 0, 0] = float("inf")


@pytest.mark.parametrize("breaks", [broken_gate, broken_lambda, infinite_gate])
@pytest.mark.parametrize("train", [True, False])
def test_non_finite_routing_names_the_layer(breaks, train):
    model = tiny_model(tiny_config(lambda_sharing="per_layer")).train(train)
    breaks(model)
    with pytest.raises(FloatingPointError, match=r"layers\.1\.self_attn\.\{q_proj,k_proj,v_proj\}.*learning rate"):
        model(**ragged_batch())


@pytest.mark.parametrize("entrance", ["model", "base_model"])
def test_an_exception_half_way_leaves_nothing_behind(entrance):
    model, batch = tiny_model().eval(), ragged_batch()
    expected = model(**batch).logits
    called = getattr(model, "forward" if entrance == "model" else "base_model")
    k_proj = model.base_model.model.layers[1].self_attn.k_proj
    handle = k_proj.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        called(**batch)
    handle.remove()
    assert model._holder.current is None and all(group.results.pending is None for group in model.input_groups)
    assert torch.equal(called(**batch).logits, expected)


def test_routing_summary_counts_real_tokens():
    model, batch = tiny_model(), ragged_batch()
    for _ in range(2):
        model(**batch)
    summary = model.routing_summary()
    assert len(summary) == 14
    tokens = 2 * int(batch["attention_mask"].sum())
    for stats in summary.values():
        assert stats["tokens"] == tokens and sum(stats["load"]) == pytest.approx(1)
        assert 1 <= stats["experts_per_token"] <= 8 and stats["lambda_mean"] < 1
    assert summary["model.layers.0.self_attn.q_proj"]["load"][3] == 0
    model.reset_routing_summary()
    assert model.routing_summary() == {}


def test_threads_that_share_a_model():
    model = tiny_model().eval()
    batches = [ragged_batch(seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
    differences = []

    def run(batch, logits):
        with torch.no_grad():
            differences.extend((model(**batch).logits - logits).abs().max().item() for _ in range(10))
        model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=3)

    threads = [threading.Thread(target=run, args=each) for each in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(differences) == 40 and max(differences) < 1e-5


def test_a_model_can_be_pickled():
    model, batch = tiny_model().eval(), ragged_batch()
    assert torch.equal(pickle.loads(pickle.dumps(model))(**batch).logits, model(**batch).logits)

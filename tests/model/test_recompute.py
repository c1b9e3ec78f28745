"""Activation checkpointing: the second pass routes as the first did, and auxiliary losses are counted once."""

from types import SimpleNamespace

import pytest
import torch

from ldmole_ds.layers import ForwardContext
from ldmole_ds.model import adapted_forward
from tests.tiny import ragged_batch, tiny_config, tiny_model

# Transformers renamed these methods and keeps the older names until version 6.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_.*able. is deprecated:FutureWarning")
REMEDY = r"gradient_checkpointing_enable\(\) on the LDMoLEModel"


def make_model(checkpointing, enable="gradient_checkpointing_enable"):
    model = tiny_model(tiny_config(lora_dropout=0.2)).train()
    if checkpointing:
        getattr(model, enable)()
    return model


def run(model, batches):
    """All forward passes, then one backward."""
    torch.manual_seed(5)
    runs = []
    handles = [g.register_forward_pre_hook(lambda module, *_: runs.append(module.name)) for g in model.input_groups]
    outputs = [model(**batch) for batch in batches]
    sum(output.loss for output in outputs).backward()
    for handle in handles:
        handle.remove()
    return {
        "losses": [output.loss.detach() for output in outputs],
        "aux": [output.aux_losses for output in outputs],
        "grads": {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
        "tokens": {stats["tokens"] for stats in model.routing_summary().values()},
        "runs": len(runs),
    }


@pytest.mark.parametrize("seeds", [[0], [0, 1]], ids=["one pass", "two passes before the backward"])
def test_loss_and_gradients_are_those_without_checkpointing(seeds):
    batches = [ragged_batch(seed=seed) for seed in seeds]
    # Equal shapes and different masks, so that the mask of the wrong pass would go unnoticed but for the gradients.
    masks = [batch["attention_mask"] for batch in batches]
    assert all(m.shape == masks[0].shape for m in masks) and (len(seeds) == 1 or not torch.equal(*masks))
    plain, recomputed = run(make_model(False), batches), run(make_model(True), batches)
    assert recomputed["runs"] == 2 * plain["runs"] == 2 * 8 * len(seeds), "every group must have run twice"
    assert recomputed["losses"] == plain["losses"]
    for ours, expected in zip(recomputed["aux"], plain["aux"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    for name, expected in plain["grads"].items():
        torch.testing.assert_close(recomputed["grads"][name], expected, rtol=1e-5, atol=1e-8, msg=name)
        assert expected.abs().max() > 0, f"{name}: a gradient of zero compares nothing"
    assert recomputed["tokens"] == plain["tokens"] == {int(sum(mask.sum() for mask in masks))}


def test_the_second_pass_routes_as_the_first():
    model, routed = make_model(True), {}
    for group in model.input_groups:
        dispatch = group.dispatcher.run

        def watch(x, probs, experts, layer, dispatch=dispatch):
            routed.setdefault(layer, []).append((x.detach(), probs.detach()))
            return dispatch(x, probs, experts, layer)

        group.dispatcher = SimpleNamespace(run=watch)
    run(model, [ragged_batch()])
    assert len(routed) == 8 and {len(passes) for passes in routed.values()} == {2}
    for (x, probs), (again_x, again_probs) in routed.values():
        assert (x == 0).any(), "dropout must be on"
        assert torch.equal(x, again_x) and torch.equal(probs, again_probs)


def test_evaluation_in_between_and_training_on():
    found = []
    for model in (make_model(False), make_model(True)):
        first = run(model, [ragged_batch()])
        with torch.no_grad():
            evaluated = model.eval()(**ragged_batch(seed=1))
        model.zero_grad()
        found.append((first, evaluated, run(model.train(), [ragged_batch(seed=2)])))
    (_, plain_evaluated, plain), (_, evaluated, recomputed) = found
    assert torch.equal(evaluated.logits, plain_evaluated.logits) and evaluated.loss == plain_evaluated.loss
    assert recomputed["losses"] == plain["losses"] and recomputed["runs"] == 2 * plain["runs"]
    torch.testing.assert_close(recomputed["grads"], plain["grads"], rtol=1e-5, atol=1e-8)


def test_dropout_makes_a_difference_here():
    """Otherwise the test above could not see a second pass with another dropout mask."""
    model, batch = make_model(False), ragged_batch()
    torch.manual_seed(5)
    first = model(**batch).loss
    assert first != model(**batch).loss


def test_the_newer_name_of_the_same_switch():
    """The Trainer of transformers 5.23 calls it, with keywords of its own."""
    plain = run(make_model(False), [ragged_batch()])
    recomputed = run(make_model(True, "activation_checkpointing_enable"), [ragged_batch()])
    assert recomputed["runs"] == 2 * plain["runs"]
    torch.testing.assert_close(recomputed["grads"], plain["grads"], rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="pass use_reentrant=False"):
        make_model(False).activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})


def test_the_second_pass_records_nothing(monkeypatch):
    contexts = []

    def keep(**kwargs):
        contexts.append(ForwardContext(**kwargs))
        return contexts[-1]

    monkeypatch.setattr(adapted_forward, "ForwardContext", keep)
    assert run(make_model(True), [ragged_batch()])["runs"] == 16
    assert [len(context.records) for context in contexts] == [8]


def test_checkpointing_can_be_switched_off_again():
    model = make_model(True)
    model.gradient_checkpointing_disable()
    assert run(model, [ragged_batch()])["runs"] == 8


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="pass use_reentrant=False"):
        make_model(False).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    make_model(False).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def test_checkpointing_of_the_base_model_is_refused_in_backward():
    model = make_model(False)
    model.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(**ragged_batch()).loss
    with pytest.raises(RuntimeError, match=REMEDY):
        loss.backward()


def test_evaluation_does_not_recompute():
    model, calls = make_model(True).eval(), []
    for group in model.input_groups:
        group.register_forward_pre_hook(lambda module, *_: calls.append(module.name))
    model(**ragged_batch())
    assert len(calls) == 8

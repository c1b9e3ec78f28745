"""``torch.compile`` of the wrapped model: the base model is one graph, and new sequence lengths do not multiply it."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from ldmole_ds.model import get_ldmole_model
from tests.tiny import ragged_batch, tiny_config, tiny_llama, wake_experts


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def one_layer(**changes):
    """One layer of the tiny Llama in training, one input group."""
    base = tiny_llama()
    base.model.layers, base.config.num_hidden_layers = base.model.layers[:1], 1
    targets = ["q_proj", "k_proj", "v_proj"]
    model = get_ldmole_model(base, tiny_config(target_modules=targets, **changes), 7)
    wake_experts(model)
    return model.train()


def step(callee, model, batch):
    """Loss and gradients, from one state of the random generator."""
    torch.manual_seed(5)
    output = callee(**batch)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return output, grads


def assert_same(found, expected):
    (output, grads), (eager_output, eager_grads) = found, expected
    torch.testing.assert_close(output.loss, eager_output.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(output.logits, eager_output.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.aux_losses, eager_output.aux_losses, rtol=1e-5, atol=1e-7)
    assert grads.keys() == eager_grads.keys()
    for name, value in eager_grads.items():
        assert value.norm() > 0 and (grads[name] - value).norm() <= 1e-5 * value.norm(), name


def assert_same_routing(found, expected):
    assert found.keys() == expected.keys()
    for projection, stats in expected.items():
        approximate = {key: pytest.approx(value) if isinstance(value, float) else value for key, value in stats.items()}
        assert found[projection] == approximate


def test_forward_and_backward_with_dropout():
    eager, model, batch = one_layer(lora_dropout=0.1), one_layer(lora_dropout=0.1), ragged_batch(rows=4, width=6)
    assert_same(step(torch.compile(model, backend="aot_eager"), model, batch), step(eager, eager, batch))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_training_over_many_lengths_evaluation_and_training_again():
    eager, model = one_layer(lora_dropout=0.1), one_layer(lora_dropout=0.1)
    # What is traced, and when again, does not depend on the backend; this one is quick.
    compiled = torch.compile(model, backend="eager")
    for seed, width in enumerate([6, 9, 7, 12]):
        batch = ragged_batch(rows=4, width=width, seed=seed)
        assert_same(step(compiled, model, batch), step(eager, eager, batch))
    assert counters["stats"]["unique_graphs"] == 2, "one graph for the first length, one for all others"
    assert_same_routing(model.routing_summary(), eager.routing_summary())

    batch = ragged_batch(rows=3, width=8, seed=9)
    with torch.no_grad():
        found, expected = compiled.eval()(**batch), eager.eval()(**batch)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)
    compiled.train(), eager.train()
    batch = ragged_batch(rows=4, width=10, seed=4)
    assert_same(step(compiled, model, batch), step(eager, eager, batch))
    assert counters["stats"]["unique_graphs"] == 3, "evaluation is one more graph, and training again none"
    assert model._holder.current is None and all(group.results.pending is None for group in model.input_groups)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_loss_and_gradients():
    eager, model, batch = one_layer(), one_layer(), ragged_batch(rows=2, width=5)
    assert_same(step(torch.compile(model), model, batch), step(eager, eager, batch))

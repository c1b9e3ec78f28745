"""How a batch is split into micro-steps does not change the losses that are means over tokens."""

import pytest
import torch

from tests.tiny import ragged_batch, tiny_config, tiny_model

SPLITS = [[8], [3, 1, 4], [1] * 8]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def run(split, **weights):
    """Loss and gradients of one optimizer step in micro-steps of these many rows."""
    model, batch = tiny_model(tiny_config(**weights)).train(), ragged_batch()
    step = {
        "num_items_in_batch": int(batch["labels"][:, 1:].ne(-100).sum()),
        "num_routed_tokens": int(batch["attention_mask"].sum()),
        "gradient_accumulation_steps": len(split),
    }
    outputs = []
    for rows in zip(*(value.split(split) for value in batch.values()), strict=True):
        output = model(**dict(zip(batch, rows, strict=True)), **step)
        output.loss.backward()
        outputs.append(output)
    aux = {key: [output.aux_losses[key].item() for output in outputs] for key in outputs[0].aux_losses}
    return sum(output.loss.item() for output in outputs), aux, gradients(model)


@pytest.mark.parametrize("split", SPLITS[1:])
def test_micro_steps_add_up_to_the_whole_batch(split):
    weights = {"load_balancing_loss_weight": 0.0, "sparsity_loss_weight": 1.0, "router_z_loss_weight": 0.1}
    loss, aux, grads = run(split, **weights)
    whole_loss, whole_aux, whole_grads = run(SPLITS[0], **weights)
    assert loss == pytest.approx(whole_loss, rel=1e-5)
    for key in ("sparsity", "router_z"):
        assert sum(aux[key]) == pytest.approx(whole_aux[key][0], rel=1e-5)
    for name, expected in whole_grads.items():
        assert (grads[name] - expected).norm() < 1e-5 * expected.norm(), name


def test_the_balance_loss_is_the_mean_of_the_micro_steps():
    _, aux, _ = run([3, 1, 4])
    model, batch = tiny_model().train(), ragged_batch()
    for i, start, stop in ((0, 0, 3), (1, 3, 4), (2, 4, 8)):
        alone = model(**{key: value[start:stop] for key, value in batch.items()}).aux_losses["load_balancing"]
        assert aux["load_balancing"][i] == pytest.approx(alone.item() / 3, rel=1e-5)


def test_without_the_counts_a_call_is_a_batch_of_its_own():
    model, batch = tiny_model().train(), ragged_batch()
    plain = model(**batch)
    counted = model(**batch, num_routed_tokens=int(batch["attention_mask"].sum()))
    torch.testing.assert_close(plain.aux_losses, counted.aux_losses)
    twice = model(**batch, num_routed_tokens=2 * int(batch["attention_mask"].sum()))
    torch.testing.assert_close(twice.aux_losses["sparsity"], plain.aux_losses["sparsity"] / 2)
    torch.testing.assert_close(twice.aux_losses["load_balancing"], plain.aux_losses["load_balancing"])

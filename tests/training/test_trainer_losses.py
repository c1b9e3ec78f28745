"""The Trainer's loss: shifted cross-entropy with label smoothing, plus every auxiliary loss, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ldmole_ds.model import ldmole_param_groups
from ldmole_ds.model.adapter_io import gather_adapter_state
from tests.distributed_utils import run_distributed
from tests.tiny import tiny_model
from tests.training.trainer_runs import RATE, SMOOTHING, STEPS, collate, make_trainer, rows, train, train_on_ranks

TOLERANCE = 1e-5


def by_hand(accumulation: int) -> dict:
    """The same training in a plain loop, the loss written out."""
    model, data = tiny_model().train(), rows()
    config = model.adapter_config
    optimizer = torch.optim.AdamW(ldmole_param_groups(model), lr=RATE)
    parameters = [p for p in model.parameters() if p.requires_grad]
    result = {"losses": [], "norms": []}
    for step in range(STEPS):
        part = data[8 * step : 8 * step + 8]
        size = 8 // accumulation
        batches = [collate(part[i : i + size]) for i in range(0, 8, size)]
        items = sum(int(b["labels"][:, 1:].ne(-100).sum()) for b in batches)
        tokens = sum(int(b["attention_mask"].sum()) for b in batches)
        total = 0.0
        for batch in batches:
            outputs = model(
                **batch, num_items_in_batch=items, num_routed_tokens=tokens, gradient_accumulation_steps=accumulation
            )
            logits, labels = outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
            loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING, reduction="sum") / items
            aux = outputs.aux_losses
            loss = loss + config.sparsity_loss_weight * aux["sparsity"]
            loss = loss + config.load_balancing_loss_weight * aux["load_balancing"]
            loss = loss + config.router_z_loss_weight * aux["router_z"]
            loss.backward()
            total += loss.item()
        result["losses"].append(total)
        result["norms"].append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return {**result, "state": gather_adapter_state(model)}


def assert_same(found: dict, expected: dict) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE)
    for key, value in expected["state"].items():
        difference = (found["state"][key] - value).norm() / value.norm().clamp(min=1e-12)
        assert difference < TOLERANCE, f"{key} differs by {difference:.1e}"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_process_trains_as_the_loss_written_out(accumulation):
    assert_same(train(make_trainer(8 // accumulation, accumulation)), by_hand(accumulation))


@pytest.mark.distributed
def test_two_ranks_train_as_one_process():
    cases = [(4, 1, 1, 2), (4, 1, 2, 2), (2, 2, 2, 2), (2, 2, 2, 3)]
    expected = {accumulation: by_hand(accumulation) for accumulation in (1, 2)}
    for results in run_distributed(train_on_ranks, 2, cases, deepspeed=True, timeout_s=300):
        for (_, accumulation, *_), found in zip(cases, results, strict=True):
            assert_same(found, expected[accumulation])

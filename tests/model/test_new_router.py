"""A router of one's own is one entry in `ldmole_ds.layers.routers`: nothing else names them."""

import pytest
import torch

from ldmole_ds.layers.routers import ROUTERS, Router
from ldmole_ds.model import LDMoLEModel
from tests.tiny import ragged_batch, tiny_config, tiny_llama, tiny_model


def test_a_new_router_trains_is_reported_and_saved(monkeypatch, tmp_path):
    monkeypatch.setitem(ROUTERS, "sigmoid", lambda fixed_lambda, topk: Router(lambda logits, lam: logits.sigmoid()))
    model, batch = tiny_model(tiny_config(router="sigmoid")).train(), ragged_batch()
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.any() for g in model.input_groups for p in g.parameters())
    assert all(row["experts_per_token"] == 8.0 for row in model.routing_summary().values())
    model.save_pretrained(tmp_path)
    loaded = LDMoLEModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_an_unknown_router_is_refused_before_the_model_is_touched():
    base = tiny_llama()
    with pytest.raises(ValueError, match="router='switch' is not known: use one of sparsegen, "):
        tiny_model(tiny_config(router="switch"), base=base)
    assert all(p.requires_grad for p in base.parameters())

"""Who computes the experts' products: dense or grouped."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ldmole_ds.ops import expert_compute as module
from ldmole_ds.ops.expert_compute import choose_products, dense_operations, grouped_operations, may_be_grouped
from ldmole_ds.ops.grouped_experts import GROUPED
from ldmole_ds.ops.lora_experts import DENSE

PAPER, LARGE = (8, 8), (128, 32)


@pytest.fixture(autouse=True)
def auto(monkeypatch):
    monkeypatch.delenv(module.SWITCH, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(module.matrix_products, "torch_is_slow", lambda: False)


def layer(size, rows=1024, support=2, projections=1, d=64, **kinds):
    """Routing weights ``(N, G, e)`` of so many active experts, lora_A and lora_B."""
    e, r = size
    w = torch.zeros(rows, projections, e, **kinds)
    w[..., :support] = 1 / support
    return w, torch.zeros(projections, e, r, d, **kinds), [torch.zeros(e, r, d, **kinds) for _ in range(projections)]


def chosen(*args, **kwargs):
    return {DENSE: "dense", GROUPED: "grouped"}[choose_products(*layer(*args, **kwargs))]


@pytest.mark.parametrize("rows", [1, 128, 1024, 65536])
@pytest.mark.parametrize("projections", [1, 3])
@pytest.mark.parametrize("d", [64, 576, 8192])
def test_the_papers_size_is_dense_whatever_the_routing(rows, projections, d):
    lora_A = torch.empty(1).expand(projections, *PAPER, d)
    assert not may_be_grouped(rows, lora_A, [d] * projections)


def test_nobody_looks_at_the_data_for_it():
    w, lora_A, lora_B = layer(PAPER)
    assert choose_products(w.to("meta"), lora_A, lora_B) is DENSE
    with pytest.raises(RuntimeError, match="meta"):
        choose_products(*(t.to("meta") if i == 0 else t for i, t in enumerate(layer(LARGE))))


def test_large_experts_that_few_tokens_use_are_grouped():
    assert chosen(LARGE, support=2) == "grouped"
    assert chosen(LARGE, support=2, projections=3) == "grouped"
    assert chosen(LARGE, support=128) == "dense"
    assert chosen(LARGE, rows=2) == "dense", "two tokens fill no product"
    assert chosen(LARGE, rows=0) == "dense"


def test_a_slow_library_of_dense_products_favours_grouped_ones(monkeypatch):
    cases = [{"size": (16, 16), "support": k} for k in (2, 4, 16)]
    assert [chosen(**case, d=256) for case in cases] == ["grouped", "dense", "dense"]
    monkeypatch.setattr(module.matrix_products, "torch_is_slow", lambda: True)
    assert [chosen(**case, d=256) for case in cases] == ["grouped", "grouped", "dense"]


def test_many_threads_favour_dense_products(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert chosen(LARGE, support=2) == "dense"


def test_a_gpu_and_half_precision_are_dense():
    assert chosen(LARGE, dtype=torch.bfloat16) == chosen(LARGE, dtype=torch.float16) == "dense"
    assert chosen(LARGE, device="meta") == "dense"  # as on a GPU: the data cannot be read


def test_what_is_traced_without_values_is_dense(monkeypatch):
    for switch in ("auto", "grouped"):
        monkeypatch.setenv(module.SWITCH, switch)
        with FakeTensorMode():
            assert chosen(LARGE) == "dense"


def test_the_switch(monkeypatch):
    monkeypatch.setenv(module.SWITCH, "dense")
    assert chosen(LARGE) == "dense"
    monkeypatch.setenv(module.SWITCH, "grouped")
    assert chosen(PAPER, support=8) == chosen(LARGE, dtype=torch.bfloat16) == "grouped"
    with pytest.raises(ValueError, match="LDMOLE_EXPERT_COMPUTE=grouped, but the tensors are on a GPU: unset it"):
        chosen(LARGE, device="meta")
    monkeypatch.setenv(module.SWITCH, "sparse")
    with pytest.raises(ValueError, match="'sparse' is not known: use auto, dense or grouped"):
        chosen(PAPER)


def test_what_costs():
    sizes = (64, 16, 256, [256])
    assert dense_operations(2048, *sizes) == pytest.approx(2 * dense_operations(1024, *sizes))
    few, many = grouped_operations(1024, 1024, *sizes), grouped_operations(8192, 1024, *sizes)
    assert few < many < 8 * few
    assert dense_operations(1024, *sizes) > few
    # Three projections: three times the pairs, and three times the cost.
    three = grouped_operations(3 * 1024, 1024, 64, 16, 256, [256] * 3)
    assert three == pytest.approx(3 * few)
    assert may_be_grouped(1024, torch.empty(3, 64, 16, 256, device="cpu"), [256] * 3)

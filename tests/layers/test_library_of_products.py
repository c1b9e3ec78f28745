"""Input groups whose products oneDNN makes, against those of PyTorch's choice. D in_features, O out_features."""

import pytest
import torch

from ldmole_ds.distributed import LocalTokenDispatcher
from ldmole_ds.layers import input_group
from ldmole_ds.ops import matrix_products
from tests.layers.small_group import D, make_group, one_pass, projections

if not matrix_products.is_here():
    pytest.skip("this PyTorch has no oneDNN", allow_module_level=True)


# One with x and two for each of three members; backward three for each member and two with x.
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_all_of_a_groups_products(whole, dropout, monkeypatch):
    torch.manual_seed(0)
    group, x, calls = make_group(dispatcher=LocalTokenDispatcher(), dropout=dropout), torch.randn(3, 50, D), []
    group.layers_alive = projections(group)

    def counted(*args):
        calls.append(args)
        return product(*args)

    product = torch.ops.mkldnn._linear_pointwise.default
    monkeypatch.setattr(torch.ops.mkldnn._linear_pointwise, "default", counted)
    monkeypatch.setattr(matrix_products, "_FEWEST_ADDED_FACTORS", 0)
    if not whole:
        monkeypatch.setattr(input_group, "runs_whole", lambda group, x: False)
    monkeypatch.setenv(matrix_products.SWITCH, "torch")
    expected = one_pass(group, x)
    assert not calls
    monkeypatch.setenv(matrix_products.SWITCH, "onednn")
    matrix_products.multiplies("onednn")
    calls.clear()
    found = one_pass(group, x)
    assert len(calls) == 1 + 2 * 3 + 3 * 3 + 2
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item(), msg=name)

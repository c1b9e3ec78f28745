"""Who multiplies matrices on a CPU, and that oneDNN's products are PyTorch's.

T tokens, D in_features, O out_features.
"""

import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ldmole_ds.ops import matrix_products
from ldmole_ds.ops.frozen_product import frozen_linear
from ldmole_ds.ops.matrix_products import ONEDNN, SWITCH, TORCH, products_for

T, D = 128, 512

needs_onednn = pytest.mark.skipif(not matrix_products.is_here(), reason="this PyTorch has no oneDNN")

ZEN_5 = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nflags\t\t: fpu avx2 avx512f\n\nprocessor\t: 1\n"


def forget():
    """What was found out about the machine."""
    matrix_products.multiplies.cache_clear()
    matrix_products.torch_is_slow.cache_clear()


@pytest.fixture(autouse=True)
def every_machine():
    forget()
    yield
    forget()


@pytest.fixture
def always(monkeypatch):
    """oneDNN for every product; counts them."""
    monkeypatch.setenv(SWITCH, "onednn")
    matrix_products.multiplies("onednn")
    calls = []

    def counted(name):
        function = getattr(ONEDNN, name)
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    monkeypatch.setattr(matrix_products, "ONEDNN", matrix_products.MatrixProducts(*map(counted, ONEDNN._fields)))
    return calls


def layouts(rows, columns):
    """Matrices that lie in memory in other ways."""
    yield torch.randn(rows, columns)
    yield torch.randn(columns, rows).t()
    yield torch.randn(rows, columns + 5)[:, 2 : 2 + columns]
    yield torch.randn(columns, rows + 7)[:, 3 : 3 + rows].t()
    yield torch.randn(2 * rows, columns)[::2]
    yield torch.randn(rows, 2 * columns)[:, ::2]
    yield torch.randn(1, columns).expand(rows, columns)
    yield torch.randn(rows, 1).expand(rows, columns)


@needs_onednn
@pytest.mark.parametrize("fewest", [0, 256])
@pytest.mark.parametrize("shape", [(130, 64, 72), (64, 130, 1), (1, 33, 5), (200, 1, 7), (0, 8, 4)], ids=str)
def test_the_products_are_pytorchs(shape, fewest, monkeypatch):
    monkeypatch.setattr(matrix_products, "_FEWEST_ADDED_FACTORS", fewest)
    m, k, n = shape
    for a, b in itertools.product(layouts(m, k), layouts(k, n)):
        wanted = a.double() @ b.double()
        close = {"rtol": 1e-5, "atol": 1e-4, "check_dtype": False}
        torch.testing.assert_close(ONEDNN.mm(a, b), wanted, **close)
        torch.testing.assert_close(ONEDNN.linear(a, b.t(), None), wanted, **close)
        bias = torch.randn(n)
        torch.testing.assert_close(ONEDNN.linear(a, b.t(), bias), wanted + bias, **close)
        wide = torch.full((m, n + 3), 7.0)
        assert ONEDNN.mm(a, b, out=wide[:, :n]).data_ptr() == wide.data_ptr()
        torch.testing.assert_close(wide[:, :n], wanted, **close)
        y = torch.randn(m, n)
        before = y.clone()
        assert ONEDNN.add_mm_(y, a, b) is y
        torch.testing.assert_close(y, wanted + before, **close)
        assert not wide[:, n:].ne(7).any()


@needs_onednn
def test_a_large_sum_is_added_in_parts(monkeypatch):
    a, b, y = torch.randn(50, 6), torch.randn(6, 8), torch.randn(50, 8)
    wanted = y + a @ b
    monkeypatch.setattr(matrix_products, "_FEWEST_ADDED_FACTORS", 0)
    monkeypatch.setattr(matrix_products, "_VALUES_ADDED", 8 * 16)
    torch.testing.assert_close(ONEDNN.add_mm_(y, a, b), wanted)
    monkeypatch.setattr(matrix_products, "_VALUES_ADDED", 3)
    torch.testing.assert_close(ONEDNN.add_mm_(y, a, b), wanted + a @ b)


@needs_onednn
def test_values_that_are_not_finite_stay_where_they_are():
    a, b = torch.randn(T, D), torch.randn(D, 8)
    a[3, 4], a[5, 6] = float("nan"), float("inf")
    broken = ONEDNN.mm(a, b).isfinite().logical_not().any(1)
    assert broken.nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (ZEN_5, True),
        (ZEN_5.replace(": 26", ": 27"), True),
        (ZEN_5.replace(": 26", ": 25"), False),
        (ZEN_5.replace("AuthenticAMD", "GenuineIntel"), False),
        (ZEN_5.replace("avx512f", "avx512bw"), False),
        ("", False),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\n", False),
        (None, False),
    ],
)
def test_which_processors_are_wide(cpuinfo, expected, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    monkeypatch.setattr(matrix_products, "_CPUINFO", path)
    assert matrix_products.is_wide_amd() == expected


@needs_onednn
@pytest.mark.parametrize("wide", [True, False])
def test_who_multiplies_on_its_own_choice(wide, monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(matrix_products, "is_wide_amd", lambda: wide)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    x = torch.randn(2, T // 2, D)
    with torch.no_grad():
        assert products_for(x) is (ONEDNN if wide else TORCH)
        assert products_for(x.view(T, D)) is (ONEDNN if wide else TORCH)
        assert products_for(x[:, :-1]) is TORCH, "few tokens"
        assert products_for(torch.randn(T, D - 1)) is TORCH, "small products"
        assert products_for(torch.randn(0, D)) is TORCH
        forget()
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
        assert products_for(x) is TORCH, "another library than MKL"


@needs_onednn
def test_who_looks_on_sees_pytorchs_operations(monkeypatch):
    monkeypatch.setenv(SWITCH, "onednn")
    x = torch.randn(T, D)
    assert products_for(x) is TORCH, "operations are differentiated"
    with torch.no_grad():
        assert products_for(x) is ONEDNN
        for other in (x.double(), x.bfloat16(), x.to("meta")):
            assert products_for(other) is TORCH
        with FakeTensorMode() as fake:
            assert products_for(fake.from_tensor(x)) is TORCH
        with FlopCounterMode(display=False):
            assert products_for(x) is TORCH
        assert products_for(x) is ONEDNN


def test_the_switch(monkeypatch):
    x = torch.randn(T, D)
    with torch.no_grad():
        monkeypatch.setenv(SWITCH, "torch")
        monkeypatch.setattr(matrix_products, "is_wide_amd", lambda: True)
        assert products_for(x) is TORCH
        monkeypatch.setenv(SWITCH, "mkl")
        with pytest.raises(ValueError, match="LDMOLE_CPU_PRODUCTS='mkl' is not known: use auto, torch or onednn"):
            products_for(x)
        monkeypatch.setenv(SWITCH, "onednn")
        monkeypatch.setattr(matrix_products, "is_here", lambda: False)
        with pytest.raises(ValueError, match="LDMOLE_CPU_PRODUCTS=onednn, but this PyTorch has no oneDNN: unset it"):
            products_for(x)
        monkeypatch.delenv(SWITCH)
        assert products_for(x) is TORCH, "its own choice takes what there is"


def test_an_operator_that_is_gone_or_means_something_else(monkeypatch):
    def gone(a, b):
        raise AttributeError("no such operator")

    for mm in (gone, lambda a, b: (a @ b) + 1):
        monkeypatch.setattr(matrix_products, "ONEDNN", ONEDNN._replace(mm=mm))
        assert not matrix_products.is_here()


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_layer(bias, always):
    layer = nn.Linear(5, 7, bias=bias).requires_grad_(False)
    x = torch.randn(2, 3, 5, requires_grad=True)
    y = frozen_linear(layer, x)
    assert not y._is_view()
    cotangent = torch.randn(1, 1, 7).expand(2, 3, 7)
    (grad,) = torch.autograd.grad(y, x, cotangent)
    assert always == ["linear", "mm"]
    torch.testing.assert_close(y, layer(x))
    torch.testing.assert_close(grad, cotangent @ layer.weight)
    # Differentiated twice, the second time through PyTorch's own product.
    (grad,) = torch.autograd.grad(frozen_linear(layer, x).square().sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(twice, 2 * (layer.weight.sum(1) @ layer.weight).expand_as(x))


@needs_onednn
def test_a_layer_that_trains_or_has_hooks_is_called():
    x, called = torch.randn(3, 5), []
    trains = nn.Linear(5, 7)
    frozen_linear(trains, x).sum().backward()
    assert trains.weight.grad is not None
    hooked = nn.Linear(5, 7).requires_grad_(False)
    hooked.register_forward_hook(lambda *_: called.append(1))
    frozen_linear(hooked, x)
    assert called

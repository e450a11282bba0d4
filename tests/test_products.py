"""Products of the kernels by oneDNN equal torch's own, wherever they may be used."""

from __future__ import annotations

import pytest
import torch
from test_kernels import adapted, assert_equal, batch, run
from torch.utils.flop_counter import FlopCounterMode

from peft.kernels import plain, products


@pytest.fixture
def onednn(monkeypatch):
    """Products of any size by oneDNN, whoever made the processor."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "_BY_OTHER_MAKER", True)
    monkeypatch.setattr(products, "LARGE", 0)


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)], ids=str)
def test_products_equal_those_of_torch(onednn, transposed):
    n, k, m = 33, 20, 7
    a, b = (torch.randn(*shape[:: -1 if t else 1]) for shape, t in zip(((n, k), (k, m)), transposed))
    a, b = (x.t() if t else x for x, t in zip((a, b), transposed))
    y, bias = torch.randn(n, m), torch.randn(m)
    with torch.no_grad():
        torch.testing.assert_close(products.product(a, b, 3.0), 3 * (a @ b))
        torch.testing.assert_close(products.product(a, b, bias=bias), a @ b + bias)
        torch.testing.assert_close(products.plus_product(y.clone(), a, b), y + a @ b)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_values_and_gradients_equal_the_plain_path(onednn, options):
    model, x = adapted(**options), batch(2, 3)
    with plain():
        wanted = run(model, x)
    assert_equal(run(model, x), wanted)


def test_second_derivatives_are_those_of_torch(onednn, monkeypatch):
    model, x = adapted(), batch(4).requires_grad_()
    for p in model.parameters():
        p.requires_grad_(True)
    found = []
    for _ in range(2):
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
        monkeypatch.setattr(products, "LARGE", 2**40)
    torch.testing.assert_close(*found)


def test_operations_are_counted_as_torchs_own(onednn, monkeypatch):
    model, x, found = adapted(), batch(4), []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            run(model, x)
        found.append(counter.get_total_flops())
        monkeypatch.setattr(products, "LARGE", 2**40)
    assert found[0] == found[1]


def test_torchs_switch_leaves_products_to_torch(onednn, monkeypatch):
    def fail(*_):
        raise AssertionError("called")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", fail)
    model, x = adapted(), batch(4)
    with monkeypatch.context() as switched:
        switched.setattr(torch.backends.mkldnn, "enabled", False)
        run(model, x)
    with pytest.raises(AssertionError, match="called"):
        run(model, x)

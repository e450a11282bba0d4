"""What methods make again in the backward pass instead of keeping it: the same values and gradients, fewer bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from peft.kernels import plain
from peft.kernels.made_again import made_again
from peft.kernels.remake import recomputed


def draw(*shape: int, trains: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=trains)


def scaled(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (rows.exp()[:, None] * table).mul_(2)


@pytest.mark.parametrize("twice", [False, True], ids=["last", "below"])
def test_what_is_made_again_has_its_gradients(twice: bool) -> None:
    """Also where another operation changes what is made in place, and for a second derivative."""
    torch.manual_seed(0)
    rows, table, x = draw(3), draw(3, 4, trains=False), draw(2, 4)

    def product(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with recomputed():
            matrix = made_again(scaled, rows, table)
            return x @ (matrix * 3 if twice else matrix).T

    torch.testing.assert_close(product(rows, x), x @ scaled(rows, table).T * (3 if twice else 1))
    torch.autograd.gradcheck(product, (rows, x))
    torch.autograd.gradgradcheck(product, (rows, x))


def kept_by(action) -> list[torch.Size]:
    """Shapes of the tensors that autograd keeps of a call."""
    shapes = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        action()
    return shapes


def test_what_is_made_again_is_not_kept() -> None:
    rows, table, x = draw(3), draw(3, 4, trains=False), draw(2, 4)

    def product() -> torch.Tensor:
        with recomputed():
            return x @ made_again(scaled, rows, table).T

    assert sorted(kept_by(product)) == [(2, 4), (3,), (3, 4)]  # x, and what the matrix is made of
    with plain():
        assert len(kept_by(product)) > 3


def test_what_is_made_again_tells_of_changes() -> None:
    rows, table, x = nn.Parameter(draw(3).detach()), draw(3, 4, trains=False), draw(2, 4)
    with recomputed():
        y = x @ made_again(scaled, rows, table).T
    with torch.no_grad():
        rows.add_(1)
    with pytest.raises(RuntimeError, match="modified by an in-?place operation"):
        y.sum().backward()

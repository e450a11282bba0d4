"""What methods make again in the backward pass instead of keeping it: the same values and gradients, fewer bytes."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from peft import BOFTConfig, IA3Config, PveraConfig, RoadConfig, VeraConfig, get_peft_model
from peft.kernels import channels, plain
from peft.kernels.channels import mixed_by_output
from peft.kernels.made_again import made_again
from peft.kernels.remake import recomputed
from peft.tuners import vera_kernels
from peft.tuners.road import road_rotated


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
            matrix = made_again(scaled, rows, table, entries=12)
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
            return x @ made_again(scaled, rows, table, entries=12).T

    assert sorted(kept_by(product)) == [(2, 4), (3,), (3, 4)]  # x, and what the matrix is made of
    with plain():
        assert len(kept_by(product)) > 3


def test_what_is_made_again_tells_of_changes() -> None:
    rows, table, x = nn.Parameter(draw(3).detach()), draw(3, 4, trains=False), draw(2, 4)
    with recomputed():
        y = x @ made_again(scaled, rows, table, entries=12).T
    with torch.no_grad():
        rows.add_(1)
    with pytest.raises(RuntimeError, match="modified by an in-?place operation"):
        y.sum().backward()


def gated(x: torch.Tensor) -> torch.Tensor:
    """What a graph can make again, as what norms and gates give."""
    return F.silu(x) * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)


@pytest.fixture
def no_output_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "LARGE", 0)


@pytest.mark.usefixtures("no_output_is_small")
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_scales_are_had_from_the_output(pairs: bool, lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, x, c, s = draw(8, 4, trains=False), draw(*lead, 4), draw(8), draw(8)
    with torch.no_grad():
        c.abs_().add_(1)

    def output(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        h, scales = gated(x), (c.view(2, 2, 2), s.view(2, 2, 2)) if pairs else (c,)
        mixed = mixed_by_output(F.linear(h, weight), h, lambda h: F.linear(h, weight), *scales)
        assert mixed is not None
        return mixed

    y = F.linear(gated(x), weight)
    torch.testing.assert_close(output(x, c, s), road_rotated(y, c, s, 2) if pairs else y * c)
    tested = (lambda x, c, s: output(x, c, s)) if pairs else (lambda x, c: output(x, c, s))
    inputs = (x, c, s) if pairs else (x, c)
    torch.autograd.gradcheck(tested, inputs)
    torch.autograd.gradgradcheck(tested, inputs)


class Block(nn.Module):
    """A norm's product, and a layer whose output is changed in place, or kept as it is."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.linear, self.inplace = nn.Linear(4, 8, bias=False), inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(gated(x))
        return F.relu_(y) if self.inplace else F.silu(y)


CONFIGS = {
    "ia3": IA3Config(target_modules=["linear"], feedforward_modules=[], init_ia3_weights=False),
    "road": RoadConfig(target_modules=["linear"], group_size=4, init_weights=False),
    "boft": BOFTConfig(target_modules=["linear"], boft_block_size=2, init_weights=False),
}


def gradients_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [*torch.autograd.grad(model(x).square().sum(), [x, *trained])]


@pytest.mark.usefixtures("no_output_is_small")
@pytest.mark.parametrize("inplace", [False, True], ids=["kept", "inplace"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("method", CONFIGS)
def test_layers_with_scales_equal_the_plain_path(method: str, zero: bool, inplace: bool) -> None:
    """Also where an activation changes the output in place, and where a scale is zero, by which nothing is divided."""
    torch.manual_seed(0)
    model, x = get_peft_model(Block(inplace), CONFIGS[method]), torch.randn(2, 3, 4, requires_grad=True)
    with torch.no_grad():
        if zero:
            next(p for name, p in model.named_parameters() if "ia3_l" in name or "alpha" in name or "_s" in name)[
                0
            ] = 0
    with plain():
        expected = gradients_of(model, x)
    for one, other in zip(gradients_of(model, x), expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if not zero and not inplace:
        with plain():
            before = len(kept_by(lambda: model(x)))
        assert len(kept_by(lambda: model(x))) < before


class Readers(nn.Module):
    """Three layers that read one input, and one that reads what they make; with a bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 4, bias=False), nn.Linear(6, 8, bias=False)
        self.o = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = gated(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        return self.o(q * v) * k.sum(-1, keepdim=True).tanh()


READING = {
    "vera": VeraConfig(r=3, target_modules=["q", "k", "v", "o"], init_weights=False),
    "pvera": PveraConfig(r=3, target_modules=["q", "k", "v", "o"], init_weights=False, generator_seed=0),
}


@pytest.mark.parametrize("method", READING)
def test_layers_that_share_a_projection_equal_the_plain_path(method: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Readers(), READING[method]).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    same = copy.deepcopy(model)  # its generators draw the same
    with plain():
        expected = gradients_of(same, x)
    for one, other in zip(gradients_of(model, x), expected):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(*second_derivatives(method))


def second_derivatives(method: str) -> list[torch.Tensor]:
    """Of the norm of the gradient, by the kernels and without."""
    found = []
    for context in (nullcontext, plain):
        torch.manual_seed(0)
        model = get_peft_model(Readers(), READING[method]).double()
        x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
        with context():
            (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            trained = [p for p in model.parameters() if p.requires_grad]
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(dx.square().sum(), [x, *trained])]))
    return found


def test_a_shared_projection_lives_no_longer_than_its_input() -> None:
    model = get_peft_model(Readers(), READING["vera"])
    before = len(vera_kernels._READ)
    loss = model(torch.randn(2, 3, 6, requires_grad=True)).sum()
    loss.backward()
    del loss
    assert len(vera_kernels._READ) == before

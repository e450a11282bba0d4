"""What makes modules and their first values faster than torch does: the same modules, the same numbers."""

import math

import pytest
import torch
from torch import nn

from peft.core.filling import blank, draw_like_linear, make_module


@pytest.mark.parametrize("make", [lambda: blank(nn.ModuleDict), lambda: blank(nn.ParameterDict)])
def test_a_blank_module_is_as_its_constructor_makes_it_and_shares_nothing(make):
    first, second = make(), make()
    expected = type(first)().__dict__
    assert {k: (type(v), v) for k, v in first.__dict__.items()} == {k: (type(v), v) for k, v in expected.items()}
    held = [key for key, value in expected.items() if isinstance(value, dict | set)]
    assert not [key for key in held if first.__dict__[key] is second.__dict__[key]]


def test_a_module_is_made_as_its_constructor_makes_it():
    module = nn.Module.__new__(nn.Module)
    make_module(module)
    expected = nn.Module().__dict__
    assert {k: (type(v), v) for k, v in module.__dict__.items()} == {k: (type(v), v) for k, v in expected.items()}


@pytest.mark.parametrize("shape", [(8, 576), (3, 7), (1, 1), (0, 4)])
def test_numbers_are_drawn_as_a_linear_layer_draws_them(shape):
    ours, theirs = torch.empty(shape), torch.empty(shape)
    torch.manual_seed(0)
    draw_like_linear(ours)
    torch.manual_seed(0)
    if theirs.numel():
        nn.init.kaiming_uniform_(theirs, a=math.sqrt(5))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

"""What LoRA starts from: tensors, rewritten base, output and gradient against the formulas, on each kind of layer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft import LoraConfig, get_peft_model, preprocess_loraga
from peft.core.base.kinds import kind_of
from peft.tuners.lora import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda


RECORDED = Path(__file__).parent / "starts"
R, ALPHA = 2, 6  # s = 3
S = ALPHA / R


class Around(nn.Module):
    """A layer of some kind under the name "layer", with an output that gradients can be taken of."""

    def __init__(self, layer, x):
        super().__init__()
        self.layer, self.x = layer, x

    def forward(self, x=None):
        y = self.layer(self.x if x is None else x)
        return y[0] if isinstance(y, tuple) else y


def layers():
    torch.manual_seed(0)
    x = torch.randn(5, 7, 8)
    moved = torch.randn(3, 4, 9)
    return {
        "linear": Around(nn.Linear(8, 6), x),
        "conv1d_of_gpt2": Around(Conv1D(6, 8), x),
        "conv1d": Around(nn.Conv1d(4, 6, 3, padding=1, stride=2), moved),
        "conv2d": Around(nn.Conv2d(4, 6, (3, 2), padding=1, dilation=2), moved[:, :, :, None].repeat(1, 1, 1, 8)),
        "conv3d": Around(nn.Conv3d(2, 6, 2, padding_mode="circular", padding=1), torch.randn(2, 2, 3, 4, 5)),
    }


def prepared(model, config):
    """Run what a start needs before."""
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, lambda: model())
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, lambda: model().square().mean().backward())


def config_for(init, **more):
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["layer"], "init_lora_weights": init}
    if init == "corda":
        options["corda_config"] = CordaConfig(corda_method=more.pop("method", "ipm"))
    if init == "lora_ga":
        options["lora_ga_config"] = LoraGAConfig(**more.pop("ga", {}))
    return LoraConfig(**options, **more)


def dense(layer):
    """The weight of a plain layer as a matrix ``[out, in * kernel]``, in float64."""
    return kind_of(layer).orient(layer.weight.detach(), layer).flatten(1).double()


def patches(layer, x):
    """The inputs of a layer as rows ``[n, in * kernel]``, one by one through a layer whose weight picks each entry."""
    kind = kind_of(layer)
    size = kind.shape(layer)[1:].numel() if hasattr(kind.shape(layer)[1:], "numel") else dense(layer).shape[1]
    found = []
    for i in range(size):
        probe = copy.deepcopy(layer)
        unit = torch.zeros_like(dense(layer)).float()
        unit[0, i] = 1
        shaped = unit.view(kind.shape(layer))
        probe.weight.data = kind.restore(shaped, layer).contiguous()
        y = probe(x) - (probe.bias[0] if probe.bias is not None else 0)
        found.append((y[..., 0] if len(kind.shape(layer)) == 2 else y[:, 0]).reshape(-1))
    return torch.stack(found, 1).double()


def product(init, plain, x):
    """B A by the formula of each start, an independent computation in float64."""
    w = dense(plain)
    if init == "pissa":
        u, s, vt = torch.linalg.svd(w)
        return u[:, :R] * s[:R] @ vt[:R] / S
    if init == "olora":
        q, upper = torch.linalg.qr(w)
        return q[:, :R] @ upper[:R]
    if init == "corda":
        rows = patches(plain, x)
        rows = rows / rows.abs().max()
        c = rows.T @ rows
        c = c + torch.eye(len(c)) * c.diagonal().mean() * 0.01
        u, s, vt = torch.linalg.svd(w @ c, full_matrices=False)
        return u[:, :R] * s[:R] @ vt[:R] @ torch.linalg.inv(c) / S
    model = Around(copy.deepcopy(plain).double(), x.double())
    model().square().mean().backward()
    g = kind_of(plain).orient(model.layer.weight.grad, plain).flatten(1)
    u, s, vt = torch.linalg.svd(g)
    return None, u, s, vt


REWRITING = ["pissa", "olora", "corda", "lora_ga"]


@pytest.mark.parametrize("init", REWRITING)
@pytest.mark.parametrize("kind", list(layers()))
def test_start_is_its_formula_on_each_kind(kind, init):
    model = layers()[kind]
    plain, x = copy.deepcopy(model.layer), model.x
    y = model().detach()
    config = config_for(init)
    prepared(model, config)
    peft_model = get_peft_model(model, config)
    layer = peft_model.base_model.model.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    made = b.flatten(1).double() @ a.flatten(1).double()
    if init == "lora_ga":
        _, u, s, vt = product(init, plain, x)
        scale = len(u) ** 0.25 / 4
        torch.testing.assert_close(a.flatten(1).double().abs(), vt[:R].abs(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(
            b.flatten(1).double().abs(), (u[:, R : 2 * R] * s[R : 2 * R] * scale).abs(), atol=1e-4, rtol=1e-3
        )
    else:
        torch.testing.assert_close(made, product(init, plain, x), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(dense(layer.get_base_layer()), dense(plain) - S * made, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(peft_model(), y, atol=1e-5, rtol=1e-5)
    weight = dense(plain).float().requires_grad_()  # the gradients of A and B follow from that of the whole weight
    probe = Around(copy.deepcopy(plain), x)
    shaped = kind_of(plain).restore(weight.view(kind_of(plain).shape(plain)), plain)
    torch.func.functional_call(probe, {"layer.weight": shaped}).square().sum().backward()
    peft_model().square().sum().backward()
    torch.testing.assert_close(a.grad.flatten(1), S * b.detach().flatten(1).T @ weight.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(b.grad.flatten(1), S * weight.grad @ a.detach().flatten(1).T, atol=1e-3, rtol=1e-3)
    peft_model.zero_grad()
    back = peft_model.unload().layer
    assert torch.equal(back.weight, plain.weight) and torch.equal(back.bias, plain.bias)

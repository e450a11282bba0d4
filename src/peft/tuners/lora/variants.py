"""Variants of LoRA: each overrides, for its adapter, the same hooks that a layer has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from peft.core.filling import skip_values
from peft.kernels import adapted_norm, dora_linear, is_hooked
from peft.tuners.lora.initialize import is_drawn


if TYPE_CHECKING:
    from peft.tuners.lora.config import LoraConfig
    from peft.tuners.lora.layer import LoraLayer


class LoraVariant:
    """Base of the variants. ``reversible``: taking dW away again undoes :meth:`fold`."""

    reversible = True

    def init(self, layer: LoraLayer, name: str, config: LoraConfig) -> None:
        """Allocate what the variant needs beside A and B."""

    def transform_output(
        self, layer: LoraLayer, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor
    ) -> torch.Tensor:
        return y + layer.delta(name, x)

    def fused(self, layer: LoraLayer, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """The layer's whole output from one kernel, or None where there is none for this call."""
        return None

    def fold(self, layer: LoraLayer, name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return weight + layer.delta_weight(name).to(weight.dtype)


class Magnitude(nn.Module):
    """DoRA's trained magnitudes ``[out]`` (convolutions: ``[1, out, 1, ...]``)."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class DoraLinearVariant(LoraVariant):
    """DoRA: W' = g (W + dW), g = m / |W + dW| by rows, with the norm constant for the gradient (arXiv 2402.09353).

    y' = y + (g - 1) W drop(x) + g dW drop(x).
    """

    reversible = False

    def init(self, layer: LoraLayer, name: str, config: LoraConfig) -> None:
        with torch.no_grad():
            if layer.pair(name)[0].is_meta or (is_drawn(config) and skip_values()):
                norm = torch.empty(layer.shape[0])  # a file will bring it
            else:
                norm = self._norm(layer, name, layer.unmerged_weight())
        shaped = norm if len(layer.shape) == 2 else norm.view(1, -1, *[1] * (len(layer.shape) - 2))
        layer.put(name, lora_magnitude_vector=Magnitude(shaped))

    def _norm(self, layer: LoraLayer, name: str, base: torch.Tensor) -> torch.Tensor:
        if layer.kind.matrix and name not in layer.tied_to:
            down, up = (t.detach() for t in layer.pair(name))
            return adapted_norm(base.detach(), down, up, layer.scaling[name])
        delta = layer.delta_weight(name).detach()
        return (base.to(delta) + delta).flatten(1).norm(dim=1)

    def fused(self, layer: LoraLayer, name: str, x: torch.Tensor) -> torch.Tensor | None:
        weight, factors = layer.weight_for_kernels(x), layer.bare_factors(name)
        if weight is None or factors is None:
            return None
        magnitude = layer.lora_magnitude_vector[name]
        if is_hooked(magnitude) or type(magnitude.weight) is not nn.Parameter:
            return None
        return dora_linear(x, weight, layer.base_layer.bias, factors, magnitude.weight)

    def _factor(self, layer: LoraLayer, name: str, base: torch.Tensor) -> torch.Tensor:
        """g, ``[out]``."""
        return layer.lora_magnitude_vector[name].weight.flatten() / self._norm(layer, name, base)

    def transform_output(
        self, layer: LoraLayer, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor
    ) -> torch.Tensor:
        module, dropout, base = layer.get_base_layer(), layer.lora_dropout[name], layer.unmerged_weight()
        g = layer.kind.along_channels(self._factor(layer, name, base), module)
        dropped = layer.training and isinstance(dropout, nn.Dropout) and not layer.kind.lookup
        if dropped:
            x = dropout(x)
        if dropped or layer.merged or module is not layer.base_layer:
            inner = layer.multiplied(x, lambda: self._base_weight(layer, x))
        else:
            bias = layer.get_base_bias()
            inner = base_y if bias is None else base_y - layer.kind.along_channels(bias, module)
        if dropped:
            delta = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
        else:
            delta = layer.delta(name, x)
        return y + (g * (inner + delta) - inner)  # one product with g, which keeps one tensor for the gradient of m

    def _base_weight(self, layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
        base = layer.unmerged_weight()
        return base.to(x.dtype) if x.is_floating_point() else base

    def fold(self, layer: LoraLayer, name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        g = self._factor(layer, name, base).view(-1, *[1] * (base.dim() - 1))
        return weight + (g * (base + layer.delta_weight(name)) - base).to(weight.dtype)


class TiedPair(LoraVariant):
    """The head that shares its weight with an adapted embedding: the same update, transposed.

    dW = (B A)^T, so the head's A is the embedding's B^T and the other way round; the head holds no tensors.
    """

    def pair(self, layer: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = layer.tied_to[name].pair(name)
        return b.T, a.T

    def transform_output(
        self, layer: LoraLayer, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor
    ) -> torch.Tensor:
        a, b = self.pair(layer, name)
        return y + layer.lora_dropout[name](x).to(a.dtype) @ a.T @ b.T * layer.scaling[name]


def resolve_variant(config: LoraConfig) -> LoraVariant | None:
    """The variant that a config asks for, or None for plain LoRA."""
    return DoraLinearVariant() if config.use_dora else None

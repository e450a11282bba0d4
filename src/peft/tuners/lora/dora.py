"""DoRA: W' = g (W + dW), g = m / |W + dW| by rows, with the norm constant for the gradient (arXiv 2402.09353)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft._lazy import also_known
from peft.compat.magnitude import DoraConv1dLayer as DoraConv1dLayer
from peft.compat.magnitude import DoraConv2dLayer as DoraConv2dLayer
from peft.compat.magnitude import DoraConv3dLayer as DoraConv3dLayer
from peft.compat.magnitude import DoraEmbeddingLayer as DoraEmbeddingLayer
from peft.compat.magnitude import DoraLinearLayer as DoraLinearLayer
from peft.compat.magnitude import _DoraConvNdLayer as _DoraConvNdLayer
from peft.compat.magnitude import magnitudes
from peft.core.families import kernel_weight
from peft.core.families.delta import floating
from peft.core.filling import skip_values
from peft.core.layer.weight import base_bias, layer_inside
from peft.kernels import adapted_norm, dora_linear, is_hooked
from peft.kernels.dora import summed_norm
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.initialize import is_drawn
from peft.tuners.lora.layer import Lora
from peft.tuners.lora.norm_cache import DoraCaching, remembered


class Dora(Lora):
    """y' = y + (g - 1) W drop(x) + g dW drop(x), ``lora_magnitude_vector`` is m."""

    option = "use_dora"
    reversible = False
    ties = False
    needs_dense_pair = "DoRA needs the norm of the adapted weight"

    def make_pair(self, config: LoraConfig) -> None:
        super().make_pair(config)
        with torch.no_grad():
            norm = torch.empty(self.shape[0])  # a file will bring it
            if not ((is_drawn(config) and skip_values()) or next(self.parameters()).is_meta):
                base = self.base_weight()  # without values where another process has them, and will send them
                norm = norm.to("meta") if base.is_meta else self.norm(base)
        self.lora_magnitude_vector = magnitudes(norm, self.kind.lookup, len(self.shape) - 2)

    def norm(self, base: torch.Tensor) -> torch.Tensor:
        """``|W + dW|`` of each row, ``[out]``; kept between calls within :class:`DoraCaching`."""
        holder, weight = self.lora_magnitude_vector, self.base._parameters.get(self.kind.weight)
        if holder is None or weight is None or not DoraCaching.active:
            return self._norm(base)
        return remembered(holder, (weight, *self.pair()), self.scaling, lambda: self._norm(base))

    def _norm(self, base: torch.Tensor) -> torch.Tensor:
        if self.kind.matrix:
            down, up = (t.detach() for t in self.pair())
            return adapted_norm(base.detach(), down, up, self.scaling)
        delta = self.delta_weight().detach()
        return summed_norm(base.to(delta), delta)

    def factor(self, base: torch.Tensor) -> torch.Tensor:
        """g, ``[out]``."""
        return self.lora_magnitude_vector.weight.flatten() / self.norm(base)

    @classmethod
    def kernel(cls, layer: Any, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        if cls.output is not Dora.output or len(adapters) > 1 or (DoraCaching.active and not layer.training):
            return None
        (adapter,) = adapters
        if layer.training and adapter.random_in_training:
            return None  # the norm is that of the pair that is held, not of one that this forward draws
        weight, factors = kernel_weight(layer, x), adapter.product()
        if weight is None or factors is None:
            return None
        magnitude = adapter.lora_magnitude_vector
        if is_hooked(magnitude) or type(magnitude.weight) is not nn.Parameter:
            return None
        return dora_linear(x, weight, layer.base_layer.bias, factors, magnitude.weight)

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        layer, base = self.layer, self.base_weight()
        g = self.along_channels(self.factor(base))
        dropped = self.drops() and not self.kind.lookup
        if dropped:
            x = self.lora_dropout(x)
        if dropped or layer.merged or layer_inside(layer) is not None:  # base_y is then no W x of this x
            dtype = floating(x)  # not within the function, which may be held and would hold x
            inner = self.multiplied(x, lambda: self.base_weight().to(dtype=dtype))
        else:
            bias = base_bias(layer)
            inner = base_y if bias is None else base_y - self.along_channels(bias)
        delta = self.update(x) if dropped else self.delta(x)
        if self.lora_bias:  # as the base's, it is no part of the weight that m and its norm are about
            shift = self.along_channels(self._bias_delta())
            y, delta = y + shift, delta - shift
        return y + (g * (inner + delta) - inner)  # one product with g, which keeps one tensor for the gradient of m

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        g = self.factor(base).view(-1, *[1] * (base.dim() - 1))  # [out, 1, *1]
        return weight + (g * (base + self.delta_weight()) - base).to(weight.dtype)

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        return weight  # the original is kept


also_known(__name__)

"""DoRA's magnitudes at one layer, by the classes that the ecosystem knows: ``lora_magnitude_vector["default"]``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft.core.base.kinds import kind_of
from peft.kernels.dora import summed_norm
from peft.utils import integrations


class DoraLinearLayer(nn.Module):
    """DoRA's trained magnitudes ``weight``, ``[out]`` (convolutions: ``[1, out, 1, ...]``).

    Layers of third parties that make one themselves fill it by :meth:`update_layer` and call it; the layers of this
    package hold the weight here and compute by their adapter. Their copies of a forward, and checks of a norm, were
    seen to call each of the methods.
    """

    def __init__(self, fan_in_fan_out: bool = False, weight: torch.Tensor | None = None) -> None:
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out
        if weight is not None:
            self.weight = nn.Parameter(weight)

    def get_lora_weight(self, lora_A: torch.Tensor, lora_B: torch.Tensor, adapter_name: str | None = None) -> Any:
        """B A ``[out, in, *kernel]`` of the weights of a pair."""
        return (lora_B.flatten(1) @ lora_A.flatten(1)).view(len(lora_B), *lora_A.shape[1:])

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        """``|W + s B A|`` of each row, shaped as ``weight`` of this module is; W as its layer stores it."""
        change = scaling * lora_weight
        norm = summed_norm(weight.T if self.fan_in_fan_out else weight, change).to(weight.dtype)
        return norm if weight.dim() == 2 else norm.view(1, -1, *[1] * (weight.dim() - 2))

    def update_layer(
        self, *, base_layer: nn.Module, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float, **kwargs: Any
    ) -> None:
        """Start from the norms of a layer with a pair in it, so that nothing changes."""
        weight = self._dense(base_layer)
        with torch.no_grad():
            norm = self.get_weight_norm(weight, self.get_lora_weight(lora_A, lora_B).to(weight), scaling)
        self.weight = nn.Parameter(norm)

    def forward(
        self,
        x: torch.Tensor,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        base_layer: Any,
        base_result: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """What DoRA adds to the base layer's output: ``(g - 1) W x + g s B A x``, with g = m / |W + s B A|.

        Args:
            lora_A, lora_B: the modules of the pair. base_result: W x + b, if it is known.
        """
        g = self.weight / self._norm(base_layer, lora_A.weight, lora_B.weight, scaling)
        inner = base_layer(x) if base_result is None else base_result
        if (bias := getattr(base_layer, "bias", None)) is not None:
            inner = inner - bias.view(-1, *[1] * (g.dim() - 2))
        return (g - 1) * inner + g * lora_B(lora_A(x)) * scaling

    def _norm(self, base_layer: nn.Module, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """The norms, constant for the gradient (section 4.3 of the paper)."""
        weight = self._dense(base_layer)
        return self.get_weight_norm(weight, self.get_lora_weight(a, b).detach().to(weight), scaling).detach()

    @staticmethod
    def _dense(base_layer: nn.Module) -> torch.Tensor:
        kind: Any = kind_of(base_layer)
        weight = integrations.dequantize_module_weight(base_layer)  # of that module: others replace it there
        return weight.T if kind is not None and kind.lookup else weight

    def __repr__(self) -> str:
        return f"lora.dora.{type(self).__name__}()"


class DoraEmbeddingLayer(DoraLinearLayer):
    """The same of an embedding, ``[dimensions]``: A and B are tensors, A ``[r, tokens]``."""

    def forward(self, x: torch.Tensor, *, lora_A, lora_B, scaling, base_layer, embed_fn, **kwargs):  # type: ignore[override,no-untyped-def]
        """g, and what is added to g times the base layer's output: ``g s A[x] B``.

        Args:
            lora_A, lora_B: the pair transposed, ``[tokens, r]`` and ``[r, dimensions]``. embed_fn: looks up tokens
                in a table.
        """
        g = self.weight / self._norm(base_layer, lora_A.T, lora_B.T, scaling)
        return g, g * (embed_fn(x, lora_A) @ lora_B) * scaling


class _DoraConvNdLayer(DoraLinearLayer):
    """The same of a convolution."""


class DoraConv1dLayer(_DoraConvNdLayer):
    """The same of a convolution over one axis."""


class DoraConv2dLayer(_DoraConvNdLayer):
    """The same of a convolution over two axes."""


class DoraConv3dLayer(_DoraConvNdLayer):
    """The same of a convolution over three axes."""


def magnitudes(norm: torch.Tensor, lookup: bool, axes: int) -> DoraLinearLayer:
    """What holds the magnitudes of a layer, ``norm`` ``[out]``; ``axes``: of its kernel, 0 if it has none."""
    if not axes:
        return (DoraEmbeddingLayer if lookup else DoraLinearLayer)(weight=norm)
    cls: Any = (DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer)[axes - 1]
    return cls(weight=norm.view(1, -1, *[1] * axes))  # as files of convolutions have it

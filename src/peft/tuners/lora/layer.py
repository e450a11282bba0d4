"""LoRA: dW = s B A (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import resolve_pattern
from peft.core.base.kinds import Kind
from peft.core.base.storage import storage_of
from peft.core.families.families import ScaledLayer, input_dropout
from peft.core.filling import skip_values
from peft.kernels import Factors, active_rate, is_bare_linear
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.initialize import initialize, is_drawn
from peft.tuners.lora.pairs import without_padding
from peft.tuners.lora.variants import LoraVariant, TiedPair, resolve_variant


class LoraLayer(ScaledLayer):
    """y' = y + s B A drop(x), A ``[r, in]`` and B ``[out, r]``, s = lora_alpha / r (or / sqrt r).

    On convolutions A is a convolution with the base layer's geometry and B one of size 1. On embeddings A is a table
    ``[r, tokens]``. A variant (DoRA, ...) overrides the hooks of its adapter.
    """

    weights: ClassVar[dict[str, type]] = {
        "lora_A": nn.ModuleDict,
        "lora_B": nn.ModuleDict,
        "lora_embedding_A": nn.ParameterDict,
        "lora_embedding_B": nn.ParameterDict,
        "lora_magnitude_vector": nn.ModuleDict,
    }
    settings: ClassVar[dict[str, type]] = {
        "r": dict,
        "lora_alpha": dict,
        "scaling": dict,
        "lora_dropout": nn.ModuleDict,
        "use_rslora": dict,
        "use_dora": dict,
        "lora_bias": dict,
        "lora_variant": dict,
    }
    bare: ClassVar[tuple[str, ...]] = ("lora_magnitude_vector",)

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        if config.lora_bias and (kind.lookup or kind.bias is None):
            return "lora_bias has no place on a layer without bias"
        if config.init_lora_weights == "loftq":
            if kind.name != "Linear":
                return "init_lora_weights='loftq' quantises linear layers only"
            if (storage := storage_of(module, kind.weight)).name is not None:
                return (
                    f"init_lora_weights='loftq' starts from a dense weight, and {storage.name} keeps this one; "
                    "use the default initialisation and then peft.replace_lora_weights_loftq"
                )
        if config.use_dora and (reason := kind.no_dense_pair(module)):
            return f"DoRA needs the norm of the adapted weight, but {reason}"
        return None

    def update_layer(self, name: str, config: LoraConfig, key: str) -> None:
        r = resolve_pattern(config.rank_pattern, key, config.r)
        alpha = resolve_pattern(config.alpha_pattern, key, config.lora_alpha)
        dropout = input_dropout(config.lora_dropout)
        self.put(name, r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=config.use_rslora)
        self.put(name, use_dora=config.use_dora, lora_bias=config.lora_bias, scaling=self.initial_scaling(name))
        if name in self.tied_to:
            self.put(name, lora_variant=TiedPair())
            return
        self.allocate(name, r, config.lora_bias)
        if not (is_drawn(config) and skip_values()):
            initialize(self, name, config)
        if (variant := resolve_variant(config)) is not None:
            self.put(name, lora_variant=variant)
            variant.init(self, name, config)

    def allocate(self, name: str, r: int, bias: bool = False) -> None:
        """Make a pair of rank r, with the shapes of the file format and no values yet."""
        if self.kind.lookup:
            out, tokens = self.shape
            a, b = nn.Parameter(torch.empty(r, tokens)), nn.Parameter(torch.empty(out, r))
            self.put(name, lora_embedding_A=a, lora_embedding_B=b)
        else:
            down, up = self.kind.factor(self.get_base_layer(), r, bias)
            self.put(name, lora_A=down, lora_B=up)

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors A and B of an adapter."""
        if self.kind.lookup:
            return self.lora_embedding_A[name], self.lora_embedding_B[name]
        return self.lora_A[name].weight, self.lora_B[name].weight

    # --- the mathematics --------------------------------------------------------------------------------------
    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.kind.lookup:
            a, b = self.pair(name)
            return self.kind.apply(self.get_base_layer(), x, a) @ b.T * self.scaling[name]
        return self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x))) * self.scaling[name]

    def factors(self, name: str) -> Factors | None:
        return None if name in self.lora_variant else self.bare_factors(name)

    def bare_factors(self, name: str) -> Factors | None:
        """The pair without what a variant makes of it, or None where calling its parts does more than multiply."""
        modules = self._modules
        down, up = (modules[part]._modules.get(name) for part in ("lora_A", "lora_B"))
        if not (is_bare_linear(down) and is_bare_linear(up)):
            return None
        dropout = modules["lora_dropout"]._modules[name]
        rate = active_rate(dropout)
        if rate is None or up._parameters["bias"] is not None:
            return None
        return Factors(down._parameters["weight"], up._parameters["weight"], self.scaling[name], rate)

    def fused(self, names: list[str], x: torch.Tensor) -> torch.Tensor | None:
        variant = self.lora_variant.get(names[0]) if len(names) == 1 else None
        return None if variant is None else variant.fused(self, names[0], x)

    def delta_weight(self, name: str) -> torch.Tensor:
        a, b = self.pair(name) if name not in self.tied_to else self.lora_variant[name].pair(self, name)
        return self.kind.compose(self.get_base_layer(), a, b) * self.scaling[name]

    def transform_output(self, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        variant = self.lora_variant.get(name)
        if variant is None:
            return y + self.delta(name, x)
        return variant.transform_output(self, name, x, y, base_y)

    def fold(self, name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        variant = self.lora_variant.get(name)
        return self._with_pair(name, weight, 1) if variant is None else variant.fold(self, name, weight, base)

    def unfold(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return super().unfold(name, weight) if name in self.lora_variant else self._with_pair(name, weight, -1)

    def _with_pair(self, name: str, weight: torch.Tensor, sign: int) -> torch.Tensor:
        """W + sign * s B A; of a linear layer without a matrix for B A."""
        a, b = self.pair(name)
        if self.kind.matrix and a.dtype == b.dtype == weight.dtype:
            return torch.addmm(weight, b, a, alpha=sign * self.scaling[name])
        return weight + sign * self.delta_weight(name).to(weight.dtype)

    def keeps_base(self, name: str) -> bool:
        variant = self.lora_variant.get(name)
        return variant is not None and not variant.reversible

    def fold_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        return bias if not self.lora_bias[name] else self._bias_delta(name) + (0 if bias is None else bias)

    def unfold_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        return bias if not self.lora_bias[name] or bias is None else bias - self._bias_delta(name)

    def _bias_delta(self, name: str) -> torch.Tensor:
        return self.lora_B[name].bias * self.scaling[name]

    def unmergeable(self, name: str) -> str | None:
        return self.kind.no_dense_pair(self.get_base_layer())

    # --- scale ------------------------------------------------------------------------------------------------
    def initial_scaling(self, name: str) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        r = self.r[name]
        return self.lora_alpha[name] / (math.sqrt(r) if self.use_rslora[name] else r)

    # --- files ------------------------------------------------------------------------------------------------
    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        if name not in self.tied_to:
            yield from super().adapter_state(name)
        elif name in self:
            a, b = self.lora_variant[name].pair(self, name)
            yield "lora_A.weight", "", a
            yield "lora_B.weight", "", b

    def as_saved(self, name: str, saved: str, tensor: torch.Tensor) -> torch.Tensor:
        return without_padding(self, name, saved, tensor)

    def upgrade(self, name: str, written_by: str) -> None:
        """Files before 1.0 mean the update of an attention's out_proj twice."""
        if self.kind.read_by_parent and written_by.startswith("0."):
            self.lora_B[name].weight.data.mul_(2)

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """The variant that a config asks for, or None for plain LoRA."""
        return resolve_variant(config)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Draw A and B of an adapter anew."""
        initialize(self, adapter_name, LoraConfig(init_lora_weights=init_lora_weights, r=self.r[adapter_name]))

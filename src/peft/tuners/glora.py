"""GLoRA: W' = W + W * A + B and b' = b + b * D + E + W C (arXiv 2306.07967)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from peft.config import ModulesToSave, TargetModules, TrainedBias, option
from peft.core.adapter import part, setting
from peft.core.addition import LinearIn
from peft.core.base.kinds import Kind, fan
from peft.core.families import Fold
from peft.core.filling import draw_like_linear
from peft.core.layer.weight import base_bias
from peft.core.model.registry import define_tuner
from peft.errors import ConfigError
from peft.kernels.remake import remade
from peft.peft_types import PeftType


@dataclass
class GloraConfig(TargetModules, TrainedBias, ModulesToSave):
    """Config of GLoRA: five trained terms that scale and shift the weight and the bias.

    The general form of which LoRA, scales, shifts and prompts are cases: for searching which of them a task wants.
    Merged, it costs nothing, and the layer keeps its shape.
    """

    METHOD: ClassVar[PeftType] = PeftType.GLORA
    OWN_BIAS: ClassVar[str] = "glora_only"

    r: int = option(8, "Rank of the terms that are products of two matrices.", minimum=1)
    config_A_B: Literal["lora", "vector", "constant", "none"] = option(
        "lora",
        "Form of A and B: a low-rank product, one number for each output, one number, or not there.",
        choices=("lora", "vector", "constant", "none"),
    )
    config_C: Literal["lora", "vector", "none"] = option(
        "lora",
        "Form of C: a low-rank product, one number for each input, or not there. Only for layers with a bias.",
        choices=("lora", "vector", "none"),
    )
    config_D_E: Literal["vector", "constant", "none"] = option(
        "constant",
        "Form of D and E: one number for each output, one number, or not there. Only for layers with a bias.",
        choices=("vector", "constant", "none"),
    )
    init_weights: bool = option(True, "Start with all terms 0, so that nothing changes; otherwise at random numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config_A_B == self.config_C == self.config_D_E == "none":
            raise ConfigError(
                "GloraConfig: config_A_B, config_C and config_D_E are all 'none', so nothing is trained."
            )


class GloraTerm(nn.Module):
    """One of the five terms: ``Xd Xu``, ``X``, or nothing, which files hold as ``zeros``.

    Args:
        form: "lora", "vector", "constant" or "none".
        shape: of the dense term; rank: of the product; init: start at zero.
    """

    def __init__(self, form: str, shape: tuple[int, ...], rank: int, init: bool) -> None:
        super().__init__()
        self.shape = shape
        if form == "none":
            self.register_buffer("zeros", torch.zeros(()))
        elif form == "lora":
            self.Xd = nn.Parameter(torch.zeros(shape[0], rank))
            self.Xu = nn.Parameter(torch.empty(rank, shape[1]))
            for part in (self.Xu,) if init else (self.Xu, self.Xd):
                draw_like_linear(part)
        else:
            size = (1,) if form == "constant" else (shape[0], *[1] * (len(shape) - 1))
            self.X = nn.Parameter(torch.zeros(size))
            if not init:
                if form == "constant":
                    nn.init.normal_(self.X, std=0.02)
                else:
                    draw_like_linear(self.X.data.view(1, -1) if len(size) == 1 else self.X)

    def forward(self, like: torch.Tensor) -> torch.Tensor | None:
        """The term, of a shape that broadcasts to the dense one, or None."""
        if "zeros" in self._buffers:
            return None
        return (self.Xd @ self.Xu if hasattr(self, "Xd") else self.X).to(like.dtype)


def glora_weight(weight: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
    """W' = W + W * A + B, ``[out, in * kernel]``, of terms that broadcast to it or are not there."""
    folded = weight if a is None else torch.addcmul(weight, weight, a)
    return folded if b is None else folded + b


def glora_shift(
    bias: torch.Tensor, wc: torch.Tensor | None, d: torch.Tensor | None, e: torch.Tensor | None
) -> torch.Tensor | None:
    """b' - b = b * D + E + W C, ``[out]``, of terms that broadcast to it or are not there."""
    given = [term for term in (None if d is None else bias * d, e, wc) if term is not None]
    return sum(given[1:], given[0]) if given else None


class Glora(Fold):
    """A and B are ``[out, in * kernel]``, C ``[in * kernel, 1]``, D and E ``[out]``; without a bias only A and B."""

    glora_A, glora_B, glora_C = part(nn.ModuleDict), part(nn.ModuleDict), part(nn.ModuleDict)
    glora_D, glora_E = part(nn.ModuleDict), part(nn.ModuleDict)
    r = setting()
    # A term that is "none" is one zero here, and a whole matrix of zeros in files: as_saved and as_loaded turn it.
    split: ClassVar[tuple[str, ...]] = ("",)
    adds = LinearIn(*(f"glora_{term}.{tensor}" for term in "ABCDE" for tensor in ("X", "Xu")))

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: GloraConfig) -> str | None:
        if config.config_A_B == "none" and (kind.bias is None or getattr(module, kind.bias, None) is None):
            return "it has no bias, and with config_A_B='none' only terms of the bias are trained"
        return None

    def create(self, config: GloraConfig, key: str) -> None:
        out, inner = fan(self.shape)
        biased = base_bias(self.layer) is not None
        of_weight, c = config.config_A_B, config.config_C if biased else "none"
        of_bias, rest = config.config_D_E if biased else "none", (config.r, config.init_weights)
        self.r = config.r
        self.glora_A, self.glora_B = (GloraTerm(of_weight, (out, inner), *rest) for _ in "AB")
        self.glora_C = GloraTerm(c, (inner, 1), *rest)
        self.glora_D, self.glora_E = (GloraTerm(of_bias, (out,), *rest) for _ in "DE")

    def folded(self, base: torch.Tensor) -> torch.Tensor:
        return glora_weight(base.flatten(1), self.glora_A(base), self.glora_B(base)).view_as(base)

    def shift(self) -> torch.Tensor | None:
        bias = self.base_bias()
        if bias is None:
            return None
        c: Any = self.glora_C(bias)
        if c is not None:
            c = remade(lambda c: self.base_weight().flatten(1).to(c.dtype) @ c, c)[:, 0]
        return glora_shift(bias, c, self.glora_D(bias), self.glora_E(bias))

    # --- files ------------------------------------------------------------------------------------------------
    def as_saved(self, saved: str, tensor: torch.Tensor) -> torch.Tensor:
        term, _, sub = saved.partition(".")
        return tensor.new_zeros(getattr(self, term).shape) if sub == "zeros" else tensor

    def as_loaded(self, saved: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Zeros of any shape are one number in memory."""
        (tensor,) = parts.values()
        return tensor.new_zeros(()) if saved.endswith(".zeros") else tensor


GloraModel = define_tuner(Glora, GloraConfig)

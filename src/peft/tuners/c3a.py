"""C3A: dW = a grid of circulant blocks, multiplied by fast Fourier transforms (arXiv 2407.19342)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import (
    LayerSelection,
    ModulesToSave,
    TargetModules,
    TrainedBias,
    check_pattern,
    option,
    resolve_pattern,
)
from peft.core.base.kinds import fan
from peft.core.families.families import DeltaLayer, padded
from peft.core.model.registry import define_tuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING
from peft.utils.error import ConfigError
from peft.utils.peft_types import PeftType


@dataclass
class C3AConfig(TargetModules, TrainedBias, ModulesToSave, LayerSelection):
    """Config of C3A: circulant blocks of size b hold ``in * out / b`` numbers, and the update can have full rank.

    Use it where few parameters shall reach a high rank; its learning rate is large, 0.1 to 0.3. The default start is
    random, so a fresh adapter changes the model's output: set init_weights=True to begin at the model as it is.
    """

    METHOD: ClassVar[PeftType] = PeftType.C3A
    OWN_BIAS: ClassVar[str] = "c3a_only"

    block_size: int = option(
        256,
        "Size b of the circulant blocks; larger is fewer parameters. Sizes that do not divide a layer's features pad "
        "them with zeros.",
        minimum=1,
    )
    block_size_pattern: dict | None = option(
        dict, "Block sizes of particular modules: a module name, an end of one, or a regular expression -> size."
    )
    init_weights: bool | str | None = option(
        "xavier_uniform",
        "How the blocks start: True is zeros, so that nothing changes; 'xavier_uniform' (also False), "
        "'kaiming_uniform' and 'gaussian' are random numbers, so that the fresh adapter is not the identity.",
        choices=(True, False, "gaussian", "kaiming_uniform", "xavier_uniform"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.block_size_pattern = check_pattern(self, "block_size_pattern")
        for key, size in self.block_size_pattern.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"C3AConfig: block_size_pattern[{key!r}]={size!r} must be a whole number above 0.")


class C3ALayer(DeltaLayer):
    """Block (m, n) of dW is ``K[m, n, (column - row) mod b] / in``, K ``[out / b, in / b, b]``."""

    weights: ClassVar[dict[str, type]] = {"c3a_kernel": nn.ParameterDict}
    settings: ClassVar[dict[str, type]] = {"block_size": dict}
    linear: ClassVar[tuple[str, ...]] = ("c3a_kernel",)

    def update_layer(self, name: str, config: C3AConfig, key: str) -> None:
        size, (rows, columns) = resolve_pattern(config.block_size_pattern, key, config.block_size), fan(self.shape)
        kernel = torch.zeros(-(-rows // size), -(-columns // size), size)
        if config.init_weights == "gaussian":
            nn.init.normal_(kernel)
        elif config.init_weights == "kaiming_uniform":
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
        elif config.init_weights is not True:
            nn.init.xavier_uniform_(kernel)
        self.put(name, block_size=size, c3a_kernel=nn.Parameter(kernel))

    def delta_weight(self, name: str) -> torch.Tensor:
        kernel, (rows, columns) = self.c3a_kernel[name], fan(self.shape)
        place = torch.arange(self.block_size[name], device=kernel.device)
        blocks = kernel[:, :, (place - place[:, None]) % len(place)]  # [m, n, row, column]
        weight = blocks.transpose(1, 2).flatten(2).flatten(0, 1)
        return (weight[:rows, :columns] / columns).view(self.shape)

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if not self.kind.matrix:
            return super().delta(name, x)
        kernel, size, (rows, columns) = self.c3a_kernel[name], self.block_size[name], fan(self.shape)
        dtype = torch.promote_types(kernel.dtype, torch.float32)  # there is no transform of 16 bits
        pieces = padded(x.to(dtype) / columns, kernel.shape[1] * size).reshape(-1, kernel.shape[1], size)
        spectrum = torch.fft.rfft(pieces).permute(2, 0, 1)  # [frequency, row of x, n]
        mixed = spectrum @ torch.fft.rfft(kernel.to(dtype)).conj().permute(2, 1, 0)  # [frequency, row of x, m]
        y = torch.fft.irfft(mixed.permute(1, 2, 0), n=size)
        return y.flatten(1)[:, :rows].to(x.dtype).unflatten(0, x.shape[:-1])


C3AModel = define_tuner(
    "C3AModel",
    C3ALayer,
    C3AConfig,
    prefix="c3a_",
    targets=TRANSFORMERS_MODELS_TO_C3A_TARGET_MODULES_MAPPING,
)

"""C3A: dW = a grid of circulant blocks, multiplied by fast Fourier transforms (arXiv 2407.19342)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.config import LayerSelection, ModulesToSave, TargetModules, TrainedBias, option, resolve_pattern
from peft.core.adapter import part, setting
from peft.core.addition import LinearIn
from peft.core.base.kinds import fan
from peft.core.families import Delta, padded
from peft.core.filling import draw_like_linear
from peft.core.model.registry import define_tuner
from peft.peft_types import PeftType


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
    block_size_pattern: dict[str, int] | None = option(
        dict,
        "Block sizes of particular modules: a module name, an end of one, or a regular expression -> size.",
        names=dict,
        minimum=1,
    )
    init_weights: bool | str | None = option(
        "xavier_uniform",
        "How the blocks start: True is zeros, so that nothing changes; 'xavier_uniform' (also False), "
        "'kaiming_uniform' and 'gaussian' are random numbers, so that the fresh adapter is not the identity.",
        choices=(True, False, "gaussian", "kaiming_uniform", "xavier_uniform"),
    )


def c3a_weight(kernel: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """dW, ``[out, in * kernel]``: block (m, n) is ``K[m, n, (column - row) mod b] / in``.

    Args:
        kernel: K ``[out / b, in / b, b]``, rounded up. shape: of dW.
    """
    (rows, columns), place = shape, torch.arange(kernel.shape[2], device=kernel.device)
    blocks = kernel[:, :, (place - place[:, None]) % len(place)]  # [m, n, row, column]
    weight = blocks.transpose(1, 2).flatten(2).flatten(0, 1)  # [m row, n column]
    return weight[:rows, :columns] / columns


def c3a_product(x: torch.Tensor, kernel: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The same dW by x ``[..., in]``, without dW: a circulant matrix is a product of spectra."""
    (rows, columns), size = shape, kernel.shape[2]
    if not x.numel():  # there is no transform of nothing
        return F.linear(x, c3a_weight(kernel, shape).to(x.dtype))
    dtype = torch.promote_types(kernel.dtype, torch.float32)  # there is no transform of 16 bits
    pieces = padded(x.to(dtype), kernel.shape[1] * size).reshape(-1, kernel.shape[1], size)
    spectrum = torch.fft.rfft(pieces).permute(2, 0, 1)  # [frequency, row of x, n]
    mixed = spectrum @ torch.fft.rfft(kernel.to(dtype) / columns).conj().permute(2, 1, 0)  # [frequency, row of x, m]
    y = torch.fft.irfft(mixed.permute(1, 2, 0), n=size)  # [row of x, m, b]
    return y.flatten(1)[:, :rows].to(x.dtype).reshape(*x.shape[:-1], rows)


class C3A(Delta):
    """dW is a grid of circulant blocks of size b, ``c3a_kernel`` is K ``[out / b, in / b, b]``."""

    c3a_kernel = part()
    block_size = setting()
    adds = LinearIn("c3a_kernel")

    def create(self, config: C3AConfig, key: str) -> None:
        size, (rows, columns) = resolve_pattern(config.block_size_pattern, key, config.block_size), fan(self.shape)
        kernel = torch.zeros(-(-rows // size), -(-columns // size), size)
        if config.init_weights == "gaussian":
            nn.init.normal_(kernel)
        elif config.init_weights == "kaiming_uniform":
            draw_like_linear(kernel)
        elif config.init_weights is not True:
            nn.init.xavier_uniform_(kernel)
        self.block_size, self.c3a_kernel = size, nn.Parameter(kernel)

    def delta_weight(self) -> torch.Tensor:
        return c3a_weight(self.c3a_kernel, fan(self.shape)).view(self.shape)  # [out, in, *kernel]

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        return c3a_product(x, self.c3a_kernel, fan(self.shape)) if self.kind.matrix else super().delta(x)


C3AModel = define_tuner(C3A, C3AConfig)

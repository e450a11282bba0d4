"""FourierFT: dW = s Re(IFFT2(F)), F zero but for n trained numbers at random frequencies (arXiv 2405.03003)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import FanInFanOut, TrainedBias, option
from peft.core.adapter import part, setting
from peft.core.addition import LinearIn
from peft.core.base.kinds import fan
from peft.core.families import ScaledBy, weight_to_add_to
from peft.core.layer.buffers import BufferDict
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.weight import base_bias
from peft.core.model.registry import define_tuner
from peft.kernels.few import is_small
from peft.kernels.spectral import Places, spectral_linear, spectral_matrix
from peft.peft_types import PeftType
from peft.tuners.spectra import SpectrumConfig, random_places


DENSE = 32  # a trained number costs about as much as so many entries of dW


@dataclass
class FourierFTConfig(SpectrumConfig, FanInFanOut, TrainedBias):
    """Config of FourierFT: each layer trains n numbers, the spectrum of its update at random frequencies.

    Use it where adapters shall be very small: n does not grow with the layer. The default start is random, so a
    fresh adapter changes the model's output: set init_weights=True to begin at the model as it is.
    """

    METHOD: ClassVar[PeftType] = PeftType.FOURIERFT
    OWN_BIAS: ClassVar[str] = "fourier_only"

    n_frequency: int = option(1000, "How many numbers each layer trains.", minimum=1)
    scaling: float = option(150.0, "The update is scaled by this.", stuck=0)
    random_loc_seed: int = option(
        777, "Seed of the frequencies, which are not in the file: it must stay what it was in training."
    )
    init_weights: bool = option(
        False, "Start with zeros, so that nothing changes; otherwise at random numbers: no identity."
    )


def fourierft_update(
    spectrum: torch.Tensor, places: torch.Tensor, shape: tuple[int, int], scaling: float
) -> torch.Tensor:
    """dW = s Re(IFFT2(F)), ``[out, in * kernel]``.

    Args:
        spectrum: the numbers in F that are not zero, ``[n]``. places: where they stand in the flat F, ``[n]``.
        shape: ``(out, in * kernel)``.
    """
    values, rows_and_columns = _scaled_numbers(spectrum, places, shape[1], scaling)
    if is_small(shape[0] * shape[1]):
        whole = values.new_zeros(shape[0] * shape[1]).index_add(0, places, values).view(shape)
        return torch.fft.ifft2(whole).real.to(spectrum.dtype)  # twice the work, in a third of the calls
    return spectral_matrix(values, rows_and_columns, shape).to(spectrum.dtype)


def _scaled_numbers(
    spectrum: torch.Tensor, places: torch.Tensor, columns: int, scaling: float
) -> tuple[torch.Tensor, Places]:
    """s in the numbers, and their rows and columns."""
    dtype = torch.promote_types(spectrum.dtype, torch.float32)  # there is no transform of 16 bits
    return (spectrum * scaling).to(dtype), (places // columns, places % columns)


class FourierFT(ScaledBy):
    """dW, ``[out, in * kernel]``, by the transform of a real matrix: only half of the spectrum is held."""

    fourierft_spectrum = part()
    fourierft_places = part(BufferDict, remade=True)
    fourierft_n_frequency = setting()
    adds = LinearIn("fourierft_spectrum")

    def create(self, config: FourierFTConfig, key: str) -> None:
        rows, columns = fan(self.shape)
        self.fourierft_n_frequency = n = config.count_for(key, (rows, columns))
        self.scale_by(config.scaling)
        self.fourierft_places = random_places(rows * columns, n, config.random_loc_seed)
        self.fourierft_spectrum = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n))

    def delta_weight(self) -> torch.Tensor:
        dw = fourierft_update(self.fourierft_spectrum, self.fourierft_places, fan(self.shape), self.scaling)
        return dw.view(self.shape)

    def numbers(self) -> tuple[torch.Tensor, Places]:
        """The numbers in the spectrum that are not zero, s in them, and their rows and columns."""
        return _scaled_numbers(self.fourierft_spectrum, self.fourierft_places, fan(self.shape)[1], self.scaling)

    def prefers_folding(self) -> bool:
        return not is_sparse(self.layer, (self,)) and self.sums_exactly()

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        if not is_sparse(self.layer, (self,)):
            return super().delta(x)
        values, places = self.numbers()
        return spectral_linear(x.to(values.dtype), values, places, fan(self.shape)).to(x.dtype)

    @classmethod
    def kernel(cls, layer: BaseTunerLayer, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        weight = weight_to_add_to(layer, adapters, x) if is_sparse(layer, adapters) else None
        if weight is None:
            return None
        values, places = zip(*(adapter.numbers() for adapter in adapters))
        rows, columns = (torch.cat(part) for part in zip(*places))
        return spectral_linear(x, torch.cat(values), (rows, columns), fan(layer.shape), weight, base_bias(layer))


def is_sparse(layer: BaseTunerLayer, adapters: Sequence[FourierFT]) -> bool:
    """Whether products by the spectra of the tokens cost less than making dW."""
    rows, columns = fan(layer.shape)
    if is_small(rows * columns):
        return False
    return layer.kind.matrix and DENSE * sum(a.fourierft_n_frequency for a in adapters) < rows * columns


FourierFTModel = define_tuner(FourierFT, FourierFTConfig)

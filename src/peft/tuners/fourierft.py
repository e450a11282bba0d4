"""FourierFT: dW = s Re(IFFT2(F)), F zero but for n trained numbers at random frequencies (arXiv 2405.03003)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import FanInFanOut, TrainedBias, option
from peft.core.buffers import BufferDict
from peft.core.families import ScaledLayer
from peft.core.kinds import fan
from peft.core.registry import define_tuner
from peft.kernels.spectral import spectral_product
from peft.tuners.spectra import SpectrumConfig, random_places
from peft.utils.constants import TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING
from peft.utils.peft_types import PeftType


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
    scaling: float = option(150.0, "The update is scaled by this.")
    random_loc_seed: int = option(
        777, "Seed of the frequencies, which are not in the file: it must stay what it was in training."
    )
    init_weights: bool = option(
        False, "Start with zeros, so that nothing changes; otherwise at random numbers: no identity."
    )


class FourierFTLayer(ScaledLayer):
    """dW, ``[out, in * kernel]``, by the transform of a real matrix: only half of the spectrum is held."""

    weights: ClassVar[dict[str, type]] = {"fourierft_spectrum": nn.ParameterDict, "fourierft_places": BufferDict}
    settings: ClassVar[dict[str, type]] = {"fourierft_n_frequency": dict, "configured": dict, "scaling": dict}
    remade: ClassVar[tuple[str, ...]] = ("fourierft_places",)
    linear: ClassVar[tuple[str, ...]] = ("fourierft_spectrum",)

    def update_layer(self, name: str, config: FourierFTConfig, key: str) -> None:
        n, (rows, columns) = config.count_for(key, fan(self.shape)), fan(self.shape)
        places = random_places(rows * columns, n, config.random_loc_seed)
        spectrum = torch.zeros(n) if config.init_weights else torch.randn(n)
        self.put(name, fourierft_n_frequency=n, configured=config.scaling, scaling=config.scaling)
        self.put(name, fourierft_spectrum=nn.Parameter(spectrum), fourierft_places=places)

    def initial_scaling(self, name: str) -> float:
        return self.configured[name]

    def delta_weight(self, name: str) -> torch.Tensor:
        spectrum, places, (rows, columns) = self.fourierft_spectrum[name], self.fourierft_places[name], fan(self.shape)
        values = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32)) * (self.scaling[name] / 2)
        u, v, half = places // columns, places % columns, columns // 2 + 1
        # the real part has the spectrum (F[u, v] + F[-u, -v]) / 2
        u, v = torch.cat([u, -u % rows]), torch.cat([v, -v % columns])
        inside = v < half
        values = torch.cat([values, values]) * inside
        matrix = values.new_zeros(rows * half).index_add(0, (u * half + v) * inside, values)
        return torch.fft.irfft2(matrix.view(rows, half), s=(rows, columns)).to(spectrum.dtype).view(self.shape)

    def needs_weight(self) -> bool:
        return not self._is_sparse() and self.sums_exactly()

    def _is_sparse(self) -> bool:
        """Whether products by the spectra of the tokens cost less than making dW."""
        rows, columns = fan(self.shape)
        return self.kind.matrix and DENSE * sum(self.fourierft_n_frequency.values()) < rows * columns

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if not self._is_sparse():
            return super().delta(name, x)
        spectrum, shape, places = self.fourierft_spectrum[name], fan(self.shape), self.fourierft_places[name]
        dtype = torch.promote_types(spectrum.dtype, torch.float32)  # there is no transform of 16 bits
        values = spectrum.to(dtype) * self.scaling[name]
        places = (places // shape[1], places % shape[1])
        return spectral_product(x.to(dtype), values, places, shape).to(x.dtype)


FourierFTModel = define_tuner(
    "FourierFTModel",
    FourierFTLayer,
    FourierFTConfig,
    prefix="fourierft_",
    targets=TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING,
)

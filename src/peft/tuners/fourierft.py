"""FourierFT: dW = s Re(IFFT2(F)), F zero but for n trained numbers at random frequencies (arXiv 2405.03003)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peft.config import FanInFanOut, TrainedBias, option
from peft.core.base.kinds import fan
from peft.core.families.families import ScaledLayer
from peft.core.layer.buffers import BufferDict
from peft.core.model.registry import define_tuner
from peft.kernels.spectral import Places, spectral_linear, spectral_matrix
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
        values, places = self._numbers([name])
        return spectral_matrix(values, places, fan(self.shape)).to(self.dtype_of(name)).view(self.shape)

    def _numbers(self, names: list[str]) -> tuple[torch.Tensor, Places]:
        """The numbers in the spectrum that are not zero, s in them, and their rows and columns."""
        values = torch.cat([self.fourierft_spectrum[name] * self.scaling[name] for name in names])
        places, columns = torch.cat([self.fourierft_places[name] for name in names]), fan(self.shape)[1]
        dtype = torch.promote_types(values.dtype, torch.float32)  # there is no transform of 16 bits
        return values.to(dtype), (places // columns, places % columns)

    def needs_weight(self) -> bool:
        return not self._is_sparse() and self.sums_exactly()

    def _is_sparse(self) -> bool:
        """Whether products by the spectra of the tokens cost less than making dW."""
        rows, columns = fan(self.shape)
        return self.kind.matrix and DENSE * sum(self.fourierft_n_frequency.values()) < rows * columns

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if not self._is_sparse():
            return super().delta(name, x)
        values, places = self._numbers([name])
        return spectral_linear(x.to(values.dtype), values, places, fan(self.shape)).to(x.dtype)

    def fused(self, names: list[str], x: torch.Tensor) -> torch.Tensor | None:
        weight = self.weight_to_add_to(names, x) if self._is_sparse() else None
        if weight is None:
            return None
        return spectral_linear(x, *self._numbers(names), fan(self.shape), weight, self.get_base_bias())


FourierFTModel = define_tuner(
    "FourierFTModel",
    FourierFTLayer,
    FourierFTConfig,
    prefix="fourierft_",
    targets=TRANSFORMERS_MODELS_TO_FOURIERFT_TARGET_MODULES_MAPPING,
)

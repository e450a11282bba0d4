"""WaveFT: dW = s IDWT2(F), F zero but for n trained wavelet coefficients at random places (arXiv 2505.12532)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import FanInFanOut, TrainedBias, option
from peft.core.base.kinds import fan
from peft.core.families.families import ScaledLayer, SparseLayer
from peft.core.layer.buffers import BufferDict
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.tuners.spectra import SpectrumConfig, random_places
from peft.utils.constants import TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING
from peft.utils.error import ConfigError
from peft.utils.peft_types import PeftType


@dataclass
class WaveFTConfig(SpectrumConfig, FanInFanOut, TrainedBias):
    """Config of WaveFT: each layer trains n numbers, coefficients of its update in a wavelet basis.

    Use it where adapters shall be very small, as an alternative to FourierFT whose changes are local: a coefficient
    moves a few neighbouring entries of the weight and not all of them.
    """

    METHOD: ClassVar[PeftType] = PeftType.WAVEFT
    OWN_BIAS: ClassVar[str] = "waveft_only"

    n_frequency: int = option(2592, "How many numbers each layer trains.", minimum=1)
    scaling: float = option(25.0, "The update is scaled by this.")
    wavelet_family: str = option("db1", "Discrete wavelet, by its name in PyWavelets; 'db1' is Haar's.")
    use_idwt: bool = option(
        True, "Transform the coefficients; without, they are the entries of the update themselves."
    )
    random_loc_seed: int = option(
        777, "Seed of the places, which are not in the file: it must stay what it was in training."
    )
    proportional_parameters: bool = option(
        False, "Share out n_frequency x layers in proportion to in x out, rather than giving each layer as many."
    )
    init_weights: bool = option(True, "Start with zeros, so that nothing changes; otherwise at random numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_idwt:
            filters(self.wavelet_family)


@functools.cache
def filters(family: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The reconstruction filters of a wavelet, low and high.

    Raises:
        ConfigError: PyWavelets is not installed, or has no such discrete wavelet.
    """
    haar = 0.5**0.5
    if family in ("db1", "haar"):
        return (haar, haar), (haar, -haar)
    try:
        import pywt
    except ImportError:
        raise ConfigError(
            f"wavelet_family={family!r} needs PyWavelets: pip install PyWavelets. 'db1' works without it."
        ) from None
    known = pywt.wavelist(kind="discrete")
    if family not in known:
        raise ConfigError(
            f"wavelet_family={family!r} is no discrete wavelet of PyWavelets; it has {', '.join(known)}."
        )
    wavelet = pywt.Wavelet(family)
    return tuple(wavelet.rec_lo), tuple(wavelet.rec_hi)


class WaveFTLayer(SparseLayer, ScaledLayer):
    """dW = s IDWT2(F), one level.

    With filters of length L, an axis of n entries has h = (n + L - 1) // 2 coefficients of either kind. F stands in
    the middle of ``[2 h_out, 2 h_in]``, whose quadrants are the approximation, the horizontal (high along the columns
    of W), the vertical (high along its rows) and the diagonal coefficients.
    """

    weights: ClassVar[dict[str, type]] = {"waveft_spectrum": nn.ParameterDict, "waveft_places": BufferDict}
    settings: ClassVar[dict[str, type]] = {
        "waveft_n_frequency": dict,
        "waveft_wavelet": dict,
        "share_of_budget": dict,
        "configured": dict,
        "scaling": dict,
    }
    remade: ClassVar[tuple[str, ...]] = ("waveft_places",)
    linear: ClassVar[tuple[str, ...]] = ("waveft_spectrum",)

    @classmethod
    def share(cls, config: WaveFTConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
        """How many numbers each layer has by proportion."""
        sizes = [rows * columns for rows, columns in (fan(layer.shape) for layer in layers)]
        budget = config.n_frequency * len(layers)
        return {"share_of_budget": [max(1, round(size / sum(sizes) * budget)) for size in sizes]}

    def update_layer(self, name: str, config: WaveFTConfig, key: str) -> None:
        rows, columns = fan(self.shape)
        default = self.share_of_budget.get(name) if config.proportional_parameters else None
        n = config.count_for(key, (rows, columns), default)
        spectrum = torch.zeros(n) if config.init_weights else torch.randn(n) * 0.01
        self.put(name, waveft_n_frequency=n, configured=config.scaling, scaling=config.scaling)
        self.put(name, waveft_wavelet=config.wavelet_family if config.use_idwt else None)
        places = random_places(rows * columns, n, config.random_loc_seed)
        self.put(name, waveft_spectrum=nn.Parameter(spectrum), waveft_places=places)

    def initial_scaling(self, name: str) -> float:
        return self.configured[name]

    def _coefficients(self, name: str, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each trained number, along an axis of W: where its filter starts, and whether it is in the upper half."""
        sizes, places = fan(self.shape), self.waveft_places[name]
        place = places % sizes[1] if axis else places // sizes[1]
        length = len(filters(self.waveft_wavelet[name])[0])
        half = (sizes[axis] + length - 1) // 2
        place = place + (2 * half - sizes[axis]) // 2
        return 2 * (place % half) - (length - 2), place >= half

    def entries(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What each number adds to W: the outer product of two filters, ``[n, L, L]``."""
        spectrum, (rows, columns) = self.waveft_spectrum[name] * self.scaling[name], fan(self.shape)
        if self.waveft_wavelet[name] is None:
            return self.waveft_places[name], spectrum
        bank = torch.tensor(filters(self.waveft_wavelet[name]), device=spectrum.device, dtype=spectrum.dtype)
        (top, low), (left, right) = (self._coefficients(name, axis) for axis in (0, 1))
        steps = torch.arange(bank.shape[1], device=top.device)
        down, along = top[:, None] + steps, left[:, None] + steps  # [n, L]
        here = (down >= 0) & (down < rows), (along >= 0) & (along < columns)
        outer = (bank[right.long()] * here[0])[:, :, None] * (bank[low.long()] * here[1])[:, None]
        places = down.clamp(0, rows - 1)[:, :, None] * columns + along.clamp(0, columns - 1)[:, None]
        return places.flatten(), (spectrum[:, None, None] * outer).flatten()


WaveFTModel = define_tuner(
    "WaveFTModel",
    WaveFTLayer,
    WaveFTConfig,
    prefix="waveft_",
    targets=TRANSFORMERS_MODELS_TO_WAVEFT_TARGET_MODULES_MAPPING,
)

"""WaveFT: dW = s IDWT2(F), F zero but for n trained wavelet coefficients at random places (arXiv 2505.12532)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import FanInFanOut, TrainedBias, option
from peft.core.adapter import part, setting
from peft.core.addition import LinearIn
from peft.core.base.kinds import fan
from peft.core.families import ScaledBy, Sparse
from peft.core.layer.buffers import BufferDict
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.errors import ConfigError
from peft.peft_types import PeftType
from peft.tuners.spectra import SpectrumConfig, random_places


@dataclass
class WaveFTConfig(SpectrumConfig, FanInFanOut, TrainedBias):
    """Config of WaveFT: each layer trains n numbers, coefficients of its update in a wavelet basis.

    Use it where adapters shall be very small, as an alternative to FourierFT whose changes are local: a coefficient
    moves a few neighbouring entries of the weight and not all of them.
    """

    METHOD: ClassVar[PeftType] = PeftType.WAVEFT
    OWN_BIAS: ClassVar[str] = "waveft_only"

    n_frequency: int = option(2592, "How many numbers each layer trains.", minimum=1)
    scaling: float = option(25.0, "The update is scaled by this.", stuck=0)
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


def waveft_entries(
    spectrum: torch.Tensor, places: torch.Tensor, shape: tuple[int, int], bank: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dW = IDWT2(F), one level: a coefficient adds the outer product of two filters to W.

    With filters of length L, an axis of n entries has h = (n + L - 1) // 2 coefficients of either kind. F stands in
    the middle of ``[2 h_out, 2 h_in]``, whose quadrants are the approximation, the horizontal (high along the columns
    of W), the vertical (high along its rows) and the diagonal coefficients.

    Args:
        spectrum, places: the n coefficients and where they stand in the flat F, ``[n]`` each.
        shape: ``(out, in * kernel)``. bank: the filters, low and high, ``[2, L]``.

    Returns:
        Places in the flat dW and the numbers there, ``[n L L]`` each; what has one place adds up.
    """
    (rows, columns), length = shape, bank.shape[1]
    top, low = _filter_of(places // columns, rows, length)
    left, right = _filter_of(places % columns, columns, length)
    steps = torch.arange(length, device=top.device)
    down, along = top[:, None] + steps, left[:, None] + steps  # [n, L]
    here = (down >= 0) & (down < rows), (along >= 0) & (along < columns)
    outer = (bank[right.long()] * here[0])[:, :, None] * (bank[low.long()] * here[1])[:, None]  # [n, L, L]
    into = down.clamp(0, rows - 1)[:, :, None] * columns + along.clamp(0, columns - 1)[:, None]
    return into.flatten(), (spectrum[:, None, None] * outer).flatten()


def _filter_of(place: torch.Tensor, size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each coefficient, along an axis of W: where its filter starts, and whether it is in the upper half."""
    half = (size + length - 1) // 2
    place = place + (2 * half - size) // 2
    return 2 * (place % half) - (length - 2), place >= half


class WaveFT(Sparse, ScaledBy):
    """dW = s IDWT2(F), F zero but for ``waveft_spectrum`` ``[n]``; or s F itself where there is no wavelet."""

    waveft_spectrum = part()
    waveft_places = part(BufferDict, remade=True)
    waveft_n_frequency, waveft_wavelet, share_of_budget = setting(), setting(), setting()
    adds = LinearIn("waveft_spectrum")

    @classmethod
    def share(cls, config: WaveFTConfig, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
        """How many numbers each layer has by proportion."""
        sizes = [rows * columns for rows, columns in (fan(layer.shape) for layer in layers)]
        budget = config.n_frequency * len(layers)
        return {"share_of_budget": [max(1, round(size / sum(sizes) * budget)) for size in sizes]}

    def create(self, config: WaveFTConfig, key: str) -> None:
        rows, columns = fan(self.shape)
        default = self.share_of_budget if config.proportional_parameters else None
        self.waveft_n_frequency = n = config.count_for(key, (rows, columns), default)
        self.scale_by(config.scaling)
        self.waveft_wavelet = config.wavelet_family if config.use_idwt else None
        self.waveft_spectrum = nn.Parameter(torch.zeros(n) if config.init_weights else torch.randn(n) * 0.01)
        self.waveft_places = random_places(rows * columns, n, config.random_loc_seed)

    def entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        spectrum, places, wavelet = self.waveft_spectrum * self.scaling, self.waveft_places, self.waveft_wavelet
        if wavelet is None:
            return places, spectrum
        bank = torch.tensor(filters(wavelet), device=spectrum.device, dtype=spectrum.dtype)
        return waveft_entries(spectrum, places, fan(self.shape), bank)


WaveFTModel = define_tuner(WaveFT, WaveFTConfig)

"""What an adapter is and does, from its files: its tensors, and by layer how it changes the weight of its base."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from peft.config import ORIGIN, PeftConfig
from peft.core.files.io import load_peft_weights, locate_weights
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.weight import base_weight, weight_change
from peft.core.model.walk import layers_of
from peft.options import value_of
from peft.tools.merging import open_base


_WHOLE_SPECTRUM = 1024  # up to this size all singular values are computed, else the first _SOME
_SOME = 128


@dataclass
class LayerReport:
    """What an adapter does to one weight W.

    Attributes:
        name: the layer. shape: of W, ``[out, in, *kernel]``.
        relative: |dW| / |W|, in the Frobenius norm. effective_rank: the exponential of the entropy of the singular
            values' shares of the sum, "how many directions there are" (Roy and Vetterli, 2007).
        largest, smallest: singular values of dW, of those that are not zero.
        spectrum: the first of them.
        reason: why there is no dW, where the adapter is none.
    """

    name: str
    shape: tuple[int, ...]
    relative: float | None = None
    effective_rank: float | None = None
    largest: float | None = None
    smallest: float | None = None
    spectrum: list[float] = field(default_factory=list)
    reason: str | None = None


@dataclass
class AdapterReport:
    """What an adapter is.

    Attributes:
        method, base, task: as its config has them. settings: the fields that differ from their defaults.
        parameters, bytes: of its file or files. dtypes: of its tensors.
        broken: tensors with NaN or infinite entries. zero: tensors of zeros alone.
        fits: whether it fits the base looked at; None where none was. why_not: the error, if not.
        layers: one for each weight, where there is a base.
    """

    method: str
    base: str | None
    task: str | None
    settings: dict[str, Any]
    parameters: int
    bytes: int
    dtypes: list[str]
    broken: list[str]
    zero: list[str]
    fits: bool | None = None
    why_not: str | None = None
    layers: list[LayerReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def inspect_adapter(folder: str | os.PathLike, base: str | os.PathLike | None = None) -> AdapterReport:
    """Look at a saved adapter, and at what it does to a base.

    The weights of the base are read one at a time, where its files allow.

    Args:
        folder: of the adapter, or its name on the hub.
        base: folder of a base model, or its name on the hub; without one, only the adapter's own tensors are seen.

    Example::

        report = inspect_adapter("runs/sentiment/adapter", "SmolLM2-135M-Instruct")
        max(report.layers, key=lambda layer: layer.relative).name

    Raises:
        ConfigError, ValueError: there is no adapter, or its files are damaged.
    """
    config = PeftConfig.from_pretrained(os.fspath(folder))
    tensors = load_peft_weights(folder)
    report = AdapterReport(
        method=config.method_name,
        base=config.base_model_name_or_path,
        task=None if config.task_type is None else str(value_of(config.task_type)),
        settings=_settings(config),
        parameters=sum(t.numel() for t in tensors.values()),
        bytes=sum(map(os.path.getsize, locate_weights(folder))),
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()}),
        broken=[name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()],
        zero=[name for name, t in tensors.items() if t.numel() and not t.any()],
    )
    if base is not None:
        _on_base(report, folder, base)
    return report


def _settings(config: PeftConfig) -> dict[str, Any]:
    fresh = type(config)()
    found = {}
    for name, value in config.to_dict().items():
        if name not in ("peft_type", *ORIGIN) and value != fresh.to_dict().get(name):
            found[name] = sorted(value) if isinstance(value, set) else value
    return found


def _on_base(report: AdapterReport, folder: str | os.PathLike, base: str | os.PathLike) -> None:
    """Put the adapter on the base and look at each of its layers."""
    from peft.peft_model import PeftModel

    model = open_base(base)
    try:
        adapted = PeftModel.from_pretrained(model, folder, adapter_name="default")
    except ValueError as error:
        report.fits, report.why_not = False, str(error)
        return
    report.fits = True
    with torch.no_grad():
        for _, layer in layers_of(adapted):
            report.layers.append(_layer(layer))


def _layer(layer: BaseTunerLayer) -> LayerReport:
    adapter = layer.adapters["default"]
    found = LayerReport(layer.key, tuple(layer.shape) if not layer.kind.whole else ())
    try:
        change = weight_change(layer, adapter)
    except (ValueError, NotImplementedError) as error:
        found.reason = str(error)
        return found
    matrix, weight = change.flatten(1).float(), base_weight(layer).float()
    found.relative = float(matrix.norm() / weight.norm().clamp_min(1e-30))
    values = spectrum(matrix)
    kept = values[values > values[:1].clamp_min(1e-30) * 1e-5] if len(values) else values
    if len(kept):
        shares = kept / kept.sum()
        found.effective_rank = math.exp(float(-(shares * shares.log()).sum()))
        found.largest, found.smallest = float(kept[0]), float(kept[-1])
        found.spectrum = [float(v) for v in kept[:_SOME]]
    return found


def spectrum(matrix: torch.Tensor) -> torch.Tensor:
    """The singular values of a matrix, falling; of large ones the first 128, by a randomised method."""
    if not matrix.isfinite().all():
        return matrix.new_zeros(0)
    if min(matrix.shape) <= _WHOLE_SPECTRUM:
        return torch.linalg.svdvals(matrix)
    with torch.random.fork_rng(devices=[]):  # the same figures each time
        torch.manual_seed(0)
        return torch.svd_lowrank(matrix, q=_SOME, niter=4)[1]

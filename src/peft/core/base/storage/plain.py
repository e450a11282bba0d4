"""Weights kept as ordinary dense parameters, and the interface of all storages."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn


class Storage:
    """Reads a weight dense and writes it back, in the layout in which the module stores it.

    Attributes:
        name: the library, shown in status reports (``quantization_backend``); None for a dense weight.
        layer_name: replaces the kind's name in the class name of adapted layers (``Linear4bit``), if set.
        can_read, can_write: whether the weight can be had dense, and replaced.
        lossless: whether what is written is what is read afterwards. If not, the original is kept for ``unmerge``.
        linears: ``(package, class)`` of layers that are linear without being ``nn.Linear``.
        slots: the attributes of a module that hold its weight.
        own_classes: a plain ``nn.Parameter`` of a layer of torch's own is never meant, so there is no need to ask.
    """

    name: str | None = None
    layer_name: str | None = None
    can_read = True
    can_write = True
    lossless = True
    linears: ClassVar[tuple[tuple[str, str], ...]] = ()
    slots: ClassVar[tuple[str, ...]] = ()
    own_classes = False

    def matches(self, m: nn.Module, attribute: str) -> bool:
        """Whether this storage keeps ``m.<attribute>``."""
        raise NotImplementedError

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        """The dense weight, detached."""
        raise NotImplementedError

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        """Replace the weight; another module that holds the same parameter (``shared``) keeps its own."""
        raise NotImplementedError

    def overwrite(self, m: nn.Module, attribute: str, value: torch.Tensor) -> bool:
        """Write the weight into the memory that it has; False, with nothing done, where :meth:`write` is needed."""
        return False

    def compute_dtype(self, m: nn.Module, attribute: str) -> torch.dtype | None:
        """The dtype in which the layer multiplies, None if that is the input's."""
        return None

    def linear_shape(self, m: nn.Module) -> tuple[int, int]:
        """``(out, in)`` of one of ``linears``."""
        return m.out_features, m.in_features

    def keep(self, m: nn.Module, attribute: str) -> Any:
        """What :meth:`put_back` needs to restore the weight bit for bit."""
        return {slot: getattr(m, slot, None) for slot in self.slots}

    def put_back(self, m: nn.Module, attribute: str, kept: Any) -> None:
        """Restore what :meth:`keep` gave."""
        for slot, value in kept.items():
            setattr(m, slot, value)

    def read_kept(self, m: nn.Module, attribute: str, kept: Any) -> torch.Tensor:
        """The dense weight that ``kept`` stands for."""
        now = self.keep(m, attribute)
        self.put_back(m, attribute, kept)
        try:
            return self.read(m, attribute)
        finally:
            self.put_back(m, attribute, now)


class Plain(Storage):
    """A dense ``nn.Parameter``."""

    def matches(self, m: nn.Module, attribute: str) -> bool:
        return True

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        return getattr(m, attribute).detach()

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        if shared:
            setattr(m, attribute, nn.Parameter(value.contiguous(), requires_grad=False))
        else:
            getattr(m, attribute).data = value.contiguous()

    def overwrite(self, m: nn.Module, attribute: str, value: torch.Tensor) -> bool:
        old = getattr(m, attribute).data
        same = old.shape == value.shape and old.dtype == value.dtype and old.device == value.device
        if not same or old.is_meta or type(old) is not torch.Tensor or old.is_inference():
            return False
        old.copy_(value)
        return True

    def keep(self, m: nn.Module, attribute: str) -> tuple[nn.Parameter, torch.Tensor]:
        parameter = getattr(m, attribute)
        return parameter, parameter.data

    def put_back(self, m: nn.Module, attribute: str, kept: tuple[nn.Parameter, torch.Tensor]) -> None:
        parameter, data = kept
        parameter.data = data
        setattr(m, attribute, parameter)

    def read_kept(self, m: nn.Module, attribute: str, kept: tuple[nn.Parameter, torch.Tensor]) -> torch.Tensor:
        return kept[1]

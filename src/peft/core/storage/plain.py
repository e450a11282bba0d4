"""Weights kept as ordinary dense parameters, and the interface of all storages."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Storage:
    """Reads a weight dense and writes it back, in the layout in which the module stores it.

    Attributes:
        name: shown in status reports (``quantization_backend``); None for a dense weight.
        prefix: replaces the kind's name in the class name of adapted layers (``Linear4bit``), if set.
        can_read, can_write: whether the weight can be had dense, and replaced.
        lossless: whether what is written is what is read afterwards. If not, the original is kept for ``unmerge``.
    """

    name: str | None = None
    layer_name: str | None = None
    can_read = True
    can_write = True
    lossless = True

    def matches(self, m: nn.Module, attribute: str) -> bool:
        raise NotImplementedError

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        """The dense weight, detached."""
        raise NotImplementedError

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor) -> None:
        raise NotImplementedError

    def keep(self, m: nn.Module, attribute: str) -> Any:
        """What :meth:`put_back` needs to restore the weight bit for bit."""
        raise NotImplementedError

    def put_back(self, m: nn.Module, attribute: str, kept: Any) -> None:
        raise NotImplementedError

    def read_kept(self, kept: Any) -> torch.Tensor:
        """The dense weight that ``kept`` stands for."""
        raise NotImplementedError


class Plain(Storage):
    """A dense ``nn.Parameter``."""

    def matches(self, m: nn.Module, attribute: str) -> bool:
        return True

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        return getattr(m, attribute).detach()

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor) -> None:
        getattr(m, attribute).data = value.contiguous()

    def keep(self, m: nn.Module, attribute: str) -> tuple[nn.Parameter, torch.Tensor]:
        parameter = getattr(m, attribute)
        return parameter, parameter.data

    def put_back(self, m: nn.Module, attribute: str, kept: tuple[nn.Parameter, torch.Tensor]) -> None:
        parameter, data = kept
        parameter.data = data
        setattr(m, attribute, parameter)

    def read_kept(self, kept: tuple[nn.Parameter, torch.Tensor]) -> torch.Tensor:
        return kept[1]

"""Frozen tensors by adapter name, which move with the model."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import torch
from torch import nn


class BufferDict(nn.Module, MutableMapping):
    """A dict of tensors that are buffers of a module.

    Args:
        persistent: whether the tensors belong to the module's state dict.
    """

    def __init__(self, buffers: dict[str, torch.Tensor] | None = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        for name, tensor in (buffers or {}).items():
            self[name] = tensor

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor, persistent=self.persistent)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._buffers[name]

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    __hash__ = nn.Module.__hash__  # a mapping is equal by what it holds, a module only to itself
    __eq__ = nn.Module.__eq__

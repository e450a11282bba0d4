"""Which adapters of a module act, and which train: the same for tuner layers and auxiliary wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from peft.core.model.context import Context, Known


class Switch:
    """Mixin of modules that hold several adapters. ``adapter_parameters`` and ``in`` say what they hold."""

    context: Context
    _active_adapter: list[str]
    _disable_adapters: bool
    _paused: list[torch.Tensor]

    def _start(self, context: Context | None = None) -> None:
        self.__dict__.update(
            context=context or Context(Known()), _active_adapter=[], _disable_adapters=False, _paused=[]
        )

    @property
    def adapter_names(self) -> list[str]:
        """All adapters held here, in the order in which they were added."""
        raise NotImplementedError

    def __contains__(self, name: str) -> bool:
        raise NotImplementedError

    def adapter_parameters(self, name: str) -> Iterator[torch.Tensor]:
        """The trained tensors of an adapter."""
        raise NotImplementedError

    def adapter_constants(self, name: str) -> Iterator[torch.Tensor]:
        """Tensors of an adapter that others of its method train, and it does not."""
        return iter(())

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        """An adapter's tensors as (name in the file, name in memory, tensor): found by structure, never by text."""
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names in the file -> names in memory, below this module. transformers asks for it."""
        return {saved: memory for saved, memory, _ in self.adapter_state(adapter_name)}

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        raise NotImplementedError

    def present(self, names: Sequence[Any]) -> list[str]:
        """Those of these adapters that are here, or, where a composition itself is not, those that it is made of."""
        found: dict[str, None] = {}
        for name in names:
            own = [name] if name in self else [other for other in self.context.behind([name]) if other in self]
            found.update(dict.fromkeys(own))
        return list(found)

    def check_active_rows(self, names: Sequence[Any]) -> None:
        """The same as :meth:`check_active` for all that act on one row of a batch, here or not."""
        for row in self.context.together(names):
            self.check_active(self.present(row))

    def check_active(self, names: list[str]) -> None:
        """Raise ValueError where these adapters cannot be active together."""

    @property
    def active_adapters(self) -> list[str]:
        active: Any = self._active_adapter  # others set one name
        return [active] if isinstance(active, str) else list(active)

    @property
    def active_adapter(self) -> str | list[str]:
        """A list for a layer, as programs that index it expect; :attr:`active_adapters` is one for every module."""
        active: Any = self._active_adapter
        return active if isinstance(active, str) else list(active)

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off. Off, they do not train; on again, those train that did before."""
        if enabled == self._disable_adapters:
            self._disable_adapters = not enabled
            if not enabled:
                names = self.context.behind(self.active_adapters)
                parameters = (p for name in names for p in self.adapter_parameters(name))
                self._paused = [p for p in parameters if p.requires_grad]
            for p in self._paused:
                p.requires_grad_(enabled)
            self.switched()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones and, outside ``inference_mode``, the only ones that train."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_active([name for name in names if name in self])
        trained = self.context.behind(names, training=True)
        for name in self.context.behind([*self.active_adapters, *names]):
            if name not in trained:
                self.set_requires_grad(name, False)
        for name in trained:
            self.set_requires_grad(name, not inference_mode)
        self.__dict__["_active_adapter"] = names  # a module looks into each value that is set
        self.__dict__["_paused"] = []  # those that were switched off before have been told anew whether they train
        self.switched()

    def training_names(self) -> list[str]:
        """The adapters here that train."""
        return [name for name in self.adapter_names if any(p.requires_grad for p in self.adapter_parameters(name))]

    def switched(self) -> None:
        """Called when other adapters act than before."""

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Choose whether these adapters train, active or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for p in self.adapter_parameters(name):
                if p.requires_grad is not requires_grad and p.is_floating_point():
                    p.requires_grad_(requires_grad)

    def _forget(self, name: str) -> None:
        self._active_adapter = [active for active in self.active_adapters if active != name]

"""Layers whose adapters have a factor each, which users turn up and down."""

from __future__ import annotations

from typing import Any

from peft.core.layer import weight as weights
from peft.core.layer.layer import BaseTunerLayer


class ScaledLayer(BaseTunerLayer):
    """A layer with ``scaling[name]`` for each adapter, what its update is multiplied by."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the scale of an adapter ``scale`` times its initial one."""
        if adapter in self.adapters:
            self._rescale({adapter: scale * self._initial(adapter)})

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        self._rescale({name: self.scaling[name] * scale for name in self.active_adapters if name in self.adapters})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters; None brings back the initial ones."""
        names = [name for name in self.active_adapters if name in self.adapters]
        self._rescale({n: self._initial(n) if scale is None else self.scaling[n] / scale for n in names})

    def _initial(self, name: str) -> float:
        adapter: Any = self.adapters[name]
        return adapter.initial_scaling()

    def _rescale(self, scaling: dict[str, Any]) -> None:
        """What is merged is taken out by the scale that it went in by, and put back by the new one."""
        with weights.taken_out([self] if set(scaling) & set(self.merged_adapters) else []):
            self.scaling.update(scaling)

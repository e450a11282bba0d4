"""Variants of LoRA as 0.21 has them: objects without state, one at each layer, whose functions get the layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch


class _ByAdapter(type):
    """A class that is told by the adapter: ``isinstance(layer.lora_variant["default"], DoraLinearVariant)``."""

    of: type | None

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or (cls.of is not None and isinstance(instance, cls.of))


class LoraVariant(metaclass=_ByAdapter):
    """What third parties derive variants of their own from; ``resolve_lora_variant`` of their layers returns one.

    Attributes:
        of: the class of adapters of this package that such a variant stands for.
    """

    of: ClassVar[type | None] = None

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Make what the variant needs beside A and B, in a container of the layer."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The layer's output with the adapter; ``result`` is the output without it."""
        return module.adapters[active_adapter].output(x, result, result)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight, as the layer stores it, with the adapter in it."""
        base, kind = module.get_base_layer(), module.kind
        weight = kind.orient(orig_weight, base)
        return kind.restore(module.adapters[active_adapter].fold(weight, weight), base)


def standing_for(adapter_cls: type, *names: str) -> dict[str, Any]:
    """The names that 0.21 has for a variant."""
    members = {"of": adapter_cls, "__doc__": f"Stands for :class:`{adapter_cls.__name__}`.", "__module__": __name__}
    return {name: _ByAdapter(name, (LoraVariant,), dict(members)) for name in names}

"""The base layer, read through the wrapper: ``layer.weight`` is the base's, with adapters in it where that counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from peft.compat.layer import LayerCompat
from peft.core.base.readers import NoWeight
from peft.core.base.storage.sharded import MARKS
from peft.core.layer import routes
from peft.core.layer import weight as weights
from peft.core.layer.switch import Switch


# Third parties write `class Theirs(nn.Module, LoraLayer)`, so a layer cannot be a module itself; the classes for the
# kinds of layers are.
_Module: Any = nn.Module if TYPE_CHECKING else object


class ReadThrough(LayerCompat, Switch, _Module):
    """Answers for what the wrapper lacks. Another module may compute with the weight that it reads here."""

    adapter_cls: ClassVar[Any]
    adapters: dict[str, Any]
    base_layer: nn.Module

    def current(self) -> list[Any]:
        """Adapters that act on a weight which another module reads."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks, the base layer answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = self.__dict__.get("kind")
            delegates = "base_layer" in self.__dict__.get("_modules", ()) and name != "base_layer"
            # Of opaque modules torch reads private names as well, such as `_qkv_same_embed_dim` of an attention.
            if not delegates or name in MARKS or (name.startswith("_") and not (kind is not None and kind.opaque)):
                raise
        return self._read(name)

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight; where another module computes with it, with the adapters in it."""
        return self._read("weight")

    @property
    def bias(self) -> torch.Tensor | None:
        return self._read("bias")

    def _read(self, name: str) -> Any:
        """An attribute of the base layer, as the acting adapters have it."""
        state = self.__dict__
        kind = state.get("kind")
        computes = kind is not None and (kind.opaque or state["read_by_parent"]) and name in (kind.weight, kind.bias)
        if kind is None or not self.adapters or not (computes or self.adapter_cls.any_module):
            return getattr(self._modules["base_layer"], name)
        if computes and not self.adapter_cls.any_module:
            adapters = self.current()
            if any(adapter.unmergeable() for adapter in adapters):
                return getattr(self._modules["base_layer"], name).as_subclass(NoWeight)
            return weights.effective_here(self, adapters)[name]
        reads = state["read_by_parent"] and name in ("weight", "bias")  # otherwise it is read to be looked at
        adapters = self.current() if reads or not self.context.is_mixed else []
        module = adapters[-1].stand_in() if adapters else None
        return getattr(self.base_layer, name) if module is None else routes.attribute_of(self, module, name)

    @property
    def _external_params(self) -> dict[int, torch.Tensor]:
        """Parameters in dicts, which no module's call tells of: DeepSpeed ZeRO-3 gathers them with the layer's."""
        dicts = [self._modules.get(name) for name in (*self.adapter_layer_names, *self.other_param_names)]
        return {id(p): p for held in dicts if isinstance(held, nn.ParameterDict) for p in held._parameters.values()}

    def ds_external_parameters(self) -> Any:
        """What DeepSpeed asks for by this name."""
        return self._external_params.items()

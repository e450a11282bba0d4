"""How a layer's base weight is quantised, as the ecosystem asks for it: each backend is a storage by its old name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from peft.core.base.kinds import kind_of
from peft.core.base.storage import Storage, storage_of


class QuantizationBackend:
    """Reads and writes the quantised weight of a base layer, dense, in the layout of the layer.

    Attributes:
        backend_name: the library. supports_merge: whether the weight can be read and written.
    """

    supports_merge: bool = False
    backend_name: str = ""
    layer_type: ClassVar[str] = "linear"

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        """The dense weight of a base layer."""
        return self._storage(base_layer).read(base_layer, "weight")

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        """Quantise a dense weight into the base layer of an adapted layer."""
        base_layer = peft_layer.get_base_layer()
        self._storage(base_layer).write(base_layer, "weight", weight_data)

    def _storage(self, base_layer: nn.Module) -> Storage:
        storage = storage_of(base_layer, "weight")
        if storage.name is None:
            raise TypeError(f"the weight of this {type(base_layer).__name__} is not quantised.")
        return storage

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer's output as something that may be changed in place."""
        return x

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.backend_name!r})"


class Bnb4bitBackend(QuantizationBackend):
    """bitsandbytes' ``Linear4bit``."""

    supports_merge, backend_name = True, "bnb 4bit"

    def maybe_clone_base_result(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()  # it may be a view that autograd refuses to see changed


class Bnb8bitBackend(QuantizationBackend):
    """bitsandbytes' ``Linear8bitLt``."""

    supports_merge, backend_name = True, "bnb 8bit"


class HqqBackend(QuantizationBackend):
    """HQQ's ``HQQLinear``."""

    supports_merge, backend_name = True, "hqq"


class TorchaoBackend(QuantizationBackend):
    """torchao's tensors. ``get_apply_tensor_subclass`` is for callers; a weight is written as it was quantised."""

    supports_merge, backend_name = True, "torchao"

    def __init__(self, get_apply_tensor_subclass: Callable[[], Any] | None) -> None:
        self.get_apply_tensor_subclass = get_apply_tensor_subclass


class ForwardOnlyQuantizationBackend(QuantizationBackend):
    """A library whose weights are not both read and written here: adapters train, and cannot be merged."""

    def __init__(self, backend_name: str = "") -> None:
        self.backend_name = backend_name

    def get_base_weight(self, base_layer: nn.Module) -> torch.Tensor:
        raise TypeError(f"weights kept by {self.backend_name} cannot be read dense, so nothing can be merged there.")

    def set_base_weight(self, peft_layer: nn.Module, weight_data: torch.Tensor) -> None:
        raise TypeError(f"weights kept by {self.backend_name} cannot be written, so nothing can be merged there.")


class _Other(QuantizationBackend):
    """A library that the names above do not know, and that can be read and written."""

    supports_merge = True

    def __init__(self, backend_name: str) -> None:
        self.backend_name = backend_name


_BY_LAYER: dict[str | None, type[QuantizationBackend]] = {"Linear4bit": Bnb4bitBackend, "Linear8bitLt": Bnb8bitBackend}


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> QuantizationBackend | None:
    """What reads and writes the weight of a base layer, or None if it is not quantised.

    Args:
        kwargs: what :func:`get_quantization_kwargs` gives.
    """
    kind = kind_of(base_layer)
    if kind is None:
        return None
    storage = storage_of(base_layer, kind.weight)
    if storage.name is None:
        return None
    if storage.layer_name in _BY_LAYER:
        return _BY_LAYER[storage.layer_name]()
    if not (storage.can_read and storage.can_write):
        return ForwardOnlyQuantizationBackend(storage.name)
    if storage.name == TorchaoBackend.backend_name:
        return TorchaoBackend(kwargs.get("get_apply_tensor_subclass"))
    return HqqBackend() if storage.name == HqqBackend.backend_name else _Other(storage.name)


def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """What a model says about its quantisation that its layers do not: torchao's way of making its tensors."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    make = getattr(config, "get_apply_tensor_subclass", None)
    return {} if make is None else {"get_apply_tensor_subclass": make}


def quantization_extra_repr(module: nn.Module) -> str:
    """What an adapted layer shows of its base's quantisation when it is printed; "" if there is none."""
    backend = getattr(module, "quantization_backend", None)
    return "" if backend is None else f"quantization_backend={backend.backend_name}"

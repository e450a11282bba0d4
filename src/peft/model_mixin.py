"""What the mixins of a ``PeftModel`` ask of the rest of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class ModelMixin:
    """Base of the mixins that :class:`PeftModel` is put together of; it has all of this."""

    base_model: nn.Module
    get_base_model: Callable[[], nn.Module]
    state_dict: Callable[[], dict[str, Any]]
    eval: Callable[[], Any]
    add_adapter: Callable[..., None]
    load_adapter: Callable[..., Any]
    set_adapter: Callable[..., None]
    set_requires_grad: Callable[..., None]
    delete_adapter: Callable[[str], None]
    _tuner: Any
    _class_for: Callable[[Any], type[Any]]
    _check_method: Callable[[Any], None]

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapters' configs, by name."""
        raise NotImplementedError

    @property
    def active_adapters(self) -> list[str]:
        """The names of the adapters that act."""
        raise NotImplementedError

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether one of them is not switched off."""
        raise NotImplementedError

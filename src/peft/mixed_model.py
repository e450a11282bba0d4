"""A model with adapters of different methods."""

from __future__ import annotations

import os
from typing import Any, cast

from torch import nn

from peft._lazy import also_known
from peft.config import PeftConfig
from peft.core.model.beside import add_auxiliary
from peft.core.model.mixed import MixedModel
from peft.core.model.tuner import BaseTuner
from peft.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from peft.peft_types import PEFT_TYPE_TO_MIXED_MODEL_MAPPING, listed


class PeftMixedModel(PeftModel):
    """A base model with adapters of different methods, which can be active together.

    Adapters are saved and loaded one by one, in the format that they have on their own.

    Args:
        model: the base model; changed in place.
        peft_config: the config of the first adapter.
        adapter_name: its name.

    Raises:
        ValueError: for a method that cannot be mixed with others.
    """

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
    ) -> None:
        self._check_method(peft_config)
        task = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type or "", PeftModel)
        self.__dict__["_task"] = task._task
        super().__init__(model, peft_config, adapter_name, **kwargs)

    def _tuner_class(self, peft_config: PeftConfig) -> type[BaseTuner]:
        return MixedModel

    def _check_method(self, peft_config: PeftConfig) -> None:
        if peft_config.peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
            known = listed(PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
            raise ValueError(
                f"{peft_config.peft_type} adapters cannot be mixed with others: they change how the whole model is "
                f"called, not single layers of it. These can be mixed: {known}; a UnionConfig can have "
                "such a part beside others."
            )

    @classmethod
    def _class_for(cls, config: PeftConfig) -> type[PeftModel]:
        return cls

    @property
    def active_adapter(self) -> list[str]:  # type: ignore[override]
        """All active adapters: here several can be active."""
        return self.active_adapters

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Remove one adapter or several."""
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            super().delete_adapter(name)

    def set_modules_to_save(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """Wrap the modules that the config trains whole."""
        add_auxiliary(self.get_base_model(), adapter_name, peft_config)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> PeftMixedModel:
        """Put a saved adapter around its base model; load the others with :meth:`load_adapter`."""
        loaded = super().from_pretrained(model, model_id, adapter_name, is_trainable, config, **kwargs)
        return cast(PeftMixedModel, loaded)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Merge the active adapters, whatever their methods, and return the plain model."""
        return self.base_model.merge_and_unload(*args, **kwargs)

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the plain model, without any adapter."""
        return self.base_model.unload(*args, **kwargs)


also_known(__name__)

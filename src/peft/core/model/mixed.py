"""Several methods in one model: layers of different methods nest around the same base layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from peft.core.combine.combined import checked_weights
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.record import behind
from peft.core.model.tuner import BaseTuner
from peft.utils.error import CONVERSION
from peft.utils.peft_types import PEFT_TYPE_TO_TUNER_MAPPING


class MixedModel(BaseTuner):
    """A tuner whose adapters may each be of another method.

    Each config is injected by its method's own tuner; the rest of an adapter's life is the same for all methods.
    Nested layers act from the inside out: an outer adapter changes what the inner ones give.
    """

    layer_cls: ClassVar[type[BaseTunerLayer]] = BaseTunerLayer
    mixes: ClassVar[bool] = True

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        part = self._part(self.peft_config[adapter_name])
        part.inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        for attribute in part.layer_cls.adapter_cls.common:
            setattr(self, attribute, getattr(part, attribute))

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, **kwargs: Any
    ) -> None:
        """Combine adapters of one method, as its own tuner does.

        Raises:
            ValueError: as there, and if the adapters are of different methods.
        """
        checked_weights(self, adapters, weights)
        methods = {self.peft_config[name].peft_type for name in adapters}
        if len(methods) > 1:
            names = sorted(str(getattr(method, "value", method)) for method in methods)
            raise ValueError(
                f"adapters of different methods ({', '.join(names)}) have no sum that is an adapter of one of them. "
                f"{CONVERSION} does their weighted sum."
            )
        self._part(self.peft_config[adapters[0]]).add_weighted_adapter(adapters, weights, adapter_name, **kwargs)

    def finish(self, outputs: Any) -> Any:
        """The model's outputs with what each method of an active adapter makes of them."""
        for part in self._acting():
            outputs = part.finish(outputs)
        return outputs

    def update_and_allocate(self, global_step: int) -> None:
        """Let the methods of the active adapters that share out a budget do so, after the backward pass of a step."""
        for part in self._acting():
            if hasattr(type(part), "update_and_allocate"):
                part.update_and_allocate(global_step)

    def forget(self, adapter_name: str) -> None:
        """Drop what the adapter's method keeps for it."""
        if (config := self.peft_config[adapter_name]).peft_type in PEFT_TYPE_TO_TUNER_MAPPING:
            self._part(config).forget(adapter_name)

    def _acting(self) -> Iterator[BaseTuner]:
        """The tuners of the methods of active adapters."""
        acting = behind(self.model, self.active_adapters)
        for method, part in self.__dict__.get("_parts", {}).items():
            part.active_adapter = [n for n in acting if self.peft_config[n].peft_type == method]
            if part.active_adapter:
                yield part

    def _part(self, config: Any) -> BaseTuner:
        """The method's tuner over the same model and configs, without an adapter of its own."""
        parts = self.__dict__.setdefault("_parts", {})
        if config.peft_type not in parts:
            cls = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
            part = cls.__new__(cls)
            nn.Module.__init__(part)
            part.__dict__.update(peft_config=self.peft_config, active_adapter=[])
            part.__dict__["model"] = self.model
            parts[config.peft_type] = part
        return parts[config.peft_type]

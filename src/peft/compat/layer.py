"""What others call, read or set on adapted layers."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import nn

from peft.compat.asked import Asked, is_theirs
from peft.compat.by_hand import with_given
from peft.compat.quantization import QuantizationBackend, resolve_quantization_backend
from peft.core.layer.buffers import BufferDict
from peft.core.layer.placement import settle
from peft.core.layer.rows import require_unmerged
from peft.errors import PeftWarning


class LayerCompat:
    """What others call, read or set on adapted layers; a mixin of ``BaseTunerLayer``."""

    _modules: dict[str, Any]
    adapter_cls: ClassVar[Any]
    adapters: dict[str, Any]
    cast_input_dtype_enabled: bool
    get_base_layer: Any
    kind: Any
    merge: Any
    merged_adapters: list[str]
    storage: Any
    unmerge: Any

    def _get_name(self) -> str:
        """How a printed model and a status report name the layer: method and class, ``"lora.Linear"``."""
        package, _, method = type(self).__module__.partition("peft.tuners.")
        known = method and not package
        name = type(self).__name__
        return self.adapter_cls.printed_as or (f"{method.partition('.')[0]}.{name}" if known else name)

    @Asked
    def fan_in_fan_out(self) -> bool:
        """Whether the base keeps its weight ``[in, out]``. Layers of third parties (ipex-llm) set it."""
        kind = getattr(self, "kind", None)
        return bool(kind is not None and kind.fan_in_fan_out)

    @Asked
    def quantization_backend(self) -> QuantizationBackend | None:
        """What reads and writes the base's weight if it is quantised, else None. Status reports of others show it."""
        return None if isinstance(self, type) else resolve_quantization_backend(self.get_base_layer())

    @Asked
    def frozen_peft_weight_names(self) -> dict[str, set[str]]:
        """Adapter -> names of its tensors that never train, where it has some."""
        held = {} if isinstance(self, type) else {n: m for n, m in self._modules.items() if isinstance(m, BufferDict)}
        names = sorted({adapter for container in held.values() for adapter in container})
        return {adapter: {name for name, container in held.items() if adapter in container} for adapter in names}

    @Asked
    def is_target_conv_1d_layer(self) -> bool:
        """Whether the base is a ``Conv1D`` of transformers."""
        return not isinstance(self, type) and type(self.get_base_layer()).__name__ == "Conv1D"

    ephemeral_gpu_offload = False
    """Whether a start moves the base to a GPU for a while: none does here, all compute where the weight is."""

    @Asked
    def parameter_name(self) -> str | None:
        """The attribute of the base layer that the adapters adapt; None where that is the whole layer."""
        return None if isinstance(self, type) else self.kind.weight or None

    def first_adapter(self, name: str, config: Any, given: dict[str, Any]) -> None:
        """The adapter that a layer is made with; another ``update_layer`` than the method's makes it itself."""
        key = given.get("current_key", "")
        theirs: Any = getattr(type(self), "update_layer", None)
        if not is_theirs(theirs):
            self.add_adapter(name, config, key)  # type: ignore[attr-defined]
        else:
            self.__dict__["key"] = key
            theirs(self, name, config.r, lora_alpha=config.lora_alpha, config=config)

    def update_layer(self, adapter_name: str, *args: Any, config: Any = None, **kwargs: Any) -> None:
        """Give the layer an adapter, as ``lora.Linear(base, adapter_name, config, ...)`` does. A name of 0.21."""
        self.add_adapter(adapter_name, with_given(type(self), config, args, kwargs), self.key)  # type: ignore[attr-defined]
        self.set_adapter(self.active_adapters or [adapter_name])  # type: ignore[attr-defined]

    def get_param(self) -> torch.Tensor:
        """The tensor of the base layer that the adapters adapt, as it is kept."""
        return getattr(self.get_base_layer(), self.kind.weight)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base layer, with adapters (default: the active ones) in its weight if ``merge``."""
        if merge:
            self.merge(safe_merge, adapter_names)
        else:
            self.unmerge()
        return self.get_base_layer()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters; of a method without any, say so. diffusers asks every layer."""
        if scale != 1:
            warnings.warn(f"adapters of {self._get_name()} have no scale, and act as they are.", PeftWarning)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters; None brings back the initial ones."""
        self.scale_layer(1.0 if scale is None else scale)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the scale of an adapter ``scale`` times its initial one."""
        self.scale_layer(scale if adapter in self.adapters else 1.0)

    def get_base_weight(self) -> torch.Tensor:
        """The dense base weight, in the layout of the base layer."""
        return self.storage.read(self.get_base_layer(), self.kind.weight)

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Write a dense weight into the base layer, quantised where that is."""
        self.storage.write(self.get_base_layer(), self.kind.weight, weight_data)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether what an adapter does here is a weight that can be factored into a LoRA."""
        return adapter_name in self.adapters and not self.adapters[adapter_name].unmergeable()

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError for ``adapter_names`` that do not fit. Forwards that unsloth and others put in call it."""
        names = kwargs.get("adapter_names")
        if names is None:
            return
        if len(x) != len(names):
            raise ValueError(f"adapter_names has {len(names)} entries and the batch {len(x)} rows: give one for each.")
        require_unmerged(self)  # type: ignore[arg-type]

    def _mixed_batch_forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Any:
        """The forward with one adapter for each row. No caller is known: a name of 0.21."""
        return self(x, *args, adapter_names=adapter_names, **kwargs)  # type: ignore[operator]

    def _cast_input_dtype(self, x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """x in the dtype of an adapter. Layers derived from LoraLayer call it, such as ipex-llm's."""
        if x is None or not self.cast_input_dtype_enabled or x.dtype == dtype:  # type: ignore[attr-defined]
            return x
        return x.to(dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Put an adapter's parts on a device, by default that of the base and in its dtype.

        No caller is known: a name of 0.21.
        """
        if device is None or device.type != "meta":
            settle(self, self.adapters[adapter_name], device)  # type: ignore[arg-type]

    def _get_available_adapters(self) -> set[str]:
        """The adapters that this layer has. No caller is known: a name of 0.21."""
        return set(self.adapter_names)  # type: ignore[attr-defined]

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An adapter's tensors here by their names in a file, taken from a state dict of this module."""
        return {saved: state_dict[memory] for saved, memory in self.adapter_state_dict_load_map(adapter_name).items()}  # type: ignore[attr-defined]

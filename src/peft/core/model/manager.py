"""The life of a model's adapters, whatever they are: parts of its layers, or prompts that stand beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import nn

from peft.core.layer.switch import Switch
from peft.core.model import operations
from peft.core.model.gradient_checkpointing import stop_watching, watch_checkpointing
from peft.core.model.record import drop_record
from peft.core.model.walk import surveyed
from peft.errors import AdapterNameError


INTERFACE = (
    "active_adapter", "active_adapters", "add_weighted_adapter", "delete_adapter", "disable_adapter_layers",
    "enable_adapter_layers", "get_model_config", "inject_adapter", "merge_adapter", "merge_and_unload", "model",
    "peft_config", "prefix", "set_adapter", "set_requires_grad", "supports_lora_conversion", "target_module_mapping",
    "tuner_layer_cls", "unload", "unmerge_adapter", "word_embeddings",
)  # fmt: skip
"""What users and other libraries ask a manager for; any other name belongs to the base model if it has it."""


class Manager:
    """What the managers of all methods have in common.

    Attributes:
        model: the base model, with the adapters in it.
        peft_config: adapter name -> config.
        active_adapter: the adapters that act, as :meth:`set_adapter` got them: one name or a list; a list from the
            start, and after one was deleted.
        mixes: whether its adapters may be of different methods.
        MEANINGLESS: operations that mean nothing for the method -> why, and what to do instead.
    """

    MEANINGLESS: ClassVar[dict[str, str]] = {}
    mixes: ClassVar[bool] = False

    model: nn.Module
    peft_config: dict[str, Any]
    active_adapter: str | list[str]

    def start(self, model: nn.Module, configs: dict[str, Any], adapter_name: str, *options: Any) -> None:
        """Take a model over, with a first adapter; ``options`` are those of ``inject_adapter``."""
        self.model, self.peft_config, self.active_adapter = model, configs, adapter_name
        self.inject_adapter(model, adapter_name, *options)
        self.set_adapter([adapter_name], inference_mode=configs[adapter_name].inference_mode)
        model.peft_config = configs  # type: ignore[assignment]  # a further manager of the model learns of them here
        watch_checkpointing(model)

    def take_task(self, task: Any) -> None:
        """Learn what the model is for; of no account where adapters change nothing of its inputs."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *options: Any) -> None:
        """Give the model an adapter, inactive and frozen, from ``self.peft_config[adapter_name]``."""
        raise NotImplementedError

    def beside(self) -> Sequence[Switch]:
        """What holds adapters beside the model's modules: prompts."""
        return ()

    @property
    def active_adapters(self) -> list[str]:
        return operations.names_of(self.active_adapter)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one or several adapters active, and the only ones that train (none in ``inference_mode``).

        Raises:
            ValueError: for an unknown adapter, and for several that cannot be active together.
        """
        names = operations.names_of(adapter_name)
        operations.require_adapters(self.model, names, self.peft_config)
        for switch in self.beside():
            switch.check_active_rows(names)
        operations.set_adapter(self.model, adapter_name, inference_mode, known=self.peft_config)
        for switch in self.beside():
            switch.set_adapter(names, inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Choose whether these adapters train, active or not."""
        operations.require_adapters(self.model, operations.names_of(adapter_names), self.peft_config)
        operations.set_requires_grad(self.model, adapter_names, requires_grad)
        for switch in self.beside():
            switch.set_requires_grad(adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again."""
        operations.enable_adapters(self.model, True)
        for switch in self.beside():
            switch.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: the model is its base."""
        operations.enable_adapters(self.model, False)
        for switch in self.beside():
            switch.enable_adapters(False)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """A context in which the model is its base."""
        before = [(switch, not switch.disable_adapters) for switch in self.beside()]
        with operations.adapters_disabled(self.model):
            for switch, _ in before:
                switch.enable_adapters(False)
            try:
                yield
            finally:
                for switch, enabled in before:
                    switch.enable_adapters(enabled)

    @surveyed()
    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, another becomes active.

        Raises:
            ValueError: if there is no such adapter, or it is merged somewhere.
        """
        operations.require_adapters(self.model, [adapter_name], self.peft_config)
        operations.require_unmerged(self.model, adapter_name)
        active = operations.active_of(self.model) or self.active_adapters
        operations.remove(self.model, adapter_name)
        for switch in self.beside():
            switch.delete_adapter(adapter_name)
        self.forget(adapter_name)
        del self.peft_config[adapter_name]
        left = [name for name in active if name != adapter_name]
        if adapter_name in active and not left and self.peft_config:
            held = self.peft_config.keys() & operations.adapters_of(self.model)
            other = min(held, default=next(iter(self.peft_config)))
            warnings.warn(f"adapter {adapter_name!r} was active; {other!r} is active now.")
            self.set_adapter([other])
        elif adapter_name in self.active_adapters:
            self.active_adapter = left

    def forget(self, adapter_name: str) -> None:
        """Drop what else is kept for an adapter; called when that is deleted."""

    def unload(self) -> nn.Module:
        """Take all adapters out, unmerged, and return the plain model, changed in place."""
        return self._leave(operations.unload(self.model, merge_first=False))

    def _leave(self, plain: nn.Module) -> nn.Module:
        """Take back what a manager notes at its model, of which the plain one is left."""
        stop_watching(self.model)
        self.model.__dict__.pop("peft_config", None)
        drop_record(self.model)
        return plain


def check_adapter_name(name: str, taken: Sequence[str] = ()) -> None:
    """Raise AdapterNameError for a name that cannot be a module name, or that is taken."""
    if not isinstance(name, str):
        raise AdapterNameError(
            f"{repr(name)[:40]} cannot be the name of an adapter: names are strings. In add_adapter the name comes "
            "before the config, in get_peft_model after it."
        )
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise AdapterNameError(
            f"{name!r} cannot be the name of an adapter: names are non-empty, have no dot, and are not those of "
            "what an nn.ModuleDict has (such as 'keys' or 'training')."
        )
    if name in taken:
        raise AdapterNameError(
            f"an adapter called {name!r} already exists; choose another name, or call delete_adapter({name!r}) first."
        )

"""What others call on tuners, or override there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

from torch import nn

from peft.compat import new_layer
from peft.compat.asked import Asked
from peft.config import PeftConfig, resolve_pattern
from peft.core.model import operations
from peft.core.model.record import context_of
from peft.core.model.targeting import module_target, selected
from peft.core.model.walk import locate, parent_of, put_module, replace_module, walk


class TunerCompat:
    """What others call on tuners, or override there; a mixin of ``BaseTuner``."""

    layer_cls: ClassVar[Any]
    model: Any

    @Asked
    def uses_shared_state(self) -> bool:
        """Whether layers of this method have tensors in common."""
        return bool(self.layer_cls.adapter_cls.common)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        """Whether a config targets the module of this name. No caller is known: a name of 0.21."""
        return bool(selected(peft_config, key))

    @classmethod
    def _create_new_module(cls, peft_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        """An adapted layer around ``target``. Others replace it, such as ipex-llm, for layers of their own."""
        return new_layer(cls.layer_cls, target, adapter_name, peft_config, kwargs.get("current_key", ""))

    def made_elsewhere(self, peft_config: Any) -> Callable[[nn.Module], bool]:
        """Says of a module whether somebody else may make the layer around it: by a class registered in the config
        (``_register_custom_module``), by a replaced :meth:`_create_new_module` or :meth:`_create_and_replace`."""
        registered = tuple(getattr(peft_config, "_custom_modules", None) or ())
        replaced = self._replaced("_create_new_module", "_create_and_replace")
        return lambda target: replaced or isinstance(target, registered)

    def _replaced(self, *names: str) -> bool:
        """Whether one of these methods is not the one below."""
        return any(_function(type(self), name) is not _function(TunerCompat, name) for name in names)

    def make_elsewhere(self, peft_config: Any, adapter_name: str, target: Any, holders: Any) -> Any:
        """The layer around a target as somebody else makes it, with the adapter in it; None where nobody does."""
        registered = getattr(peft_config, "_custom_modules", None) or {}
        layer_cls = next((own for cls, own in registered.items() if isinstance(target.module, cls)), None)
        if layer_cls is None and not self._replaced("_create_new_module"):
            return None
        site = locate(self.model, target.key)
        if site.wrappers:
            return None
        if layer_cls is not None:
            layer: Any = layer_cls(target.module, adapter_name, config=peft_config, **options(peft_config, target.key))
        else:
            layer = self._create_new_module(
                peft_config, adapter_name, target.module, **options(peft_config, target.key)
            )
        layer.context = context_of(self.model)
        layer.__dict__["key"] = target.key
        replace_module(self.model, site.path, layer, holders)
        return layer

    def give(self, layer: Any, adapter_name: str, peft_config: Any, key: str) -> None:
        """Give a layer an adapter: by its own ``update_layer`` where a third party's class has one."""
        theirs = getattr(type(layer), "update_layer", None)
        if theirs is getattr(self.layer_cls, "update_layer", None):
            layer.add_adapter(adapter_name, peft_config, key)
            return
        known = options(peft_config, key)
        layer.update_layer(adapter_name, known["r"], lora_alpha=known["lora_alpha"], config=peft_config)

    def redirected(self, peft_config: Any, model: nn.Module, targets: list[Any]) -> list[Any]:
        """The targets that a replaced :meth:`_create_and_replace` hands on, or others in their place.

        Raises:
            ValueError: if one that it hands on cannot be adapted.
        """
        if not self._replaced("_create_and_replace"):
            return targets
        self.__dict__["_handed_on"] = []
        for target in targets:
            parent, name = parent_of(model, locate(model, target.key).path)
            self._create_and_replace(peft_config, "", target.module, name, parent, current_key=target.key)
        handed = [id(module) for module in self.__dict__.pop("_handed_on")]
        sites = {id(site.module): site for site in walk(model)}
        return [module_target(peft_config, sites[module], self.layer_cls) for module in handed]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put an adapted layer in the place of ``child``, on its device. No caller is known: a name of 0.21."""
        put_module(parent, child_name, new_module)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str = "",
        **kwargs: Any,
    ) -> None:
        """Give one module an adapter. Others replace it, such as ms-swift, to leave modules out."""
        if "_handed_on" in self.__dict__:  # an injection asks a replaced one what it would adapt
            self.__dict__["_handed_on"].append(target)
            return
        if isinstance(target, self.layer_cls):
            target.add_adapter(adapter_name, peft_config, current_key)
            return
        self._replace_module(
            parent, target_name, self._create_new_module(peft_config, adapter_name, target, **kwargs), target
        )

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze the base; the active adapters train. No caller is known: a name of 0.21."""
        model.requires_grad_(False)
        operations.set_requires_grad(model, operations.active_of(model), True)


def _function(cls: type, name: str) -> Any:
    """What a class has under a name, without the class that class methods are bound to."""
    found = getattr(cls, name)
    return getattr(found, "__func__", found)


def options(peft_config: Any, key: str) -> dict[str, Any]:
    """What is told, beside the config, to those who make layers of their own: its fields for this module."""
    names = {field.name for field in fields(peft_config)} - {field.name for field in fields(PeftConfig)}
    found = {name: getattr(peft_config, name) for name in names}
    for pattern, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"), ("alpha_pattern", "alpha")):
        if name in found and found.get(pattern):
            found[name] = resolve_pattern(found[pattern], key, found[name])
    return {**found, "current_key": key, "target_name": key.rpartition(".")[2]}

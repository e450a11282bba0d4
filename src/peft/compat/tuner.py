"""What others call on tuners, or override there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar

from torch import nn

from peft.compat import new_layer
from peft.compat.asked import Asked, is_theirs
from peft.compat.foreign import Held, containers
from peft.config import PeftConfig, resolve_pattern
from peft.core.base.kinds import innermost
from peft.core.base.stack import Stack
from peft.core.layer.classes import is_own
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model import operations
from peft.core.model.record import context_of
from peft.core.model.targeting import Target, module_target, parameter_target, parameter_targets, selected
from peft.core.model.walk import join, layers_of, locate, parent_of, put_module, replace_module, walk


class TunerCompat:
    """What others call on tuners, or override there; a mixin of ``BaseTuner``."""

    layer_cls: ClassVar[Any] = BaseTunerLayer
    model: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "tuner_layer_cls" in vars(cls):  # by this name methods of third parties give the class of their layers
            cls.layer_cls = vars(cls)["tuner_layer_cls"]

    def start(self, model: nn.Module, configs: dict[str, Any], adapter_name: str, *options: Any) -> None:
        super().start(model, configs, adapter_name, *options)  # type: ignore[misc]
        if self._replaced("_mark_only_adapters_as_trainable"):
            self._mark_only_adapters_as_trainable(model)

    def widens(self, adapter_name: str, autocast_adapter_dtype: bool) -> bool:
        """Whether a new adapter is to be held in float32; a replaced :meth:`_cast_adapter_dtype` has done what it
        thinks right."""
        if not self._replaced("_cast_adapter_dtype"):
            return autocast_adapter_dtype
        self._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        return False

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Hold an adapter in float32 where it is in a 16-bit dtype. Others replace it, such as ms-swift, to keep a
        dtype of their own."""
        operations.cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    @Asked
    def uses_shared_state(self) -> bool:
        """Whether layers of this method have tensors in common."""
        return bool(self.layer_cls.adapter_cls.common)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        """Whether a config targets the module of this name. Others replace it, to choose by rules of their own."""
        return bool(selected(peft_config, key))

    @classmethod
    def _create_new_module(cls, peft_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        """An adapted layer around ``target``. Others replace it, such as ipex-llm, for layers of their own.

        Args:
            kwargs: fields of the config as they are for this module, as :func:`options` gives them.
        """
        return new_layer(cls.layer_cls, target, adapter_name, peft_config, **kwargs)

    @staticmethod
    def _prepare_adapter_config(peft_config: Any, model_config: Any) -> Any:
        """Settle what a config leaves open before targets are looked for. Methods of third parties write one."""
        return peft_config

    def prepared(self, peft_config: Any, model: nn.Module) -> None:
        """Let a replaced :meth:`_prepare_adapter_config` have its say; it may give back another config."""
        if self._replaced("_prepare_adapter_config"):
            described = getattr(model, "config", {"model_type": "custom"})
            as_dict = described if isinstance(described, dict) else described.to_dict()
            given = self._prepare_adapter_config(peft_config, as_dict)
            if given is not None and given is not peft_config:
                vars(peft_config).update(vars(given))

    def chosen(self, peft_config: Any, model: nn.Module) -> list[Any] | None:
        """The targets by a replaced :meth:`_check_target_module_exists`; None where it is the one here."""
        if not self._replaced("_check_target_module_exists"):
            return None
        elsewhere = self.made_elsewhere(peft_config)
        found = []
        for site in walk(model):
            if site.key and self._check_target_module_exists(peft_config, site.key):
                own = not elsewhere(site.module)
                found.append(
                    module_target(peft_config, site, self.layer_cls) if own else Target(site.key, site.module)
                )
        return found

    def made_elsewhere(self, peft_config: Any) -> Callable[[nn.Module], bool]:
        """Says of a module whether somebody else may make the layer around it: by a class registered in the config
        (``_register_custom_module``), by a replaced :meth:`_create_new_module` or :meth:`_create_and_replace`."""
        registered = tuple(getattr(peft_config, "_custom_modules", None) or ())
        replaced = self._replaced("_create_new_module", "_create_and_replace") or self._built_by_others
        return lambda target: replaced or isinstance(target, registered)

    @property
    def _built_by_others(self) -> bool:
        """Whether somebody has put a constructor of their own into a class of this method's layers."""
        classes = (self.layer_cls, *self.layer_cls.by_name.values())
        return any(is_theirs(vars(cls).get("__init__")) for cls in classes)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer's update is a weight that can be factored into a LoRA."""
        layers = [layer for _, layer in layers_of(self.model) if adapter_name in layer]
        adapters = [layer.adapters[adapter_name] for layer in layers]
        return bool(adapters) and not any(adapter.any_module or adapter.unmergeable() for adapter in adapters)

    def _replaced(self, *names: str) -> bool:
        """Whether one of these methods is somebody else's."""
        return any(is_theirs(getattr(type(self), name)) for name in names)

    def make_elsewhere(self, peft_config: Any, adapter_name: str, target: Any, holders: Any) -> Any:
        """The layer around a target as somebody else makes it, with the adapter in it; None where nobody does."""
        registered = getattr(peft_config, "_custom_modules", None) or {}
        layer_cls = next((own for cls, own in registered.items() if isinstance(target.module, cls)), None)
        if layer_cls is None and not (self._replaced("_create_new_module") or self._built_by_others):
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
        replace_module(self.model, site.path, layer, holders)
        self._taken_in(layer, adapter_name, target.key)
        return layer

    def put_by_others(self, model: nn.Module, keys: list[str]) -> None:
        """Let a replaced :meth:`_replace_module` have its say about new layers, which are in their places."""
        for key in keys if self._replaced("_replace_module") else ():
            site = locate(model, key)
            path, layer = next(((p, w) for p, w in site.wrappers if isinstance(w, BaseTunerLayer)), (site.path, None))
            parent, name = parent_of(model, path)
            self._replace_module(parent, name, layer or parent._modules[name], site.module)

    def give(self, layer: Any, adapter_name: str, peft_config: Any, key: str) -> None:
        """Give a layer an adapter: by its own ``update_layer`` where a third party's class has one."""
        if not is_theirs(getattr(type(layer), "update_layer", None)):
            layer.add_adapter(adapter_name, peft_config, key)
            return
        known = options(peft_config, key)
        given = {name: known[name] for name in ("lora_alpha", "alpha") if name in known}
        layer.update_layer(adapter_name, *([known["r"]] if "r" in known else ()), **given, config=peft_config)
        self._taken_in(layer, adapter_name, key)

    def redirected(self, peft_config: Any, adapter_name: str, model: nn.Module, targets: list[Any]) -> list[Any]:
        """The targets that a replaced :meth:`_create_and_replace` hands on, or others in their place.

        It may also make layers of its own and put them in place, which are then left as they are; and hand a target on
        with a config of its own, such as one of another rank.

        Raises:
            ValueError: if one that it hands on cannot be adapted.
        """
        parameters = bool(getattr(peft_config, "target_parameters", None)) and self._replaced("_inject_parameters")
        if not parameters and not self._replaced("_create_and_replace"):
            return targets
        handed: list[tuple[nn.Module, Any, str | None]] = []
        self.__dict__["_handed_on"] = handed
        try:
            if parameters:
                self._inject_parameters(peft_config, model, adapter_name, False)
                targets = [target for target in targets if not isinstance(target.kind, Stack)]
            if not self._replaced("_create_and_replace"):
                handed += [(target.module, peft_config, None) for target in targets]
                targets = []
            for target in targets:
                site = locate(model, target.key)
                parent, name = parent_of(model, site.wrappers[0][0] if site.wrappers else site.path)
                outermost: Any = parent._modules[name]
                self._create_and_replace(peft_config, adapter_name, outermost, name, parent, current_key=target.key)
                self._taken_in(parent._modules[name], adapter_name, target.key)
        finally:
            del self.__dict__["_handed_on"]
        sites = {id(site.module): site for site in walk(model)}
        found = []
        for module, config, parameter in handed:
            site = sites[id(innermost(module))]
            if parameter is not None:
                target = parameter_target(site, parameter, join(site.key, parameter))
            else:
                target = module_target(config, site, self.layer_cls)
            found.append(target if config is peft_config else dataclasses.replace(target, config=config))
        return found

    def _taken_in(self, layer: Any, adapter_name: str, key: str) -> None:
        """Tell a layer that somebody else has made, or filled, where it is; know of an adapter in its containers."""
        if isinstance(layer, BaseTunerLayer):
            layer.context = context_of(self.model)
            layer.__dict__["key"] = key
            if adapter_name not in layer.adapters:
                if any(adapter_name in holder for _, holder in containers(layer, layer.adapter_layer_names)):
                    cls = Held if layer.kind.whole else layer.adapter_cls
                    layer.adapters[adapter_name] = cls(layer, adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put an adapted layer in the place of ``child``. Others extend it, to let parts of their layers train."""
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
            self.__dict__["_handed_on"].append((target, peft_config, kwargs.get("parameter_name")))
            return
        if is_own(target, self.layer_cls):
            target.add_adapter(adapter_name, peft_config, current_key)
            return
        self._replace_module(
            parent, target_name, self._create_new_module(peft_config, adapter_name, target, **kwargs), target
        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **options: Any,
    ) -> nn.Module:
        """The plain model, with adapters in its weights if ``merge``. Others replace it, such as unsloth."""
        return operations.unload(self.model, merge, adapter_names, safe_merge, progressbar, **options)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Adapt the parameters that ``target_parameters`` names, and give their names. Others replace it, such as
        axolotl, to choose by rules of their own; they hand each to :meth:`_create_and_replace`."""
        found = []
        for site in list(walk(model)):
            for target in parameter_targets(peft_config, site, [site.key]):
                parent, name = parent_of(model, site.path)
                found.append(join(site.key, target.kind.weight))
                self._create_and_replace(
                    peft_config,
                    adapter_name,
                    site.module,
                    name,
                    parent,
                    current_key=found[-1],
                    parameter_name=target.kind.weight,
                )
        return found

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Nothing more to check here: a target that cannot be adapted is refused where it is found. Copies of
        0.21's injection call it, axolotl's among them."""

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze the base; the active adapters train. Others replace it, to let more of the model train."""
        model.requires_grad_(False)
        operations.set_requires_grad(model, operations.active_of(model), True)


def options(peft_config: Any, key: str) -> dict[str, Any]:
    """What is told, beside the config, to those who make layers of their own: its fields for this module."""
    names = {field.name for field in fields(peft_config)} - {field.name for field in fields(PeftConfig)}
    found = {name: getattr(peft_config, name) for name in names}
    for pattern, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"), ("alpha_pattern", "alpha")):
        if name in found and found.get(pattern):
            found[name] = resolve_pattern(found[pattern], key, found[name])
    return {**found, "current_key": key, "target_name": key.rpartition(".")[2]}

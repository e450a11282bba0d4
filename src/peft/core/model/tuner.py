"""A whole model: find the targets, wrap them, share what is shared, fill in the adapter's parts."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from peft.core.base.kinds import READERS, Kind, Stack
from peft.core.base.storage import storage_of
from peft.core.families.families import CopyLayer
from peft.core.filling import no_collection
from peft.core.layer.buffers import BufferDict
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model import operations
from peft.core.model.auxiliary import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    TrainedBiases,
    bias_sites,
    biases_of,
    tied_sites,
)
from peft.core.model.context import Context
from peft.core.model.gradient_checkpointing import stop_watching, watch_checkpointing
from peft.core.model.replicate import replicate_layers, restore_layers
from peft.core.model.targeting import Target, find_targets, matches, resolve_targets
from peft.core.model.walk import Site, embeddings_of, layers_of, locate, parent_of, put_module, replace_module, walk


# Heads that task classes add to modules_to_save by themselves; that a model lacks some of them is no mistake.
TASK_HEADS = ("classifier", "score", "qa_outputs")


def context_of(model: nn.Module) -> Context:
    """The object through which all adapted layers of a model learn about the current call."""
    context = model.__dict__.get("_peft_context")
    if context is None:
        context = model.__dict__["_peft_context"] = Context()
        context.hook = model.register_forward_pre_hook(context.forget, with_kwargs=True)
    return context


def drop_context(model: nn.Module) -> None:
    """Take the object and its hook away from a model that has no adapters any more."""
    if "_peft_context" in model.__dict__:
        model.__dict__.pop("_peft_context").hook.remove()


class BaseTuner(nn.Module):
    """Applies one method to a model, and manages its adapters there.

    Args:
        model: the model to adapt; changed in place.
        peft_config: the config of the first adapter, or a dict of adapter name -> config.
        adapter_name: name of the first adapter.
        low_cpu_mem_usage: allocate nothing: parts are on the meta device until a checkpoint is loaded.
        state_dict: adapt the modules that this checkpoint has tensors for, whatever ``target_modules`` says.

    Attributes:
        layer_cls: the method's layer. prefix: what its tensors' names start with.
        target_module_mapping: default targets by ``model_type``.
        default_roles: what the layers adapted by default do in models that the table does not know, see
            :mod:`peft.core.model.roles`; "linear": all linear layers.
    """

    layer_cls: ClassVar[type[BaseTunerLayer]]
    prefix: ClassVar[str] = ""
    target_module_mapping: ClassVar[dict[str, Any]] = {}
    default_roles: ClassVar[tuple[str, ...]] = ("query", "value")

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        before = dict(getattr(model, "peft_config", None) or {})
        self.model = model
        self.peft_config: dict[str, Any] = {**before, **configs}
        self.active_adapter: str | list[str] = adapter_name
        self.inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        self.set_adapter(adapter_name, inference_mode=self.peft_config[adapter_name].inference_mode)
        model.peft_config = self.peft_config
        watch_checkpointing(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.finish(self.model(*args, **kwargs))

    def finish(self, outputs: Any) -> Any:
        """What the method makes of the model's outputs: one with a term of its own in the loss adds it here."""
        return outputs

    def forget(self, adapter_name: str) -> None:
        """Drop what the method keeps in the tuner for an adapter; called when that is deleted."""

    # --- injection --------------------------------------------------------------------------------------------
    @no_collection()
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Give the model an adapter, inactive and frozen, from ``self.peft_config[adapter_name]``.

        Raises:
            ValueError: if the config does not fit the model; the model is unchanged.
        """
        config = self.peft_config[adapter_name]
        check_adapter_name(adapter_name, operations.adapters_of(model))
        layer_map = getattr(config, "layer_replication", None)
        replicated = replicate_layers(model, layer_map) if layer_map else False
        try:
            keys = None if state_dict is None else keys_of(model, state_dict, self.layer_cls)
            self.prepare_config(config, model, keys)
            targets = self.targets_of(config, model)
            if hasattr(config, "fan_in_fan_out"):  # the layers tell; the field is for other readers of the file
                config.fan_in_fan_out = any(target.kind and target.kind.fan_in_fan_out for target in targets)
            with torch.device("meta") if low_cpu_mem_usage else nullcontext():
                layers = [(target, self._layer_for(model, target)) for target in targets]
                self._share(adapter_name, config, [layer for _, layer in layers])
                self._fill(model, adapter_name, config, layers)
                add_auxiliary(model, adapter_name, config)
        except Exception:
            self._take_back(model, adapter_name)
            if replicated:
                restore_layers(model)
            raise
        operations.settle(model, adapter_name, autocast_adapter_dtype)

    def prepare_config(self, config: Any, model: nn.Module, keys: set[str] | None) -> None:
        """Settle what the config leaves open: its targets in this model."""
        resolve_targets(config, model, self.target_module_mapping, keys, self.default_roles)

    def targets_of(self, config: Any, model: nn.Module) -> list[Target]:
        """The modules to adapt."""
        return find_targets(config, model, self.layer_cls, set(getattr(config, "modules_to_save", None) or ()))

    def _layer_for(self, model: nn.Module, target: Target) -> BaseTunerLayer:
        """The tuner layer around a target: the one that is there, or a new one."""
        site = locate(model, target.key)
        around = [(path, w) for path, w in site.wrappers if isinstance(w, BaseTunerLayer)]
        for _, wrapper in around:
            same_weight = target.kind is None or wrapper.kind.weight == target.kind.weight
            if isinstance(wrapper, self.layer_cls) and same_weight:
                return wrapper
        path = around[0][0] if around else site.path
        if isinstance(target.kind, Stack):  # wrappers of several parameters nest in the order of registration
            order = list(site.module._parameters)
            inside = [p for p, w in around if order.index(w.kind.weight) < order.index(target.kind.weight)]
            path = inside[0] if inside else site.path
        cls = self._class_for(target.kind, site.module)
        parent, name = parent_of(model, path)
        layer = cls(getattr(parent, name), kind=target.kind, context=context_of(model))
        layer.__dict__["key"] = target.key
        if isinstance(parent, READERS):
            layer.read_by_parent = True
        put_module(parent, name, layer)
        return layer

    def _class_for(self, kind: Kind | None, module: nn.Module) -> type[BaseTunerLayer]:
        if kind is None:
            return self.layer_cls
        name = storage_of(module, kind.weight).layer_name or kind.name
        return self.layer_cls.by_name.get(name, self.layer_cls)

    def _share(self, name: str, config: Any, layers: list[BaseTunerLayer]) -> None:
        """Make what layers share; an adapter that needs the same frozen tensors as another uses those."""
        with torch.device("cpu"):
            common = self.layer_cls.share(config, layers)
        device = next((p.device for p in self.model.parameters() if p.device.type != "meta"), None)
        for attribute, value in common.items():
            if isinstance(value, list):
                for layer, part in zip(layers, value):
                    layer.put(name, **{attribute: part})
                continue
            container = self._container_of(attribute, value, getattr(config, "save_projection", True))
            if isinstance(value, nn.Parameter):
                value = nn.Parameter(value.detach().to(*layers[0].place_for(value)))
            elif isinstance(value, nn.Module):
                place, dtype = layers[0].place_for(value)
                value.to(place, dtype if any(True for _ in value.parameters()) else None)  # frozen: as exact as made
            else:
                held = (t for t in container.values() if t.shape == value.shape and torch.equal(t.cpu(), value))
                value = next(held, value).to(device)
            container[name] = value
            for layer in layers:
                holder = layer.__dict__ if isinstance(container, BufferDict) else layer._modules
                holder[attribute] = container

    def _container_of(self, attribute: str, value: Any, persistent: bool) -> Any:
        """Where the shared tensors called ``attribute`` are kept: with the tuner, and known to every layer."""
        if not hasattr(self, attribute):
            there = (getattr(x, attribute, None) for _, x in layers_of(self.model) if isinstance(x, self.layer_cls))
            container = next((found for found in there if found is not None), None)
            if container is None and isinstance(value, nn.Module):
                container = nn.ModuleDict()
            elif container is None:
                container = nn.ParameterDict() if isinstance(value, nn.Parameter) else BufferDict(None, persistent)
            setattr(self, attribute, container)
        return getattr(self, attribute)

    def _fill(self, model: nn.Module, name: str, config: Any, layers: list[tuple[Target, BaseTunerLayer]]) -> None:
        for target, layer in layers:
            if target.tied_to is not None:
                source = locate(model, target.tied_to)
                layer.tied_to[name] = next(w for _, w in source.wrappers if isinstance(w, self.layer_cls))
            key = target.key
            if isinstance(target.kind, Stack):
                key = f"{key}.{target.kind.weight}" if key else target.kind.weight
            layer.add_adapter(name, config, key)

    def _take_back(self, model: nn.Module, name: str) -> None:
        """Undo an injection that failed half way."""
        operations.remove(model, name)
        if not operations.adapters_of(model):
            drop_context(model)
        for attribute in self.layer_cls.shared:
            if name in getattr(self, attribute, ()):
                del getattr(self, attribute)[name]

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        """What an adapter has beside its layers: name in the file, name in the :class:`PeftModel`, tensor."""
        return iter(())

    # --- life of the adapters ---------------------------------------------------------------------------------
    @property
    def active_adapters(self) -> list[str]:
        return operations.names_of(self.active_adapter)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one or several adapters active, and the only ones that train (none in ``inference_mode``).

        Raises:
            ValueError: for an unknown adapter, and for several that cannot be active together.
        """
        operations.require_adapters(self.model, operations.names_of(adapter_name), self.peft_config)
        operations.set_adapter(self.model, adapter_name, inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Choose whether these adapters train, active or not."""
        operations.require_adapters(self.model, operations.names_of(adapter_names), self.peft_config)
        operations.set_requires_grad(self.model, adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again."""
        operations.enable_adapters(self.model, True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: the model is its base."""
        operations.enable_adapters(self.model, False)

    def switched_off(self) -> AbstractContextManager[None]:
        """A context in which the model is its base."""
        return operations.adapters_disabled(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, another becomes active.

        Raises:
            ValueError: if there is no such adapter.
        """
        operations.require_adapters(self.model, [adapter_name], self.peft_config)
        active = operations.delete_adapter(self.model, adapter_name, self.prefix)
        self.forget(adapter_name)
        del self.peft_config[adapter_name]
        self.active_adapter = active[0] if active and len(active) == 1 else active or []

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add an adapter, inactive and frozen, that does the weighted sum of what others do.

        Raises:
            ValueError: for unknown adapters, another number of weights, a name that is taken, and where what adapters
                do is not linear in their tensors; the message says what to do instead.
        """
        from peft.core.combine.sums import add_sum

        add_sum(self, adapters, weights, adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters (default: the active ones) into the base weights; :meth:`unmerge_adapter` takes them out."""
        if adapter_names is not None:
            operations.require_adapters(self.model, adapter_names, self.peft_config)
        operations.merge(self.model, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights."""
        if not any(layer.merged for _, layer in layers_of(self.model)):
            warnings.warn("no adapter is merged; there is nothing to unmerge.")
        operations.unmerge(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge adapters (default: the active ones) and return the plain model, changed in place.

        Args:
            safe_merge: refuse results that are not finite; the model is then unchanged.
            dequantize: quantised layers that are merged come out dense, in their compute dtype, so that nothing is
                rounded to the codes of the quantisation. Without it the merged weight is quantised again.

        Raises:
            ValueError: if an adapter cannot be merged, with the reason.
        """
        if adapter_names is not None:
            operations.require_adapters(self.model, adapter_names, self.peft_config)
        return self._leave(
            operations.unload(self.model, True, adapter_names, safe_merge, progressbar, dequantize_first=dequantize)
        )

    def unload(self) -> nn.Module:
        """Take all adapters out, unmerged, and return the plain model, changed in place."""
        return self._leave(operations.unload(self.model, merge_first=False))

    def _leave(self, model: nn.Module) -> nn.Module:
        stop_watching(model)
        model.__dict__.pop("peft_config", None)
        drop_context(model)
        return model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every layer's update is a weight that can be factored into a LoRA."""
        layers = [layer for _, layer in layers_of(self.model) if adapter_name in layer]
        return bool(layers) and not any(isinstance(x, CopyLayer) or x.unmergeable(adapter_name) for x in layers)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict:
        """The model's config as a dict; ``{"model_type": "custom"}`` where it has none."""
        config = getattr(model, "config", None)
        if config is None:
            return {"model_type": "custom"}
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def check_adapter_name(name: str, taken: Sequence[str] = ()) -> None:
    """Raise ValueError for a name that cannot be a module name, or that is taken."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"{name!r} cannot be the name of an adapter: names are non-empty, have no dot, and are not those of "
            "methods of nn.ModuleDict (such as 'keys' or 'pop')."
        )
    if name in taken:
        raise ValueError(
            f"an adapter called {name!r} already exists; choose another name, or call delete_adapter({name!r}) first."
        )


def keys_of(model: nn.Module, state_dict: dict[str, Any], layer_cls: type[BaseTunerLayer]) -> set[str]:
    """Names of the modules for which a checkpoint has tensors of this method.

    Raises:
        ValueError: if it has none.
    """
    known = {site.key for site in walk(model)}
    names = "|".join(re.escape(name) for name in layer_cls.adapter_layer_names)
    found = set()
    for key in state_dict:
        split = re.match(rf"(?:base_model\.model\.)?(.+?)(?:\.base_layer)*\.(?:{names})(?:\.|$)", key)
        if split and split.group(1) in known:
            found.add(split.group(1))
    if not found:
        raise ValueError(
            f"the state dict has no tensors of {layer_cls.__name__} for modules of this model "
            f"({', '.join(list(state_dict)[:3])}, ...)."
        )
    return found


def add_auxiliary(model: nn.Module, name: str, config: Any) -> None:
    """What the config trains beside the adapted layers: whole modules, tokens, and biases."""
    if modules := getattr(config, "modules_to_save", None):
        _wrap_modules_to_save(model, name, modules, getattr(config, "ensure_weight_tying", False))
    if indices := getattr(config, "trainable_token_indices", None):
        _wrap_tokens(model, name, indices)
    mode = getattr(config, "bias", "none")
    if mode != "none":
        record = biases_of(model) or TrainedBiases()
        model.__dict__["_trained_biases"] = record
        record.add(name, list(bias_sites(model, mode, name)))


def _wrap_modules_to_save(model: nn.Module, name: str, modules: list[str], tie: bool) -> None:
    sites = list(walk(model))
    chosen: list[Site] = []
    for site in sites:
        inside = any(site.key.startswith(f"{other.key}.") for other in chosen)
        if site.key and matches(modules, site.key) and not inside:
            chosen.append(site)
    tails = {".".join(site.key.split(".")[-n:]) for site in sites for n in range(1, 9)}
    unmatched = [m for m in modules if m not in TASK_HEADS and m not in tails]
    if unmatched:
        close = [c for m in unmatched for c in difflib.get_close_matches(m, sorted(tails), n=3)]
        warnings.warn(f"these modules_to_save match nothing: {unmatched}. Closest names: {close or 'none'}.")
    for site in chosen:
        ties = tied_sites(model, site.module) if tie else []
        wrapper = _wrapper(model, site.key, ModulesToSaveWrapper)
        if name not in wrapper:
            wrapper.update(name)
        for other in ties:
            tied = _wrapper(model, other.key, ModulesToSaveWrapper)
            if name not in tied:
                tied.update(name, tied_module=wrapper)


def _wrap_tokens(model: nn.Module, name: str, indices: list[int] | dict[str, list[int]]) -> None:
    if not isinstance(indices, dict):
        embedding = embeddings_of(model)[0]
        if embedding is None:
            raise ValueError(
                f"{type(model).__name__} does not say what its input embedding is; give trainable_token_indices "
                "as a dict of module name -> indices."
            )
        indices = {next(site.key for site in walk(model) if site.module is embedding): indices}
    chosen = {}
    for target, rows in indices.items():
        sites = [site for site in walk(model) if matches([target], site.key)]
        if not sites:
            raise ValueError(f"trainable_token_indices names the module {target!r}, which the model does not have.")
        chosen.update({site.key: rows for site in sites})
    for key, rows in chosen.items():
        ties = [
            site.key
            for site in tied_sites(model, locate(model, key).module)
            if chosen.get(site.key, rows) == rows and not _has_copy(site, name)
        ]
        wrapper = _wrapper(model, key, TrainableTokensWrapper)
        if name in wrapper:
            continue
        wrapper.update(name, token_indices=rows)
        for other in ties:
            _wrapper(model, other, TrainableTokensWrapper).update(
                name, token_indices=rows, tied_adapter=wrapper.token_adapter
            )


def _has_copy(site: Site, name: str) -> bool:
    """Whether the adapter trains the whole module already."""
    return any(isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper for _, wrapper in site.wrappers)


def _wrapper(model: nn.Module, key: str, cls: type[AuxiliaryTrainingWrapper]) -> Any:
    """The auxiliary wrapper of a module: the one that is there, or a new one around everything else."""
    site = locate(model, key)
    for _, wrapper in site.wrappers:
        if isinstance(wrapper, cls):
            return wrapper
    path, module = site.wrappers[0] if site.wrappers else (site.path, site.module)
    wrapper = cls(module)
    wrapper.context = context_of(model)
    wrapper.train(module.training)
    replace_module(model, path, wrapper)
    return wrapper

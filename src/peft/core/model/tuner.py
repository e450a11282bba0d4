"""A whole model: find the targets, wrap them, share what is shared, fill in the adapter's parts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from peft.compat.tuner import TunerCompat
from peft.core.base.readers import reads_weight_of
from peft.core.base.stack import Stack
from peft.core.base.storage import weight_names
from peft.core.combine.sums import add_sum
from peft.core.files.renaming import keys_of
from peft.core.layer.classes import class_for, is_own
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.placement import place_for
from peft.core.model import operations
from peft.core.model.beside import TASK_HEADS, add_auxiliary
from peft.core.model.losses import adds_to_loss, extra_loss
from peft.core.model.manager import Manager, check_adapter_name
from peft.core.model.record import context_of, drop_record, record_of
from peft.core.model.replacing import replacing
from peft.core.model.replicate import replicate_layers, restore_layers
from peft.core.model.targeting import Target, find_targets, resolve_targets
from peft.core.model.unfilled import refuse_unfilled, values_needed
from peft.core.model.walk import (
    Holders,
    holders_of,
    layers_of,
    locate,
    names_in,
    parent_of,
    replace_at,
    surveyed,
)
from peft.usage import counts, recording


MANY = 8
"""So many layers that are slow to start are worth a progress bar."""


class BaseTuner(TunerCompat, Manager, nn.Module):
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
        options = (autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        self.start(model, {**before, **configs}, adapter_name, *options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.finished(self.model(*args, **kwargs))

    def finished(self, outputs: Any) -> Any:
        """The model's outputs; a loss among them gets :meth:`extra_loss`."""
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, torch.Tensor) and self.adds_to_loss() and (term := self.extra_loss()) is not None:
            outputs.loss = loss + term.to(loss)
        return outputs

    def extra_loss(self) -> torch.Tensor | None:
        """What adapters add to the loss of the last call, a scalar, for losses that are computed outside the model.

        AdaLoRA has such a term, and MixLoRA, which gives it once for a call in training. None if nothing is added.
        """
        return extra_loss(self.model, self.peft_config, self.active_adapters)

    def adds_to_loss(self) -> bool:
        """Whether any adapter here might: most calls do not pay for a walk over the layers."""
        return adds_to_loss(self.layer_cls.adapter_cls) or bool(context_of(self.model).compositions)

    # --- injection --------------------------------------------------------------------------------------------
    @surveyed()
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
        check_adapter_name(adapter_name)
        with replacing(model, adapter_name):
            self.place(model, adapter_name, low_cpu_mem_usage, state_dict)
        self.settle(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    def place(
        self, model: nn.Module, name: str, low_cpu_mem_usage: bool, state_dict: dict[str, torch.Tensor] | None
    ) -> None:
        """Put an adapter's parts into the model, where no part of this method has that name.

        Raises:
            ValueError: if the config does not fit the model, which then has nothing of that name.
        """
        config = self.peft_config[name]
        layer_map = getattr(config, "layer_replication", None)
        with recording(config, lambda: names_in(model), TASK_HEADS), values_needed(config):
            replicated = replicate_layers(model, layer_map) if layer_map else False
            try:
                keys = None if state_dict is None else keys_of(model, state_dict, self.layer_cls)
                self.prepare_config(config, model, keys)
                self._adapt(model, name, config, low_cpu_mem_usage)
            except BaseException:
                self._take_back(model, name)
                if replicated:
                    restore_layers(model)
                raise

    def settle(self, model: nn.Module, name: str, autocast_adapter_dtype: bool, low_cpu_mem_usage: bool) -> None:
        """What follows when an adapter has got its parts."""
        operations.settle(model, name, self.widens(name, autocast_adapter_dtype))
        if low_cpu_mem_usage or getattr(next(model.parameters(), None), "is_meta", False):
            refuse_unfilled(model)  # what a method makes of a base without values has none

    def _adapt(self, model: nn.Module, name: str, config: Any, low_cpu_mem_usage: bool) -> None:
        """Wrap the targets and give each its part of the adapter."""
        targets = self.redirected(config, name, model, self.targets_of(config, model))
        if hasattr(config, "fan_in_fan_out"):  # the layers tell; the field is for other readers of the file
            config.fan_in_fan_out = any(target.kind.fan_in_fan_out for target in targets)
            if config.fan_in_fan_out:
                counts("fan_in_fan_out")
        with torch.device("meta") if low_cpu_mem_usage else nullcontext():
            holders = holders_of(model)
            elsewhere = self.made_elsewhere(config)
            made = [
                (target, self.make_elsewhere(config, name, target, holders) if elsewhere(target.module) else None)
                for target in targets
            ]
            # All are there before the first is filled: what they share is made of all, a tied one has its source.
            layers = [(target, layer or self._layer_for(model, target, holders)) for target, layer in made]
            self._share(name, config, [layer for _, layer in layers])
            self._fill(model, name, config, layers)
            self.put_by_others(model, [target.key for target, layer in layers if len(layer.adapters) == 1])
            add_auxiliary(model, name, config)

    def inject_further(
        self, config: Any, name: str, low_cpu_mem_usage: bool, state_dict: dict[str, torch.Tensor] | None
    ) -> None:
        """Inject one more adapter, and activate it; one that has its name gives way.

        Raises:
            ValueError: if it is of another method, or does not fit; the adapters are then as they were.
        """
        before = self.peft_config.get(name)
        methods = {c.peft_type for n, c in self.peft_config.items() if n != name}
        if len(methods | {config.peft_type, *([before.peft_type] if before else [])}) > 1 and not self.mixes:
            raise ValueError(
                f"this model has adapters of another method than {config.method_name}. For different methods in "
                "one model use get_peft_model(..., mixed=True)."
            )
        self.peft_config[name] = config
        try:
            self.inject_adapter(self.model, name, False, low_cpu_mem_usage, state_dict)
        except BaseException:
            self.peft_config.pop(name)
            self.peft_config.update({name: before} if before else {})
            raise
        self.set_adapter(name, config.inference_mode)

    def prepare_config(self, config: Any, model: nn.Module, keys: set[str] | None) -> None:
        """Settle what the config leaves open: its targets in this model."""
        self.prepared(config, model)
        resolve_targets(config, model, self.target_module_mapping, keys, self.default_roles)

    def targets_of(self, config: Any, model: nn.Module) -> list[Target]:
        """The modules to adapt."""
        beside = getattr(config, "modules_to_save", None)
        found = self.chosen(config, model)
        return found or find_targets(config, model, self.layer_cls, beside, self.made_elsewhere(config))

    def _layer_for(self, model: nn.Module, target: Target, holders: Holders) -> BaseTunerLayer:
        """The tuner layer around a target: the one that is there, or a new one."""
        if target.site is not None and (layer := _fitting(self.layer_cls, target, target.site.wrappers)) is not None:
            return layer  # found with the target: no layer goes in an injection
        site = locate(model, target.key)
        if (layer := _fitting(self.layer_cls, target, site.wrappers)) is not None:
            return layer
        around = [(path, w) for path, w in site.wrappers if isinstance(w, BaseTunerLayer)]
        # What acts on a whole module is outside of all that acts on, or takes the place of, its weight.
        around = [(p, w) for p, w in around if not w.kind.whole]
        path = next((p for p, _ in (site.wrappers if target.kind.whole else around)), site.path)
        if isinstance(target.kind, Stack):  # wrappers of several parameters nest in the order of registration
            order = weight_names(site.module)
            inside = [p for p, w in around if order.index(w.kind.weight) < order.index(target.kind.weight)]
            path = inside[0] if inside else site.path
        cls = class_for(self.layer_cls, target.kind, site.module)
        parent, name = parent_of(model, path)
        module: Any = parent._modules[name]
        layer = cls(module, kind=None if target.kind.whole else target.kind, context=context_of(model))
        layer.__dict__["key"] = target.key
        places = holders.get(id(module), [(parent, name)])
        # A parent that computes with the weight instead of calling the layer has to get the adapted one.
        if any(not isinstance(p, BaseTunerLayer) and reads_weight_of(p, n, target.kind) for p, n in places):
            layer.read_by_parent = True
        replace_at((parent, name), layer, holders)
        return layer

    def _share(self, name: str, config: Any, layers: list[BaseTunerLayer]) -> None:
        """Make what layers share; an adapter that needs the same frozen tensors as another uses those."""
        with torch.device("cpu"):  # where one seed draws the same numbers, wherever they go then
            common = self.layer_cls.adapter_cls.share(config, layers)
        device = next((p.device for p in self.model.parameters() if p.device.type != "meta"), None)
        for attribute, value in common.items():
            if isinstance(value, list):
                for layer, part in zip(layers, value):
                    layer.put(name, **{attribute: part})
                continue
            if isinstance(value, nn.Parameter):
                value = nn.Parameter(value.detach().to(*place_for(layers[0], value)))
            elif isinstance(value, nn.Module):
                place, dtype = place_for(layers[0], value)
                value.to(place, dtype if any(True for _ in value.parameters()) else None)  # frozen: as exact as made
            else:
                value = value.to(device)
            shared = record_of(self.model).shared
            setattr(self, attribute, shared.container(attribute, value, getattr(config, "save_projection", True)))
            shared.put(attribute, name, value, layers)

    def _fill(self, model: nn.Module, name: str, config: Any, layers: list[tuple[Target, BaseTunerLayer]]) -> None:
        slow = len(layers) >= MANY and self.starts_slowly(config)
        for target, layer in tqdm(layers, desc=f"Starting adapter {name}", disable=not slow):
            if target.tied_to is not None:
                source = locate(model, target.tied_to)
                layer.tied_to[name] = next(w for _, w in source.wrappers if is_own(w, self.layer_cls))
            key = target.called or target.key
            if name not in layer.adapters:
                self.give(layer, name, target.config or config, target.kind.target_name(key))

    def starts_slowly(self, config: Any) -> bool:
        """Whether making an adapter takes so long at each layer that progress is worth showing."""
        return False

    def _take_back(self, model: nn.Module, name: str) -> None:
        """Undo an injection that failed half way."""
        operations.remove(model, name)
        record_of(model).shared.drop(name, self.layer_cls.adapter_cls.common)
        if not operations.adapters_of(model):
            drop_record(model)

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        """What an adapter has beside its layers: name in the file, name in the :class:`PeftModel`, tensor."""
        return iter(())

    def without_start(
        self, adapter_name: str, tensors: dict[str, torch.Tensor], config: Any, path: str
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """An adapter's tensors and config for the base as it was before the adapter's start, saved at ``path``.

        Raises:
            ValueError: if the method knows no start that changes the base.
        """
        raise ValueError(
            f"path_initial_model_for_weight_conversion is for LoRA, and {adapter_name!r} is {config.method_name}. "
            "Leave it out: the adapter belongs to the base as it is."
        )

    def lost_in_a_file(self, adapter_name: str) -> str | None:
        """What of an adapter its file will not bring back, and the way out; None where it holds everything."""
        return None

    @property
    def targeted_module_names(self) -> list[str]:
        """Names of the modules that adapters adapt, as the plain model has them."""
        return [layer.key for _, layer in layers_of(self.model) if not isinstance(layer.kind, Stack) and layer.key]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Names of the single parameters that adapters adapt (``target_parameters``)."""
        stacks = [layer for _, layer in layers_of(self.model) if isinstance(layer.kind, Stack)]
        # in the order of registration: they nest
        return [layer.kind.target_name(layer.key) for layer in reversed(stacks)]

    # --- life of the adapters ---------------------------------------------------------------------------------
    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add an adapter, inactive and frozen, that does the weighted sum of what others do.

        Raises:
            ValueError: for unknown adapters, another number of weights, a name that is taken, and where what adapters
                do is not linear in their tensors; the message says what to do instead.
        """
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
        undeclared_biases: bool = False,
    ) -> nn.Module:
        """Merge adapters (default: the active ones) and return the plain model, changed in place.

        Args:
            safe_merge: refuse results that are not finite; the model is then unchanged.
            dequantize: quantised layers that are merged come out dense, in their compute dtype, so that nothing is
                rounded to the codes of the quantisation. Without it the merged weight is quantised again.
            undeclared_biases: merge although layers get a bias that the model's architecture does not have. By default
                the model's config is changed to declare it (``attention_bias=True``, say), where it can.

        Raises:
            ValueError: if an adapter cannot be merged, with the reason.

        Examples:
            >>> plain = model.merge_and_unload()
            >>> type(plain).__name__
            'LlamaForCausalLM'
        """
        if adapter_names is not None:
            operations.require_adapters(self.model, adapter_names, self.peft_config)
        self.require_whole(self.active_adapters if adapter_names is None else adapter_names)
        options = {"dequantize_first": dequantize, "undeclared_biases": undeclared_biases}
        asked = {name: value for name, value in options.items() if value}
        return self._leave(self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names, **asked))

    def unload(self) -> nn.Module:
        return self._leave(self._unload_and_optionally_merge(merge=False))

    # In the class itself, where 0.21 has it: those who put theirs around it read it there.
    _unload_and_optionally_merge = TunerCompat._unload_and_optionally_merge

    def require_whole(self, adapter_names: list[str]) -> None:
        """Raise ValueError if an adapter can become part of the weights in part only; layers refuse what cannot."""

    @staticmethod
    def get_model_config(model: nn.Module) -> dict:
        """The model's config as a dict; ``{"model_type": "custom"}`` where it has none."""
        config = getattr(model, "config", None) or {"model_type": "custom"}
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def _fitting(
    layer_cls: type[BaseTunerLayer], target: Target, wrappers: list[tuple[str, nn.Module]]
) -> BaseTunerLayer | None:
    """The layer among these that holds adapters of a method for the target's weight."""
    fits = (w for _, w in wrappers if is_own(w, layer_cls))
    return next((w for w in fits if target.kind.whole or w.kind.whole or w.kind.weight == target.kind.weight), None)

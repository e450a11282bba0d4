"""Weighted combinations of adapters: the parts that do not depend on the method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.core.base.stack import Stack
from peft.core.layer.classes import is_own
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.rewritten import combine_starts
from peft.core.model import operations
from peft.core.model.auxiliary import AuxiliaryTrainingWrapper, biases_of
from peft.core.model.manager import check_adapter_name
from peft.core.model.targeting import exact_targets
from peft.core.model.walk import walk, wrappers_of
from peft.errors import CONVERSION


if TYPE_CHECKING:
    from peft.core.model.tuner import BaseTuner


# Fields that narrow down, together with target_modules, which modules are adapted.
_SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern")


def checked_weights(tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float]) -> list[float]:
    """The weights as floats, one for each adapter.

    Raises:
        ValueError: for no or unknown adapters, another number of weights, or weights that are not finite.
    """
    if isinstance(adapters, str) or not adapters:
        raise ValueError(f"adapters should be a list with at least one adapter name, got {adapters!r}.")
    operations.require_adapters(tuner.model, adapters, tuner.peft_config)
    if composed := [name for name in adapters if not tuner.peft_config[name].members]:
        raise ValueError(
            f"adapter {composed[0]!r} is made of other adapters, and has no tensors to add up. Average(...) puts it "
            f"together with others as it is; {CONVERSION} does their weighted sum, where a weight equals them."
        )
    if len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters need as many weights, got {len(weights)}: {list(weights)}.")
    numbers = [float(weight) for weight in weights]
    for name, number in zip(adapters, numbers):
        if not math.isfinite(number):
            raise ValueError(f"the weight of adapter {name!r} is {number}; weights have to be finite.")
    return numbers


def tuner_layers(tuner: BaseTuner) -> list[tuple[str, BaseTunerLayer]]:
    """The tuner's own layers, by the names of what they adapt in the unadapted model."""
    around = ((site.key, wrapper) for site in walk(tuner.model) for _, wrapper in site.wrappers)
    return [(w.kind.target_name(key), w) for key, w in around if is_own(w, tuner.layer_cls)]


# --- the new adapter ------------------------------------------------------------------------------------------


def combined_config(tuner: BaseTuner, adapters: Sequence[str], **changes: Any) -> Any:
    """The config of an adapter in all places where one of the given adapters is; otherwise that of the first.

    Args:
        changes: fields that get another value.

    Raises:
        ValueError: if what the adapters train beside their layers cannot be united.
    """
    configs = [tuner.peft_config[name] for name in adapters]
    check_auxiliary(tuner, adapters, configs)
    # Started plainly: an initialisation from the base's weight would change the base once more.
    united = {"inference_mode": False, f"init_{tuner.prefix}weights": True, **_targets(tuner, adapters, configs)}
    for field in ("trainable_token_indices", "layer_replication"):
        united[field] = next((v for config in configs if (v := getattr(config, field, None))), None)
    united["bias"] = next((v for config in configs if (v := getattr(config, "bias", "none")) != "none"), "none")
    saved = [module for config in configs for module in getattr(config, "modules_to_save", None) or ()]
    united["modules_to_save"] = list(dict.fromkeys(saved)) or None
    for field in tuner.layer_cls.adapter_cls.adds.aligns:
        united[field] = sorted({index for config in configs for index in getattr(config, field)})
    known = {field.name for field in dataclasses.fields(configs[0]) if field.init}
    return dataclasses.replace(configs[0], **{k: v for k, v in {**united, **changes}.items() if k in known})


def check_auxiliary(tuner: BaseTuner, adapters: Sequence[str], configs: list[Any]) -> None:
    """Only one adapter may bring its own version of a module, token or bias: a weighted sum of such is no such."""
    advice = "Combine adapters of which only one does."
    for path, wrapper in wrappers_of(tuner.model):
        holders = [name for name in dict.fromkeys(adapters) if name in wrapper]
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and len(holders) > 1:
            raise ValueError(f"adapters {holders} each have their own version of the module {path!r}. {advice}")
    holders = [n for n, config in zip(adapters, configs) if getattr(config, "bias", "none") != "none"]
    if len(set(holders)) > 1:
        raise ValueError(f"adapters {holders} each train biases of the base model. {advice}")
    holders = [n for n, config in zip(adapters, configs) if getattr(config, "trainable_token_indices", None)]
    if len(set(holders)) > 1:
        raise ValueError(f"adapters {holders} each train token vectors. {advice}")
    tied = any(name in layer.tied_to for _, layer in tuner_layers(tuner) for name in adapters)
    if tied and len({bool(getattr(config, "ensure_weight_tying", False)) for config in configs}) > 1:
        raise ValueError(
            "some of these adapters are tied between embedding and head (ensure_weight_tying) and others are not; "
            "one adapter cannot be both."
        )


def _targets(tuner: BaseTuner, adapters: Sequence[str], configs: list[Any]) -> dict[str, Any]:
    """Target fields that mean all modules that any of the adapters adapts, and no others if they can be told apart."""

    def values(field: str) -> list[Any]:
        return [getattr(config, field, None) for config in configs]

    def same(field: str) -> bool:
        return all(value == values(field)[0] for value in values(field))

    united: dict[str, Any] = {}
    for field in dataclasses.fields(configs[0]):
        sets = [set(value or ()) for value in values(field.name) if value is None or isinstance(value, set)]
        if len(sets) == len(configs) and not same(field.name) and field.name not in _SELECTION:
            united[field.name] = {name for names in sets for name in names}
    if not same("target_parameters"):
        united["target_parameters"] = sorted({name for value in values("target_parameters") for name in value or ()})
    if same("target_modules") and all(map(same, _SELECTION)):
        return united
    if "target_modules" in united and all(map(same, _SELECTION)):
        return united
    united.update(dict.fromkeys(_SELECTION), target_modules=_exact_names(tuner, adapters))
    return united


def _exact_names(tuner: BaseTuner, adapters: Sequence[str]) -> set[str] | str:
    """Targets that mean exactly the modules that the adapters adapt."""
    own = {
        name
        for name, layer in tuner_layers(tuner)
        if any(adapter in layer for adapter in adapters) and not isinstance(layer.kind, Stack)
    }
    return exact_targets(tuner.model, own)


def add_combined(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    config: Any,
    fill: Callable[[BaseTunerLayer], None],
) -> None:
    """Add an adapter, inactive and frozen, whose tensors are made from those of others.

    What one of the others trains beside its layers (whole modules, tokens, biases) is copied.

    Args:
        config: as from :func:`combined_config`.
        fill: called with each layer that has the new adapter, fresh, to set its tensors.

    Raises:
        ValueError: if the name is taken. After any exception the model is as before.
    """
    check_adapter_name(adapter_name, [*tuner.peft_config, *operations.adapters_of(tuner.model)])
    sources = (p for _, layer in tuner_layers(tuner) for name in adapters for p in layer.adapter_parameters(name))
    widen = not any(p.dtype in (torch.float16, torch.bfloat16) for p in sources)  # what comes from 16 bits stays so
    tuner.peft_config[adapter_name] = config
    try:
        with torch.random.fork_rng(devices=[]):  # what a fresh adapter draws is overwritten
            tuner.inject_adapter(tuner.model, adapter_name, autocast_adapter_dtype=widen)
        with torch.no_grad():
            for _, layer in tuner_layers(tuner):
                if adapter_name in layer and adapter_name not in layer.tied_to:  # a tied one shows the other's tensors
                    fill(layer)
                    combine_starts(layer, adapter_name, list(zip(adapters, weights)))
            _copy_auxiliary(tuner.model, adapters, adapter_name)
    except BaseException:
        tuner._take_back(tuner.model, adapter_name)
        del tuner.peft_config[adapter_name]
        raise


def _copy_auxiliary(model: nn.Module, adapters: Sequence[str], adapter_name: str) -> None:
    for _, wrapper in wrappers_of(model):
        source = next((name for name in adapters if name in wrapper), None)
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and source is not None and adapter_name in wrapper:
            old = {saved: tensor for saved, _, tensor in wrapper.adapter_state(source)}
            for saved, _, tensor in wrapper.adapter_state(adapter_name):
                tensor.copy_(old[saved])
    record = biases_of(model)
    if record is not None and adapter_name in record:
        source = next(name for name in adapters if name in record)
        for place, tensor in record.tensors(source).items():
            if place in record.values[adapter_name]:
                record.values[adapter_name][place] = tensor.detach().clone()

"""What a config's targets mean in a model, and the errors when they mean nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft.core.base.kinds import WHOLE, Kind, kind_names, kind_of
from peft.core.base.stack import Stack
from peft.core.base.storage import untrainable, weight_names
from peft.core.layer.classes import is_own
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.roles import find_roles
from peft.core.model.walk import Site, embeddings_of, join, locate, names_of_modules, walk
from peft.default_targets import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from peft.errors import NoMatchingPeftModuleError, some
from peft.usage import counts, near, note, remark


@dataclass
class Target:
    """One module to adapt: its name in the unadapted model, the kind of layer it is (:data:`WHOLE` where that is of no
    concern), and what it is tied to.

    ``called`` is the name by which the config means a module that has several, ``site`` where it was found, ``config``
    one that counts for it alone, in the place of the adapter's.
    """

    key: str
    module: nn.Module
    kind: Kind = WHOLE
    tied_to: str | None = None
    called: str | None = None
    site: Site | None = None
    config: Any = None


def matches(targets: str | Iterable[str] | None, key: str) -> bool:
    """Whether a name is meant: by a regex that matches all of it, or by a list entry that is it or its last parts."""
    if not targets:
        return False
    if isinstance(targets, str):
        found = [targets] if re.fullmatch(targets, key) else []
    else:
        found, end, dot = [], key, "."
        while dot:
            if end in targets:
                found.append(end)
            _, dot, end = end.partition(".")
    note(targets, found)
    return bool(found)


def ends_with(names: Iterable[str] | None, key: str) -> bool:
    """Whether a module is named to be trained whole: by the end of its name, not by whole parts of it."""
    if not names:
        return False
    found = [name for name in names if name and key.endswith(name)]
    note(names, found)
    return bool(found)


def layer_index(key: str, patterns: str | list[str] | None) -> int | None:
    """The number of the transformer layer that a module belongs to, or None."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", f".{key}")
        return int(found.group(1)) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf".*?\.{pattern}\.(\d+)\.", f".{key}"):  # the outermost of lists in lists
            note(patterns, (pattern,))
            return int(found.group(1))
    return None


def selected(config: Any, key: str) -> bool:
    """Whether the config's targets, exclusions and layer selection mean the module called ``key``."""
    targets = config.target_modules
    excluded = matches(getattr(config, "exclude_modules", None), key)  # first, as it may mean what is no target
    if excluded or not matches(targets, key):
        return False
    layers, pattern = getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None)
    layers = [layers] if isinstance(layers, int) else layers
    if not layers or isinstance(targets, str):  # a regex selects layers itself
        return True
    index = layer_index(key, pattern)
    note(config.layers_to_transform, (index,))
    note(pattern)
    return key in targets or (index is not None and index in layers)  # a name in full means its module


def all_linear(model: nn.Module, task_type: str | None) -> set[str]:
    """Names of all linear layers but the output head, as short as they can be without meaning other modules."""
    head = embeddings_of(model)[1]
    wanted: list[str] = []
    others: list[str] = []
    for site in walk(model):
        kind = kind_of(site.module)
        is_head = site.module is head or (task_type == "SEQ_CLS" and site.key.split(".")[0] in SEQ_CLS_HEAD_NAMES)
        linear = kind is not None and kind.name == "Linear" and not is_head
        (wanted if linear else others).append(site.key)
    return _short_names(wanted, others)


def _short_names(wanted: list[str], others: list[str]) -> set[str]:
    """The last parts of the wanted names, as few as mean no other module; the whole names if no three do."""
    for parts in (1, 2, 3):
        suffixes = {".".join(key.split(".")[-parts:]) for key in wanted}
        if not any(suffix.split(".")[0].isdigit() for suffix in suffixes) and not any(
            matches(suffixes, key) for key in others
        ):
            return suffixes
    return set(wanted)


def found_targets(model: nn.Module, roles: Iterable[str]) -> set[str]:
    """Names of the layers that play these roles in the model, found by its structure; empty where there are none."""
    wanted = find_roles(model, roles)
    chosen = set(wanted)
    return _short_names(wanted, [site.key for site in walk(model) if site.key not in chosen])


def means_all_linear(targets: Any) -> bool:
    """Whether ``target_modules`` is the word for all linear layers, in any case."""
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def resolve_targets(
    config: Any,
    model: nn.Module,
    mapping: dict[str, Any],
    keys: Iterable[str] | None,
    roles: Iterable[str] = ("query", "value"),
) -> None:
    """Settle ``config.target_modules``: from a state dict's keys, "all-linear", or the defaults.

    The defaults are those of the architecture's row in a table; where there is none, or it names nothing that the
    model has, the layers that play certain roles, found by the model's structure.

    Args:
        mapping: the table, ``model_type`` -> names, or a regex.
        roles: those of :mod:`peft.core.model.roles`, or "linear": all linear layers.

    Raises:
        ValueError: if there are no targets, and no defaults can be found.
    """
    if keys is not None:
        _follow_keys(config, model, set(keys))
        return
    targets = config.target_modules
    if means_all_linear(targets):
        config.target_modules = all_linear(model, config.task_type)
    elif targets is None and not getattr(config, "target_parameters", None):
        default = table_row(mapping, model)
        if default is None:
            linear = "linear" in roles
            default = all_linear(model, config.task_type) if linear else found_targets(model, roles)
        if not default:
            raise ValueError(_no_default(config, model, roles))
        config.target_modules = default if isinstance(default, str) else set(default)


def exact_targets(model: nn.Module, keys: set[str]) -> set[str] | str:
    """Entries of ``target_modules`` that mean exactly these modules of a model."""
    others = [site.key for site in walk(model) if site.key not in keys]
    if any(matches(keys, key) for key in others):  # a name is the tail of another one
        return "|".join(map(re.escape, sorted(keys)))
    return keys


def _follow_keys(config: Any, model: nn.Module, keys: set[str]) -> None:
    """Let the config mean exactly these modules, and say where it meant others."""
    targets = config.target_modules
    if targets and not means_all_linear(targets):
        exact = set() if isinstance(targets, str) else {t for t in targets if t in keys}  # these may end other names
        asked = {s.key for s in walk(model) if s.key in keys or not exact or not matches(exact, s.key)}
        asked = {key for key in asked if kind_of(locate(model, key).module) and selected(config, key)}
        for names, what in ((keys - asked, "adapts modules that the config does not mean"),
                            (asked - keys, "has no tensors for modules that the config means")):  # fmt: skip
            if names:
                remark(f"The state dict decides what is adapted, and {what}: {some(names)}.")
    config.target_modules = exact_targets(model, keys)
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if getattr(config, field, None) is not None:
            setattr(config, field, None)


def table_row(mapping: dict[str, Any], model: nn.Module) -> Any:
    """What a table by ``model_type`` says for a model, or None: also if it names nothing that this model has."""
    row = mapping.get(str(getattr(getattr(model, "config", None), "model_type", None)))
    return row if row and any(matches(row, site.key) for site in walk(model)) else None


def _no_default(config: Any, model: nn.Module, roles: Iterable[str]) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    linear = sorted(all_linear(model, config.task_type))
    layers = {site.key.rpartition(".")[2]: type(site.module).__name__ for site in walk(model) if kind_of(site.module)}
    others = sorted(f"{name} ({kind})" for name, kind in layers.items() if name not in linear)
    return (
        f"no default target_modules are known for {type(model).__name__}"
        + (f" (model_type {model_type!r})" if model_type else "")
        + f", and its structure shows none: {type(config).__name__} looks for layers that act as {', '.join(roles)}. "
        + (f"Its linear layers are {some(linear, 20)}. " if linear else "It has no linear layers. ")
        + (f"Further layers that can be adapted: {some(others, 12)}. " if not linear and others else "")
        + "Set target_modules: a list of such names, or of the last parts of their names; a regex that matches whole "
        f'names; or "{INCLUDE_LINEAR_LAYERS_SHORTHAND}".'
    )


def find_targets(
    config: Any,
    model: nn.Module,
    layer_cls: type[BaseTunerLayer],
    skip: Iterable[str] | None,
    foreign: Callable[[nn.Module], bool] = lambda module: False,
) -> list[Target]:
    """All modules that the config means, each once, by whichever of its names.

    Args:
        skip: ends of names that are left out, with all below them (``modules_to_save``).
        foreign: says which modules somebody else makes layers for: their kind does not matter.

    Raises:
        NoMatchingPeftModuleError: if nothing matches.
        ValueError: if a module that matches cannot be adapted.
    """
    sites = list(walk(model))
    names = names_of_modules(model)
    found: list[Target] = []
    companions: set[str] = set()
    whole: tuple[str, ...] = ()  # the modules left out
    for site in sites:
        if not site.key or site.key.startswith(whole):
            continue
        called = names.get(id(site.module), [site.key])
        if any(ends_with(skip, name) for name in called):
            whole += (f"{site.key}.",)
            continue
        found += parameter_targets(config, site, called)
        meant = [name for name in called if config.target_modules and selected(config, name)]
        if meant and site.key not in companions:
            own = not foreign(site.module)
            target = module_target(config, site, layer_cls) if own else Target(site.key, site.module)
            target.called = meant[0]
            for child in () if layer_cls.adapter_cls.any_module else target.kind.companions:
                companions.add(join(site.key, child))
                inner = next(s for s in sites if s.key == join(site.key, child))
                found.append(module_target(config, inner, layer_cls))
            found.append(target)
    if not found:
        raise NoMatchingPeftModuleError(_nothing_matches(config, sites))
    return _with_ties(found, sites, config, layer_cls)


def _with_ties(found: list[Target], sites: list[Site], config: Any, layer_cls: type[BaseTunerLayer]) -> list[Target]:
    """The targets, and the modules that share their weight with a targeted embedding or embed it.

    Where the method, or the config, does not follow such ties, it is said.
    """
    follow = layer_cls.adapter_cls.follows_ties or getattr(config, "ensure_weight_tying", False)
    by_weight: dict[int, list[Site]] = {}
    for site in sites:
        if (weight := site.module._parameters.get("weight")) is not None:
            by_weight.setdefault(id(weight), []).append(site)
    result = {target.kind.target_name(target.key): target for target in found}
    for target in found:
        group = by_weight.get(id(target.module._parameters.get("weight")), [])
        if len(group) < 2:
            continue
        first = next((site for site in group if (kind := kind_of(site.module)) and kind.lookup), None)
        if first is None:
            continue
        if not follow:
            tell_untied(config, target.key, [site.key for site in group if site.key not in result])
            continue
        counts("ensure_weight_tying")
        result[first.key] = module_target(config, first, layer_cls)
        for site in group:
            if site is not first:
                result[site.key] = module_target(config, site, layer_cls)
                result[site.key].tied_to = first.key
    return sorted(result.values(), key=lambda target: target.tied_to is not None)  # after what they follow is made


def tell_untied(config: Any, key: str, others: list[str]) -> None:
    """Say that modules which share their weight with one that is adapted, or trained whole, are not."""
    if others:
        way_out = "set ensure_weight_tying=True" if hasattr(config, "ensure_weight_tying") else "name both"
        remark(
            f"{key} shares its weight with {', '.join(others)}, which the adapter leaves as it is: with the adapter "
            f"the two differ, and merging it unties them. To treat them alike, {way_out}."
        )


def module_target(config: Any, site: Site, layer_cls: type[BaseTunerLayer]) -> Target:
    """A module as a target of a method. Raises ValueError where the method cannot adapt it."""
    adapter_cls = layer_cls.adapter_cls
    kind = next((kind for kind in adapter_cls.more_kinds if kind.matches(site.module)), None) or kind_of(site.module)
    reason: str | None = f"it is none of {', '.join(kind_names())}"
    if adapter_cls.any_module:  # it trains a copy, or stands beside
        reason = untrainable(site.module) if adapter_cls.adds.replaces else None
    elif kind is None and any(is_own(wrapper, layer_cls) for _, wrapper in site.wrappers):
        reason = None  # a third party's layer has it already
    elif kind is not None:
        reason = kind.refusal(site.module) or adapter_cls.refusal(kind, site.module, config)
    if reason:
        raise ValueError(
            f"target module {site.key!r} ({type(site.module).__name__}) cannot be adapted by "
            f"{type(config).__name__}: {reason}. Narrow target_modules, or name it in exclude_modules."
        )
    return Target(site.key, site.module, kind or WHOLE, site=site)


def parameter_targets(config: Any, site: Site, called: Iterable[str]) -> list[Target]:
    """Parameters of a module, ``called`` so, named in ``target_parameters``, the first registered one innermost."""
    names = getattr(config, "target_parameters", None)
    found: list[Target] = []
    for parameter in weight_names(site.module) if names else ():
        meant = [name for name in called if matches(names, join(name, parameter))]
        if not meant:
            continue
        if config.target_modules and selected(config, site.key):
            raise ValueError(f"{site.key!r} is meant by target_modules and by target_parameters; choose one of them.")
        found.append(parameter_target(site, parameter, meant[0]))
    return found


def parameter_target(site: Site, parameter: str, called: str) -> Target:
    """A parameter of a module, ``called`` so in a config, as a target. Raises ValueError if it cannot be adapted."""
    kind = Stack(parameter)
    if reason := kind.refusal(site.module):
        raise ValueError(f"target parameter {join(site.key, parameter)!r} cannot be adapted: {reason}.")
    return Target(site.key, site.module, kind, called=called)


def _top_level(config: Any, model: nn.Module) -> str:
    """What to do where the config means the model itself, around which there is no module to hold the adapter."""
    meant = [p for p in weight_names(model) if matches(getattr(config, "target_parameters", None), p)]
    if not meant and not (config.target_modules and matches(config.target_modules, "")):
        return ""
    what = f"{meant[0]!r} is a parameter of the model itself" if meant else "The model itself is meant"
    return (
        f"{what}, of class {type(model).__name__}, and what adapts it takes its place in a module around it: adapt "
        "nn.Sequential(model), by names that start with '0'. "
    )


def _nothing_matches(config: Any, sites: list[Site]) -> str:
    targets = config.target_modules or getattr(config, "target_parameters", None) or []
    asked = targets if isinstance(targets, str) else sorted(targets)
    keys = [site.key for site in sites if kind_of(site.module)]
    kinds = sorted({type(site.module).__name__ for site in sites if kind_of(site.module)})
    pool = (
        [join(site.key, p) for site in sites for p in weight_names(site.module)] if not config.target_modules else keys
    )
    regex = config.target_modules if isinstance(config.target_modules, str) else ""
    entries, pool = ([regex], [*pool, INCLUDE_LINEAR_LAYERS_SHORTHAND]) if regex else (asked, pool)
    close = dict.fromkeys(name for entry in entries for name in near(entry, pool))
    top = _top_level(config, sites[0].module)
    message = f"no module of the model matches the targets {asked!r}. {top}" if asked else "no targets are named. "
    if meant := [key for key in keys if key and matches(targets, key)]:
        message += _ruled_out(config, meant)
    elif close and not top:
        message += f"Closest names: {', '.join(close)}. "
    if regex:
        message += "A string is a regular expression that has to match the whole name, such as r'.*\\.q_proj'. "
        if any(matches(listed := re.split(r"[,;\s]+", regex), key) for key in keys if key):
            message += f"For names, or ends of names, give a list: {listed}. "
    names = sorted({key.rpartition(".")[2] for key in keys})
    return (
        message
        + f"Layers that can be adapted: {', '.join(kinds) or 'none'}"
        + (f", called {some(names, 20)}." if any(names) else ".")
        + (
            ""
            if meant
            else f" Change {'target_parameters' if targets and not config.target_modules else 'target_modules'}."
        )
    )


def _ruled_out(config: Any, meant: list[str]) -> str:
    """What of a config keeps the modules that its targets name from being adapted."""
    if not config.target_modules:
        return "These are modules, which target_modules adapts; a parameter is named with its own name as well. "
    fields = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    values = {field: getattr(config, field, None) for field in fields}
    given = [f"{field}={value!r}" for field, value in values.items() if value not in (None, "") and value != []]
    layers = {index for key in meant if (index := layer_index(key, None)) is not None}
    there = (
        f" (they are in the layers {some(layers, 8)})" if layers and values["layers_to_transform"] is not None else ""
    )
    return f"Modules of that name exist{there}, but are ruled out by {' and '.join(given)}; change that. "

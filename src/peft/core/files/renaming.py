"""Names that a base model's modules had before: files and configs of adapters go on meaning them.

transformers renames modules from version to version, and keeps tables by which its loader reads old checkpoints. The
same tables, read forwards, give the place of a tensor in an old adapter file; read backwards, they give the names by
which an old config may mean a module. A model class of one's own says it in ``_checkpoint_conversion_mapping``, a dict
of regex -> replacement.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from peft.core.adapter import LABEL
from peft.core.files.io import renamed
from peft.core.model.targeting import matches, means_all_linear
from peft.core.model.walk import names_of_modules, plain_names, walk
from peft.errors import NoMatchingPeftModuleError, some
from peft.peft_types import RENAMED_METHODS


_FIELDS = ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_SUFFIXES = (".weight", ".part.weight")  # a renaming may be of a module's weight, or of whatever it holds


def is_of_transformers(model: nn.Module) -> bool:
    """Whether it is a model of transformers, without importing that."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def transforms_of(model: nn.Module) -> list[Any]:
    """transformers' weight conversions for a model; none for models of other origin."""
    if not is_of_transformers(model):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model)


def _renamings(transforms: Iterable[Any]) -> list[Any]:
    return [t for t in transforms if not hasattr(t, "operations")]


def current_name(model: nn.Module) -> Callable[[str], Iterator[str]]:
    """A function that gives the names which a tensor of an old checkpoint may have in this model today."""
    own, transforms = getattr(model, "_checkpoint_conversion_mapping", None) or {}, _renamings(transforms_of(model))

    def names(old: str) -> Iterator[str]:
        if own:
            yield renamed(old, own)
        new = old
        for transform in transforms:
            new = transform.rename_source_key(new)[0]
        yield new

    return names


def _old_names(model: nn.Module) -> dict[str, set[str]]:
    """What each module was called before, for those that were renamed: all names that lead to those of today."""
    backwards = [_backwards(transform) for transform in reversed(_renamings(transforms_of(model)))]
    current = current_name(model)
    found: dict[str, set[str]] = {}
    for site in walk(model) if backwards else ():
        for suffix in _SUFFIXES:
            now = site.key + suffix
            names = {now}
            for ways in backwards:  # a module may have moved by this one, or not
                names |= {way.rename_source_key(name)[0] for name in names for way in ways}
            old = {name.removesuffix(suffix) for name in names - {now} if name.endswith(suffix)}
            if site.key and (old := {name for name in old if now in current(name + suffix)}):
                found.setdefault(site.key, set()).update(old)
    return found


def _backwards(transform: Any) -> list[Any]:
    """A renaming read backwards, once for each of the names that it takes together."""
    sources, targets = transform.source_patterns, transform.target_patterns
    if len(sources) == 1 or len(targets) != 1:
        return [transform.reverse_transform()]
    return [type(transform)(source, targets).reverse_transform() for source in sources]


def update_names(model: nn.Module, config: Any) -> None:
    """Let a config that names modules as they were called before mean what they are called in this model, in place.

    An entry that means some module of today stays as it is.
    """
    now = [site.key for site in walk(model)]
    before = functools.cache(lambda: _old_names(model))
    for field in _FIELDS:
        value = getattr(config, field, None)
        if not value or means_all_linear(value):
            continue
        if isinstance(value, str):
            if not _means(value, now) and (new := _meant(value, before())):
                setattr(config, field, type_of(field)(new))
            continue
        entries = list(value)
        updated = [n for e in entries for n in ([e] if _means([e], now) else _meant([e], before()) or [e])]
        if updated != entries:
            setattr(config, field, type_of(field)(updated))
    for field in _PATTERNS:
        pattern = getattr(config, field, None) or {}
        renewed: dict[str, Any] = {}
        for key, value in pattern.items():
            new = [] if _means(_whole(key), now) else _meant(_whole(key), before())
            renewed.update(dict.fromkeys((f"^{re.escape(name)}" for name in new), value) if new else {key: value})
        if renewed != pattern:
            setattr(config, field, renewed)


def type_of(field: str) -> Callable[[Iterable[str]], Any]:
    """The collection in which a config keeps such names."""
    return list if field == "modules_to_save" else set


def _whole(key: str) -> str:
    """A key of a pattern as a regex for whole names."""
    return rf"(.*\.)?({key})"


def _means(targets: str | list[str], names: Iterable[str]) -> bool:
    return any(matches(targets, name) for name in names)


def _meant(targets: str | list[str], old: dict[str, set[str]]) -> list[str]:
    """The modules that were meant, by their names of today; as short as they are, where one name means them all."""
    keys = [key for key, names in old.items() if _means(targets, names)]
    tails = {key.rpartition(".")[2] for key in keys}
    short = isinstance(targets, list) and len(tails) == 1 and not next(iter(tails)).isdigit()
    return sorted(tails) if short and "." not in targets[0] else keys


def of_today(state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
    """A state dict with the names of today, of a method that had another one in older files."""
    given = state_dict
    for now, old, new in RENAMED_METHODS.values():
        if config is not None and config.peft_type == now:
            given = {
                ".".join([new + p[len(old) :] if p.startswith(old) else p for p in name.split(".")]): value
                for name, value in given.items()
            }
    return given


def keys_of(model: nn.Module, state_dict: dict[str, Any], layer_cls: Any) -> set[str]:
    """Names of the modules for which a checkpoint has tensors of this method.

    Raises:
        NoMatchingPeftModuleError: if it has none.
    """
    several = names_of_modules(model)
    known = {name: s.key for s in walk(model) for name in several.get(id(s.module), [s.key])}
    parts = layer_cls.adapter_cls.parts.values()
    names = "|".join(re.escape(name) for part in parts for name in part.names)
    found, current = set(), current_name(model)
    for key in plain_names(state_dict, model):
        # Beside adapters of other methods, files have a `base_layer` between a module's name and the tensor's.
        split = re.match(rf"(?:base_model\.model\.)?(.+?)(?:\.base_layer)*\.(?:{names})(?:\.|$)", key)
        old = split.group(1) if split else ""
        today = (new.removesuffix(".weight") for new in (f"{old}.weight", *current(f"{old}.weight")))
        if place := next((known[name] for name in today if name in known), None):
            found.add(place)
    if not found:
        held = some(state_dict, 3) or "it is empty"
        raise NoMatchingPeftModuleError(
            f"the state dict has no tensors of {layer_cls.__name__} for modules of this model ({held})."
        )
    return found


def names_today(name: str, tails: set[str], current: Callable[[str], Iterator[str]]) -> Iterator[str]:
    """What a tensor may be called today; a renaming may be of the whole name, or of the module with the adapter."""
    yield from current(name)
    parts = name.split(".")
    for cut in range(1, len(parts)):
        if (tail := ".".join(parts[cut:])) in tails:
            for new in current(".".join((*parts[:cut], "weight"))):
                yield f"{new.removesuffix('.weight')}.{tail}"


def at_first(name: str, others: dict[str, str]) -> Iterator[str]:
    """What a tensor is called by the first names of the modules around it, by what :func:`other_names` gives."""
    for other, first in others.items():
        if name.startswith(f"{other}."):
            yield (new := first + name[len(other) :])
            yield from at_first(new, others)


def relabelled(name: str, labelled: set[str]) -> Iterator[str]:
    """What a tensor is called that an older file has under the name of the adapter, or under none."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1], 1):
        if part in labelled:
            yield ".".join([*parts[:i], LABEL, *parts[i + 1 :]])
            yield ".".join([*parts[:i], LABEL, *parts[i:]])

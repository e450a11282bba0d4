"""Adapters as state dicts: what belongs to an adapter, under which name, and how it gets in and out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from peft.core.base.storage.sharded import fill, gathered, is_dtensor, partitioned, whole
from peft.core.files.along import base_places, train_along, weights_under
from peft.core.files.embeddings import base_weights, embeddings_beside, tell_no_embeddings
from peft.core.files.entries import Entry, anatomy, configs_of, entries, prompts_of
from peft.core.files.flattened import filling_units, standing_in, taken_out
from peft.core.files.io import PREFIX, separate
from peft.core.files.of_part import of_part
from peft.core.files.renaming import at_first, current_name, names_today, of_today, relabelled
from peft.core.files.vocabulary import is_resized
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.rewritten import stand_on
from peft.core.model import operations
from peft.core.model.walk import (
    bare,
    join,
    layers_of,
    other_names,
    plain,
    plain_names,
    unreplicated,
    walk,
)
from peft.core.prompts import Prompts
from peft.errors import CheckpointError, some


class LoadResult(NamedTuple):
    """Names of tensors that the adapter has and the state dict lacks (those in the model), and the other way round."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of one adapter, under the names that they have in files.

    Args:
        model: a :class:`PeftModel`, or any module with adapters; compiled, or wrapped by FSDP, if need be.
        state_dict: take the values from this state dict of the whole model, as FSDP or ZeRO-3 have gathered it, and
            read no tensor of the model itself. By default it is ``model.state_dict()``, for which all processes have
            to call this. An empty one, which other ranks than the first get (FSDP), gives an empty result, and one
            that this function has given is given back. One of a part of the model, such as a block, gives what the
            adapter has there, by its names in that part.
        unwrap_compiled: not needed; what ``torch.compile`` puts around a module never shows in names.
        save_embedding_layers: also give the base weights of the embeddings; "auto": of those that are adapted, and of
            all if the vocabulary has another size than that of the base model's config (which is looked up in its
            folder, or in the local cache of the hub).

    Returns:
        name -> detached tensor, contiguous and with memory of its own; one that several layers share occurs once.

    Raises:
        ValueError: if the model has no such adapter, or the given state dict lacks one of its tensors.

    Examples:
        >>> tensors = get_peft_model_state_dict(model)
        >>> tensors = get_peft_model_state_dict(model, model.state_dict())  # or what FSDP gathered
    """
    outer, model = unreplicated(model), bare(model)
    root, prefix = anatomy(model)
    config = configs_of(model).get(adapter_name)
    if config is None:
        operations.require_adapters(root, [adapter_name])
    if state_dict is None and (pieces := partitioned(entry.tensor for entry in entries(model, adapter_name))):
        with gathered(pieces):
            return get_peft_model_state_dict(outer, outer.state_dict(), adapter_name, False, save_embedding_layers)
    if not (given := outer.state_dict() if state_dict is None else state_dict):
        return {}
    if state_dict is not None and (other := _other(model, adapter_name, given)) is not None:
        return other
    with standing_in(model, taken_out(model, given)), _holding(model, given) as absent:
        _require_all(model, adapter_name, absent)
        found, seen = {}, set()
        own = list(entries(model, adapter_name))  # held until the end: an id is that of a living tensor only
        for entry in own:
            # Projections that a seed gives again (`put`) are saved where the config says so.
            if id(entry.tensor) in seen or (entry.put is not None and not getattr(config, "save_projection", True)):
                continue
            seen.add(id(entry.tensor))
            found.update(entry.named(whole(entry.tensor)))
        if save_embedding_layers:
            every = save_embedding_layers is True or is_resized(root, config)
            found.update(embeddings_beside(root, prefix, adapter_name, every))
            if save_embedding_layers is True:
                tell_no_embeddings(root)
        return separate(found)


def _other(model: nn.Module, adapter: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The result for a state dict that is not one of the whole model; None where it is."""
    if _is_done(model, adapter, given):  # models whose ``state_dict`` calls :func:`get_peft_model_state_dict`
        return separate(given)
    if (prompts := prompts_of(model)) and adapter in prompts:
        return None  # virtual tokens stand in no block, and asking for an encoder's computes
    return of_part(model, list(entries(model, adapter)), given)


def _is_done(model: nn.Module, adapter: str, given: dict[str, torch.Tensor]) -> bool:
    """Whether a state dict has the adapter's tensors by their names in files, and not by those in the model."""
    if (prompts := prompts_of(model)) and adapter in prompts and "prompt_embeddings" not in given:
        return False  # asking an encoder for its tensors computes, and the model's own may be elsewhere
    entry = None
    for entry in entries(model, adapter):  # one by one: the first tells of nearly all that are not
        if entry.memory in given or any(f"{entry.saved}{end}" not in given for end in entry.split or ("",)):
            return False
    return entry is not None


@contextmanager
def _holding(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> Iterator[dict[int, str]]:
    """Within this context the model holds the tensors of a state dict of it, so that all that is read is of that.

    Yields:
        The tensors that the state dict lacks, by id, with their names.
    """
    given = plain_names(state_dict, model)
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    values: dict[int, torch.Tensor] = {}
    absent: dict[int, str] = {}
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, live in table.items():
                if live is None or (table is module._buffers and name in module._non_persistent_buffers_set):
                    continue
                key = plain(join(path, name))
                places.append((table, name, live))
                if (value := given.get(key)) is None:
                    absent.setdefault(id(live), key)
                elif id(live) not in values:  # a tensor under several names stays one
                    values[id(live)] = live if _is_same(live, value) else _alike(live, value)
    changed = [(table, name, live) for table, name, live in places if values.get(id(live), live) is not live]
    try:
        for table, name, live in changed:
            table[name] = values[id(live)]
        yield {i: key for i, key in absent.items() if i not in values}
    finally:
        for table, name, live in changed:
            table[name] = live


def _is_same(live: torch.Tensor, value: torch.Tensor) -> bool:
    return live.shape == value.shape and live.device == value.device and live.data_ptr() == value.data_ptr()


def _alike(live: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(value.detach(), requires_grad=False) if isinstance(live, nn.Parameter) else value.detach()


def _require_all(model: nn.Module, adapter: str, absent: dict[int, str]) -> None:
    """Raise CheckpointError where a tensor of the adapter is in the model only, and not in the given state dict."""
    lacking = []
    if absent:
        prompts = prompts_of(model)
        encoder = [*prompts.encoders[adapter].parameters()] if prompts and adapter in prompts else []
        # What an encoder gives is in no state dict, so the state dict has to have the encoder.
        held = [*encoder, *(entry.tensor for entry in entries(model, adapter) if not encoder or entry.memory)]
        lacking = [absent[id(tensor)] for tensor in held if id(tensor) in absent]
    if lacking:
        raise CheckpointError(
            f"the state dict lacks {some(lacking)} of adapter {adapter!r}"
            + (f" (and {len(lacking) - 5} more)" if len(lacking) > 5 else "")
            + ". Give one of the whole model, gathered from all ranks, or leave state_dict out."
        )


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Fill an adapter with the tensors of a file.

    Args:
        ignore_mismatched_sizes: leave tensors of another shape as they are, with a warning.
        low_cpu_mem_usage: put the given tensors into the model instead of copying them.

    Raises:
        RuntimeError: (also a ValueError) if a tensor has another shape than its place, or is none; nothing has been
            changed then.

    Returns:
        Names in the model of what the state dict lacks, and names of the state dict that belong nowhere. Tensors of
        the base model that it holds (norms trained along, weights under the adapter) become the adapter's own: they
        act while it is active.

    Examples:
        >>> state = get_peft_model_state_dict(model)
        >>> found = set_peft_model_state_dict(model, state)
        >>> found.unexpected_keys
        []
    """
    with filling_units(model):
        found = _put(bare(model), adapter_name, peft_model_state_dict, ignore_mismatched_sizes, low_cpu_mem_usage)
    had_none = any(entry.tensor.is_meta for entry in found.own)
    left = entries(bare(model), adapter_name) if had_none else ()
    if empty := [entry.key for entry in left if entry.tensor.is_meta]:
        warnings.warn(f"these tensors of adapter {adapter_name!r} have no values yet: {some(empty)}.")
    return LoadResult([entry.key for entry in found.missing], found.unexpected)


def _put(
    model: nn.Module, adapter_name: str, peft_model_state_dict: dict[str, torch.Tensor], ignore: bool, assign: bool
) -> Match:
    root, _ = anatomy(model)
    if odd := [name for name, value in peft_model_state_dict.items() if not isinstance(value, torch.Tensor)]:
        raise CheckpointError(f"a state dict holds tensors by name; these are none: {some(odd)}.")
    if (prompts := prompts_of(model)) and adapter_name in prompts:
        prompts.make_room(adapter_name, peft_model_state_dict)
    found = match(model, adapter_name, peft_model_state_dict)
    if found.wrong and not ignore:
        raise CheckpointError(_mismatch(model, adapter_name, found.wrong))
    if found.wrong:
        names = ", ".join(entry.saved for entry, _ in found.wrong)
        warnings.warn(f"these tensors have another shape and were left out: {names}")
    unmerge_for(root, adapter_name)
    replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    with torch.no_grad():
        exact = []
        for entry, value in found.fits:
            if entry.put is not None:
                entry.put(value)
            elif _stays(entry, value, assign):
                exact.append((entry.tensor, value))
            elif entry.memory:
                _assign(model, entry, value, replaced)
        fill(exact)  # after rounded ones
        for module in root.modules() if replaced else ():  # tied modules hold one tensor, a file has it once
            for name, p in module._parameters.items():
                if p is not None and id(p) in replaced:
                    module._parameters[name] = replaced[id(p)][1]
        if found.base:
            train_along(root, adapter_name, found.base, _acting(root, prompts))
        for layer, value in found.weights:
            stand_on(layer, adapter_name, value)
        for _, layer in layers_of(root):
            if adapter_name in layer:
                layer.adapters[adapter_name].loaded()
    return found


def _acting(root: nn.Module, prompts: Prompts | None) -> list[str]:
    """The adapters that are active and not switched off."""
    if prompts is not None:
        return [] if prompts.disable_adapters else prompts.active_adapters
    off = any(wrapper.disable_adapters for site in walk(root) for _, wrapper in site.wrappers)
    return [] if off else operations.active_of(root)


@dataclass
class Match:
    """Where the tensors of a state dict belong.

    Attributes:
        own: all tensors of the adapter.
        fits, wrong: places with their new tensors, those of another shape apart.
        base: other tensors of the base model: (module, attribute) and the new tensor.
        weights: layers of the adapter, and the base weights that it stands on.
        unexpected: names that belong nowhere.
        given: the name and the tensor that a place has got, by the place's id.
    """

    own: list[Entry]
    fits: list[tuple[Entry, torch.Tensor]]
    wrong: list[tuple[Entry, torch.Tensor]]
    base: list[tuple[tuple[nn.Module, str], torch.Tensor]]
    weights: list[tuple[BaseTunerLayer, torch.Tensor]]
    unexpected: list[str]
    given: dict[int, tuple[str, torch.Tensor]] = field(default_factory=dict)

    def put(self, place: Entry, value: torch.Tensor, called: str) -> None:
        """Note a tensor for a place, as one that fits or one that does not. Of several for one the first counts."""
        name, first = self.given.setdefault(id(place), (called, value))
        if first is not value:
            if first.shape != value.shape or not (first.is_meta or torch.equal(first, value)):
                warnings.warn(
                    f"{called!r} and {name!r} are one tensor in this model, and differ in the checkpoint: the values "
                    "of the latter are taken. In a model that does not share the module, both are loaded."
                )
            return
        (self.fits if place.fits(value) else self.wrong).append((place, value))

    @property
    def missing(self) -> list[Entry]:
        """Tensors of the adapter for which there is nothing; what layers share has a place in each."""
        there = {id(entry.tensor) for entry, _ in (*self.fits, *self.wrong)}
        # What has a `put` of its own can be made again, so a file may lack it.
        return [entry for entry in self.own if id(entry.tensor) not in there and entry.put is None]


def match(model: nn.Module, adapter: str, state_dict: dict[str, torch.Tensor]) -> Match:
    """Find the place of each tensor of a state dict, which may have the names of files or those in memory.

    Raises:
        ValueError: if the model has no such adapter.
    """
    root, prefix = anatomy(model)
    own = list(entries(model, adapter))
    if not own:
        operations.require_adapters(root, [adapter])
    known = {name: entry for entry in own for name in entry.names()}
    found = Match(own, [], [], [], [], [])
    rest: dict[str, torch.Tensor] = {}
    config = configs_of(model).get(adapter)
    for name, value in joined(of_today(plain_names(state_dict, model, root), config), own, prefix).items():
        # From a file with the prefix into a plain model that was adapted in place, and the other way round.
        place = known.get(name) or known.get(prefix + name) or known.get(name.removeprefix(PREFIX))
        if place is None:
            rest[name] = value
        else:
            found.put(place, value, name)
    if rest:
        tables = base_weights(root, prefix)  # not before: a file of the adapter's own tensors names none of them
        for name in [name for name in rest if name in tables]:
            found.put(tables[name], rest.pop(name), name)
        for name, layer in weights_under(root, prefix, adapter).items():
            if (value := rest.pop(name, None)) is not None:
                weight = getattr(layer.get_base_layer(), layer.kind.weight)
                if weight.shape == value.shape:
                    found.weights.append((layer, value))
                else:
                    found.wrong.append((Entry(name, "", weight), value))
        _match_rest(found, root, prefix, {**tables, **known}, rest)
    return found


def _match_rest(found: Match, root: nn.Module, prefix: str, known: dict[str, Entry], rest: dict[str, Any]) -> None:
    """Find a place for names of older versions, and for other tensors of the base model."""
    places, current, others = base_places(root, prefix), current_name(root), other_names(root)
    tails = {entry.tail for entry in found.own if entry.tail}
    labelled = {e.tail.partition(".")[0] for e in found.own if e.owner is not None and e.owner.labelled_inside}
    for name, value in rest.items():
        tail = name.removeprefix(prefix).removeprefix(PREFIX)
        called = *names_today(tail, tails, current), *relabelled(tail, labelled), *at_first(tail, others)
        names = [name, *(prefix + new for new in called)]
        place = next((known[n] for n in names if n in known), None)
        base = next((places[n] for n in names if n in places), None)
        if place is not None:
            found.put(place, value, name)
        elif base is not None and getattr(*base).shape == value.shape:
            found.base.append((base, value))
        elif base is not None:
            found.wrong.append((Entry(name, "", getattr(*base)), value))
        else:
            found.unexpected.append(name)


def joined(state_dict: dict[str, torch.Tensor], own: list[Entry], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, with those that stand for one tensor of the adapter put together."""
    joined = dict(state_dict)
    for entry in (entry for entry in own if entry.split):
        bare_name = entry.saved.removeprefix(prefix)
        for saved in dict.fromkeys((entry.saved, bare_name, PREFIX + bare_name)):  # of a PeftModel, or of a plain one
            if all(saved + suffix in joined for suffix in entry.split):
                parts = {suffix: joined.pop(saved + suffix) for suffix in entry.split}
                try:
                    joined[saved] = entry.as_loaded(parts)
                except (RuntimeError, IndexError) as error:
                    shapes = {saved + suffix: list(part.shape) for suffix, part in parts.items()}
                    raise CheckpointError(f"these tensors do not fit together: {shapes} ({error})") from error
    return joined


def _mismatch(model: nn.Module, adapter: str, wrong: list[tuple[Entry, torch.Tensor]]) -> str:
    entry, value = wrong[0]
    config = configs_of(model).get(adapter)
    base = getattr(config, "base_model_name_or_path", None)
    return (
        f"size mismatch for {entry.saved}: "
        f"the checkpoint has {list(value.shape)}, the model {list(entry.tensor.shape)}"
        + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        + ". The adapter belongs to another base model or config"
        + (f"; it was trained on {base!r}" if base else "")
        + ". Pass ignore_mismatched_sizes=True to load the rest."
    )


def unmerge_for(root: nn.Module, adapter: str) -> None:
    """An adapter that is in the base weights comes out before its tensors change."""
    for _, layer in layers_of(root):
        if adapter in layer.merged_adapters:
            layer.unmerge()


def _stays(entry: Entry, value: torch.Tensor, assign: bool) -> bool:
    """Whether the tensor of a place gets other values, and not another tensor its place."""
    if entry.tensor.device.type == "meta":
        return False
    if not entry.memory:  # a view of another layer's tensor, or a weight of the base model
        return True
    # A DTensor keeps its part of the values; a whole tensor in its place would be none.
    return entry.tensor.shape == value.shape and not (assign and not is_dtensor(entry.tensor))


def _assign(model: nn.Module, entry: Entry, value: torch.Tensor, replaced: dict[int, Any]) -> None:
    """Put a tensor into its place. A parameter that another takes the place of is noted, with that, by its id."""
    path, _, name = entry.memory.rpartition(".")
    holder = model if hasattr(model, "base_model") or not entry.memory.startswith("base_model.") else None
    parent = bare((holder or model).get_submodule(path if holder else path.removeprefix("base_model.")))
    old = parent._parameters.get(name, entry.tensor)
    device = _device_near(model, entry) if old.device.type == "meta" else old.device
    value = value.to(device, old.dtype).contiguous()
    if isinstance(old, nn.Parameter):
        new = parent._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
        replaced[id(old)] = (old, new)
    else:
        parent._buffers[name] = value


def _device_near(model: nn.Module, entry: Entry) -> torch.device:
    """The device of the base layer around a tensor that is on none yet."""
    parts = entry.memory.split(".")
    for end in range(len(parts), -1, -1):
        try:
            module = model.get_submodule(".".join(parts[:end]))
        except AttributeError:
            continue
        for p in module.parameters():
            if p.device.type != "meta":
                return p.device
    return torch.device("cpu")

"""What an adapter trains beside its own layers: whole modules, single tokens, and biases of the base model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft.core.adapter import part
from peft.core.base.kinds import WHOLE, innermost, kind_of
from peft.core.base.storage import copied, offloading_hook
from peft.core.base.storage.sharded import MARKS, tensors_in
from peft.core.composition import Composition
from peft.core.families import Rows
from peft.core.layer.classes import class_for, layer_class
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.record import known_record
from peft.core.model.walk import AuxiliaryWrapper, Site, file_path, join, replace_module, walk
from peft.errors import ConfigError, WrongTypeError


class AuxiliaryTrainingWrapper(AuxiliaryWrapper):
    """Wraps a module of which adapters hold their own version; without an active one, the original acts."""

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, module_to_save: nn.Module, adapter_name: str | None = None, **kwargs: Any) -> None:
        super().__init__()
        self._wrap(module_to_save)
        self._start()
        if adapter_name is not None:
            self.update(adapter_name, **kwargs)
            self.set_adapter(adapter_name)

    def _wrap(self, module: nn.Module) -> None:
        self.original_module = module

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that have a version of the module."""
        return self.present(self._active_adapter)

    @property
    def active_adapter(self) -> str | list[str]:
        """The one that acts, and a list where none does."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Allocate the adapter's version."""
        raise NotImplementedError

    def _module(self) -> nn.Module:
        """The module that acts now."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._module()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in MARKS or not self.__dict__.get("_modules"):  # not wrapped yet
                raise
            return getattr(self._module(), name)

    def unload(self, merge: bool, adapter_names: list[str] | None = None) -> nn.Module:
        """The module that takes the wrapper's place: the adapter's version if ``merge``, else the original."""
        raise NotImplementedError


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A full, trained copy of the module for each adapter (``modules_to_save``).

    Args:
        tied_module: a wrapper whose weight this one shares, where the originals share it.
    """

    adapter_layer_names = ("modules_to_save",)

    def _wrap(self, module: nn.Module) -> None:
        super()._wrap(module)
        self.modules_to_save = nn.ModuleDict()

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        source = self.original_module
        duplicate = copied(innermost(source))
        for site in [site for site in walk(duplicate) if site.wrappers]:  # adapters inside it stay with the original
            replace_module(duplicate, site.key, site.module)
        for p in duplicate.parameters():
            if p.is_floating_point():
                p.requires_grad_(True)
        if isinstance(tied_module, ModulesToSaveWrapper):
            duplicate.weight = tied_module.modules_to_save[adapter_name].weight
        self.modules_to_save[adapter_name] = duplicate

    def __contains__(self, name: str) -> bool:
        return name in self.modules_to_save

    @property
    def adapter_names(self) -> list[str]:
        return list(self.modules_to_save)

    def adapter_parameters(self, name: str) -> Iterator[torch.Tensor]:
        if name in self.modules_to_save:
            yield from self.modules_to_save[name].parameters()

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        if name in self.modules_to_save:
            for key, tensor in tensors_in(self.modules_to_save[name]).items():
                yield key, f"modules_to_save.{name}.{key}", tensor

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.modules_to_save:
            del self.modules_to_save[adapter_name]
        self._forget(adapter_name)

    def present(self, names: Sequence[Any]) -> list[str]:
        """Those of these adapters that have a copy; of a stack, whose later members replace it again, the last."""
        found: dict[str, None] = {}
        for name in names:
            expression = name if isinstance(name, Composition) else self.context.compositions.get(name)
            members = [self.present([member]) for member in (expression.members if expression else ())]
            held = [one for one in members if one][-1 if expression is not None and expression.in_turn else 0 :]
            found.update(dict.fromkeys([name] if name in self.modules_to_save else sum(held, [])))
        return list(found)

    def check_active(self, names: list[str]) -> None:
        if len(names) > 1:
            raise ValueError(
                f"adapters {names} each have their own copy of the same module (modules_to_save), so only one of them "
                "can be active. A composition of them can have a copy of its own: add_composition(..., "
                "modules_to_save=[...])."
            )

    def _module(self) -> nn.Module:
        if not self._disable_adapters:
            for name in self.active_adapters:
                return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs.pop("adapter_names", None) or self.context.adapter_names
        if rows is None or self._disable_adapters:
            return self._module()(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        groups = self.context.groups(tuple(rows), x.shape[0], x.device)

        def run(name: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            own = self.present([name])
            return (self.modules_to_save[own[0]] if own else self.original_module)(*args, **kwargs)

        return self.context.split(groups, WHOLE, self.original_module, args, kwargs, run)

    # a Sequential is called, but indexed as well
    def __getitem__(self, index: Any) -> Any:
        return self._read_part(lambda module: module[index])

    def __iter__(self) -> Iterator[Any]:
        return self._read_part(iter)

    def __len__(self) -> int:
        return len(self._module())

    def __bool__(self) -> bool:  # an empty Sequential is there all the same
        return True

    def _read_part(self, read: Callable[[Any], Any]) -> Any:
        if self.context.adapter_names is not None and not self._disable_adapters:
            raise ValueError(
                f"adapter_names cannot be used here: the model takes single parts out of a "
                f"{type(self.original_module).__name__} that adapters train whole (modules_to_save), for all rows at "
                "once. Use one adapter, or name the parts in modules_to_save."
            )
        return read(self._module())

    def unload(self, merge: bool, adapter_names: list[str] | None = None) -> nn.Module:
        chosen = self.present(self._active_adapter if adapter_names is None else adapter_names)
        return self.modules_to_save[chosen[0]] if merge and chosen else self.original_module


class TrainableTokens(Rows):
    """Trained vectors for some tokens of an embedding, or of an output head."""

    trainable_tokens_delta = part()
    printed_as = "TrainableTokensLayer"

    def create(self, config: Any, key: str) -> None:
        self.replace(list(config.token_indices), config.init_weights)


TrainableTokensLayer: Any = layer_class(TrainableTokens, name="TrainableTokensLayer")


@dataclass
class TokenRows:
    """The part of a config that :class:`TrainableTokens` reads."""

    token_indices: list[int]
    init_weights: bool = True


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """Trained token rows beside another method (``trainable_token_indices``).

    Args:
        token_indices: the rows to train.
        tied_adapter: the token layer of a tied module, whose rows this one shares.
    """

    inner = "token_adapter.base_layer"
    adapter_layer_names = tuple(f"token_adapter.{name}" for name in TrainableTokensLayer.adapter_layer_names)
    other_param_names = tuple(f"token_adapter.{name}" for name in TrainableTokensLayer.other_param_names)
    token_adapter: BaseTunerLayer

    def _wrap(self, module: nn.Module) -> None:
        base = innermost(module)
        kind = kind_of(base) or WHOLE
        if reason := TrainableTokens.refusal(kind, base, None):
            raise WrongTypeError(f"trainable_token_indices cannot be applied to a {type(base).__name__}: {reason}.")
        self.token_adapter = class_for(TrainableTokensLayer, kind, module)(module, kind=kind)

    @property
    def original_module(self) -> nn.Module:
        return self.token_adapter.base_layer

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "context" and "token_adapter" in self.__dict__.get("_modules", ()):
            self.token_adapter.context = value
        super().__setattr__(name, value)

    def update(
        self,
        adapter_name: str,
        token_indices: list[int] | None = None,
        tied_adapter: BaseTunerLayer | None = None,
        **kwargs: Any,
    ) -> None:
        if tied_adapter is not None:
            self.token_adapter.tied_to[adapter_name] = tied_adapter
        self.token_adapter.add_adapter(adapter_name, TokenRows(list(token_indices or ())))

    def __contains__(self, name: str) -> bool:
        return name in self.token_adapter

    @property
    def adapter_names(self) -> list[str]:
        return self.token_adapter.adapter_names

    def adapter_parameters(self, name: str) -> Iterator[torch.Tensor]:
        return self.token_adapter.adapter_parameters(name)

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        for saved, memory, tensor in self.token_adapter.adapter_state(name):
            yield f"token_adapter.{saved}", f"token_adapter.{memory}", tensor

    def delete_adapter(self, adapter_name: str) -> None:
        self.token_adapter.delete_adapter(adapter_name)
        self._forget(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.token_adapter.enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.token_adapter.set_adapter(adapter_names, inference_mode)

    def _module(self) -> nn.Module:
        return self.token_adapter

    def unload(self, merge: bool, adapter_names: list[str] | None = None) -> nn.Module:
        return self.token_adapter.base_layer


class TrainedBiases:
    """Biases of the base model that adapters train in place (``bias="all"`` or ``"..._only"``).

    Other tensors of it that a file brings along, buffers too, are kept like them. The originals are kept, and each
    adapter's values while it is not active: an inactive or disabled adapter leaves no trace in the base model. A place
    is the (module, attribute) of a tensor, known by the module's identity.
    """

    def __init__(self) -> None:
        self.places: dict[tuple[int, str], nn.Module] = {}
        self.originals: dict[tuple[int, str], torch.Tensor] = {}
        self.values: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
        self.applied: str | None = None
        self.paused: str | None = None  # what was applied when the adapters were switched off

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what comes out of a pickle, knows its own modules by their new identities."""
        key = {place: (id(module), place[1]) for place, module in state["places"].items()}

        def renamed(values: dict) -> dict:
            return {key[place]: value for place, value in values.items()}

        self.places, self.originals = renamed(state["places"]), renamed(state["originals"])
        self.values = {name: renamed(values) for name, values in state["values"].items()}
        self.applied, self.paused = state["applied"], state["paused"]

    def add(self, name: str, sites: Iterable[tuple[nn.Module, str]]) -> None:
        """Record an adapter that trains these biases, from the base model's own values; what is applied stays so."""
        sites = list(sites)
        if kept := [type(m).__name__ for m, attribute in sites if _is_elsewhere(m, attribute)]:
            raise ConfigError(
                f"the adapter has biases, or other tensors, of the base model, and those of its {kept[0]} are "
                "offloaded: each call brings the base's own. Load the base model without offloading, or train the "
                "adapter with bias='none'."
            )
        with self.set_aside():
            own = self.values.setdefault(name, {})
            for module, attribute in sites:
                place, p = (id(module), attribute), getattr(module, attribute)
                if place in own:
                    continue
                if place not in self.places:
                    self.places[place], self.originals[place] = module, p.data
                own[place] = p.data.clone()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """A context in which the model has the originals; what is applied, and trains, is so again afterwards."""
        applied, trains = self.applied, any(p.requires_grad for _, p in self.parameters(self.applied or ""))
        self.apply(None)
        try:
            yield
        finally:
            self.apply(applied, trains)

    def parameters(self, name: str) -> Iterator[tuple[tuple[int, str], nn.Parameter]]:
        for place in self.values.get(name, ()):
            yield place, getattr(self.places[place], place[1])

    def tensors(self, name: str) -> dict[tuple[int, str], torch.Tensor]:
        """An adapter's values, those in the model if it is applied."""
        if self.applied == name:
            return dict(self.parameters(name))
        return dict(self.values.get(name, {}))

    def apply(self, name: str | None, requires_grad: bool = True) -> None:
        """Put an adapter's values into the model, or the originals for None."""
        if self.applied is not None:
            for place, p in self.parameters(self.applied):
                self.values[self.applied][place] = p.data
                p.data = self.originals[place].to(p)  # the model may have moved, or been cast, since
                p.requires_grad_(False)
        self.applied = name if name in self.values else None
        if self.applied is not None:
            for place, p in self.parameters(self.applied):
                p.data = self.values[self.applied][place].to(p)
                p.requires_grad_(requires_grad and isinstance(p, nn.Parameter))

    def choose(self, names: Sequence[str]) -> str | None:
        """The one adapter among these that trains biases; ValueError if there are several."""
        found = [name for name in names if name in self.values]
        if len(found) > 1:
            raise ValueError(f"adapters {found} train the same biases of the base model; activate one of them.")
        return found[0] if found else None

    def check_rows(self, rows: dict[str, list[str]]) -> None:
        """Raise ValueError if rows of a batch, by what stands behind each, need other biases than those applied."""
        if odd := [row for row, names in rows.items() if self.choose(names) != self.applied]:
            raise ValueError(
                f"adapter_names: tensors of the base model are trained along (bias=..., or in a file) by "
                f"{[*self.values]}, and the base has one set of them for all rows: that of {self.applied!r}, which is "
                f"active, and not that of {odd}. Call the model for these apart, each time with its adapter active."
            )

    def delete(self, name: str) -> None:
        if self.applied == name:
            self.apply(None)
        self.values.pop(name, None)


def _is_elsewhere(module: nn.Module, attribute: str) -> bool:
    """Whether accelerate keeps a tensor of a module away from it between two calls."""
    return getattr(module, attribute).is_meta and offloading_hook(module) is not None


def biases_of(model: nn.Module) -> TrainedBiases | None:
    """The record of trained biases of a model, if any adapter trains some."""
    record = known_record(model)
    return None if record is None else record.biases


def bias_sites(model: nn.Module, mode: str, adapter: str) -> Iterator[tuple[nn.Module, str]]:
    """The biases that ``bias=mode`` means, as (module, attribute)."""
    for site in walk(model):
        if any(adapter in wrapper for _, wrapper in site.wrappers if isinstance(wrapper, AuxiliaryTrainingWrapper)):
            continue
        if mode == "all" or any(adapter in wrapper for _, wrapper in site.wrappers):
            for attribute, p in site.module._parameters.items():
                if p is not None and attribute.endswith("bias"):
                    yield site.module, attribute


def bias_state(model: nn.Module, adapter: str) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    """An adapter's trained biases as (name in the file, name in memory, name in the unadapted model, tensor)."""
    record = biases_of(model)
    if record is None or adapter not in record:
        return
    tensors = record.tensors(adapter)
    for site in walk(model):
        for attribute in (*site.module._parameters, *site.module._buffers):
            if (id(site.module), attribute) in tensors:
                path = join(site.path, attribute)
                saved = file_path(path, adapter, [*site.above, *site.wrappers])
                yield saved, path, join(site.key, attribute), tensors[id(site.module), attribute]


def tied_sites(model: nn.Module, module: nn.Module) -> list[Site]:
    """The other modules whose ``weight`` is the very parameter of this one."""
    weight = module._parameters.get("weight")
    return [
        site
        for site in walk(model)
        if weight is not None and site.module is not module and site.module._parameters.get("weight") is weight
    ]

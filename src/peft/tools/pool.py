"""Thousands of adapters for one base, of which the model holds those that batches need."""

from __future__ import annotations

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft.config import ORIGIN, PeftConfig
from peft.core.files.entries import entries
from peft.core.files.io import load_peft_weights
from peft.core.files.state_dict import set_peft_model_state_dict
from peft.core.filling import filled_later
from peft.core.model.context import BASE
from peft.core.model.record import context_of
from peft.core.model.walk import layers_of
from peft.errors import CheckpointError, nearest, some
from peft.mapping_func import get_peft_model


@dataclass
class _Registered:
    """An adapter as it was registered: a folder whose file is mapped when it is read, or tensors in memory."""

    folder: str | None = None
    config: PeftConfig | None = None
    tensors: Mapping[str, torch.Tensor] | None = None
    kind: str = ""

    def settings(self) -> PeftConfig:
        if self.config is None:
            self.config = PeftConfig.from_pretrained(str(self.folder))
        if not self.kind:
            given = self.config.to_dict()
            self.kind = json.dumps({k: v for k, v in given.items() if k not in ORIGIN}, sort_keys=True, default=list)
        return self.config

    def values(self) -> Mapping[str, torch.Tensor]:
        return load_peft_weights(str(self.folder)) if self.tensors is None else self.tensors


class AdapterPool:
    """A base model, and adapters by name, which come into the model when a batch names them.

    The model has ``capacity`` places. An adapter that a batch needs takes a free one, or that of the adapter that has
    not been used for the longest time; where both have the same config, only values are copied. What is registered
    and not in the model costs a file name, or its tensors where they were given. Batches that name the same adapters
    in the same order use the stacked factors of the one before.

    Args:
        model: the base model, which is changed in place when the first adapter comes.
        capacity: how many adapters the model holds at most, hence how many different ones a batch may name.

    Attributes:
        model: the :class:`PeftModel`, None until an adapter is needed.

    Example::

        pool = peft.AdapterPool(base, capacity=64)
        for user, folder in folders.items():
            pool.register(user, folder)
        logits = pool(**batch, adapter_names=["ann", "bob", "ann"]).logits
    """

    def __init__(self, model: nn.Module, capacity: int = 64) -> None:
        if capacity < 1:
            raise ValueError(
                f"capacity is the number of adapters that the model may hold, at least 1; got {capacity}."
            )
        self.base, self.capacity = model, capacity
        self.model: Any = None
        self._known: dict[str, _Registered] = {}
        self._places: OrderedDict[str, str] = OrderedDict()  # adapter -> place, the least recently used first
        self._tensors: dict[str, dict[str, torch.Tensor] | None] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    @property
    def in_use(self) -> list[str]:
        """The adapters that are in the model, the least recently used first."""
        return list(self._places)

    def register(
        self,
        name: str,
        folder: str | os.PathLike | None = None,
        *,
        config: PeftConfig | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Make an adapter known: a folder, which is read when it is needed, or a config and tensors by file names.

        A name that is registered already stands for the new adapter from now on.

        Raises:
            ValueError: for neither a folder nor a config with tensors.
        """
        if (folder is None) == (config is None or tensors is None):
            raise ValueError(f"register({name!r}, ...) needs a folder, or config and tensors.")
        if name == BASE:
            raise ValueError(f"{BASE!r} stands for the base model.")
        self._empty(name)
        self._known[name] = _Registered(None if folder is None else os.fspath(folder), copy.copy(config), tensors)

    def unregister(self, name: str) -> None:
        """Forget an adapter; its place in the model is free for another."""
        self._require([name])
        self._empty(name)
        del self._known[name]

    def _empty(self, name: str) -> None:
        """Free an adapter's place."""
        if (place := self._places.pop(name, None)) is not None:
            self._remove(place)

    def _remove(self, place: str) -> None:
        del self._tensors[place]
        others = [name for name in self.model.peft_config if name != place]
        if others:
            self.model.set_adapter(others[0], inference_mode=True)  # of no account, but one has to be active
            self.model.delete_adapter(place)
        else:
            self.base, self.model = self.model.unload(), None

    def _require(self, names: Iterable[str]) -> None:
        if unknown := [name for name in names if name not in self._known]:
            raise ValueError(
                f"no adapter {unknown[0]!r} is registered{nearest(unknown[0], self._known)}. Call "
                "pool.register(name, folder) first."
            )

    def load(self, names: Iterable[str]) -> list[str]:
        """Bring adapters into the model.

        Returns:
            The places of all of them, in their order: what ``model(..., adapter_names=...)`` takes.

        Raises:
            ValueError: if one is not registered, or they are more than ``capacity``; nothing has changed then.
        """
        names = list(names)
        wanted = [name for name in dict.fromkeys(names) if name != BASE]
        self._require(wanted)
        if len(wanted) > self.capacity:
            raise ValueError(
                f"the batch names {len(wanted)} adapters, and the pool has {self.capacity} places. Make it larger "
                "(capacity=...), or the batch smaller."
            )
        for name in wanted:
            if name in self._places:
                self._places.move_to_end(name)
        for name in wanted:
            if name not in self._places:
                self._places[name] = self._bring(self._known[name], wanted)
        return [name if name == BASE else self._places[name] for name in names]

    def _bring(self, adapter: _Registered, wanted: Sequence[str]) -> str:
        """Put an adapter into a place: the values alone where one with its config steps out."""
        config, values = adapter.settings(), adapter.values()
        place = None
        if len(self._places) >= self.capacity:
            oldest = next(name for name in self._places if name not in wanted)
            place = self._places.pop(oldest)
            if self._known[oldest].kind != adapter.kind:  # its tensors have other shapes, or other places
                self._remove(place)
                place = None
        if place is None:
            place = self._make(config)
        try:
            self._fill(place, values, config)
        except BaseException:
            self._remove(place)
            raise
        return place

    def _make(self, config: PeftConfig) -> str:
        """A new place for adapters of a config."""
        self._count += 1
        place, config = f"place_{self._count}", copy.deepcopy(config)
        config.inference_mode = True
        with filled_later():
            if self.model is None:
                self.model = get_peft_model(self.base, config, adapter_name=place).eval()
                context_of(self.model.get_base_model()).common.pooled = True
            else:
                self.model.add_adapter(place, config)
        own = list(entries(self.model, place))
        plain = all(entry.put is None and not entry.split and entry.memory for entry in own)
        self._tensors[place] = {entry.saved: entry.tensor for entry in own} if plain else None
        return place

    @torch.no_grad()
    def _fill(self, place: str, values: Mapping[str, torch.Tensor], config: PeftConfig) -> None:
        own = self._tensors[place]
        if own is None or own.keys() != values.keys() or any(own[k].shape != v.shape for k, v in values.items()):
            result = set_peft_model_state_dict(self.model, dict(values), place)
            if result.missing_keys or result.unexpected_keys:
                raise CheckpointError(
                    f"the adapter does not fit its config: missing {some(result.missing_keys, 3)}, unexpected "
                    f"{some(result.unexpected_keys, 3)}."
                )
            own = None
        for key, tensor in (own or {}).items():
            tensor.copy_(values[key])
        for _, layer in layers_of(self.model.get_base_model()):
            if place in layer:
                if own is not None:
                    layer.adapters[place].loaded()
                layer.adapters[place].upgrade(config.peft_version or "0.0")

    def __call__(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """The model's forward, with one registered adapter for each row (``"__base__"`` for none)."""
        return self._call("__call__", args, adapter_names, kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """The model's ``generate``, with one registered adapter for each row."""
        return self._call("generate", args, adapter_names, kwargs)

    def _call(self, function: str, args: tuple, names: Sequence[str], kwargs: dict[str, Any]) -> Any:
        places = self.load(names)
        if self.model is None:  # rows of the base alone, before any adapter
            return getattr(self.base, function)(*args, **kwargs)
        return getattr(self.model, function)(*args, adapter_names=places, **kwargs)

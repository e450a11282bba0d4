"""What belongs to an adapter: each of its tensors, with its names in files and in memory, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from peft.core.adapter import LABEL, Adapter
from peft.core.base.storage.sharded import tensors_in
from peft.core.files.io import PREFIX
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.rewritten import brought_weight, stand_on
from peft.core.model.auxiliary import bias_state, biases_of
from peft.core.model.record import known_record
from peft.core.model.targeting import ends_with
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import file_path, join, other_names, plain, walk
from peft.core.prompts import Prompts


@dataclass(slots=True)
class Entry:
    """One tensor of an adapter.

    Attributes:
        saved, memory: its name in the file, and in the model ("" where no module holds it).
        aliases: other names that files may have for it. repeats: names under which a file has it again.
        put: takes new values, where they are not simply copied into the tensor.
        tail: its name within the adapted module. owner: the adapter there, which may write it in a way of its own.
    """

    saved: str
    memory: str
    tensor: torch.Tensor
    aliases: tuple[str, ...] = ()
    repeats: tuple[str, ...] = ()
    put: Callable[[torch.Tensor], None] | None = None
    tail: str = ""
    owner: Adapter | None = None

    @property
    def split(self) -> tuple[str, ...]:
        """What is appended to its name where a file holds it as several tensors."""
        return () if self.owner is None else self.owner.split

    def named(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a file holds for this value of it, by name."""
        written = value if self.owner is None else self.owner.as_saved(self.tail, value)
        parts = written if isinstance(written, dict) else {"": written}
        return {name + suffix: part for name in (self.saved, *self.repeats) for suffix, part in parts.items()}

    def as_loaded(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """The one tensor that several of a file stand for, by what is appended to its name."""
        assert self.owner is not None, "nothing else writes several"
        return self.owner.as_loaded(self.tail, parts)

    def names(self) -> list[str]:
        """All names by which a state dict may mean this tensor; some clients give those in memory."""
        return [plain(name) for name in (self.memory, *self.aliases, *self.repeats, self.saved) if name]

    def fits(self, value: torch.Tensor) -> bool:
        """Whether a tensor of this shape can take the place."""
        return self.tensor.shape == value.shape or (
            self.owner is not None and self.owner.takes(self.tail, value.shape)
        )

    @property
    def key(self) -> str:
        """Its name in the model's state dict."""
        return plain(self.memory) or self.saved


def tuner_of(model: nn.Module) -> BaseTuner | None:
    """What manages adapters that change weights; None for a plain module that has some, and for prompts."""
    tuner = model if isinstance(model, BaseTuner) else model._modules.get("base_model")
    return tuner if isinstance(tuner, BaseTuner) else None


def anatomy(model: nn.Module) -> tuple[nn.Module, str]:
    """The adapted base model, and the prefix of its names in files."""
    if (tuner := tuner_of(model)) is not None:
        return tuner.model, PREFIX
    return (model.base_model, "base_model.") if prompts_of(model) else (model, "")


def configs_of(model: nn.Module) -> dict[str, Any]:
    """The configs of a model's adapters; none where the model has none, or was adapted without one."""
    return getattr(model, "peft_config", None) or {}


def prompts_of(model: nn.Module) -> Prompts | None:
    """The prompts of a model; None where its adapters change weights alone."""
    manager: Any = (tuner_of(model) or model).__dict__.get("_prompts")
    return None if manager is None else manager.prompts


def entries(model: nn.Module, adapter: str) -> Iterator[Entry]:
    """All tensors of an adapter, found by walking the layers that hold them."""
    root, prefix = anatomy(model)
    shared: dict[str, Any] = {}
    labelled = False
    repeated: list[str] = []  # where files may say again what the layers share
    again = _named_again(root, configs_of(model).get(adapter))
    for site in walk(root):
        for depth, (path, wrapper) in enumerate(site.wrappers):
            around = [*site.above, *site.wrappers[:depth]]
            place = plain(file_path(path, adapter, around, wrapper)) if path else path
            own = wrapper.adapters.get(adapter) if isinstance(wrapper, BaseTunerLayer) else None
            for saved, memory, tensor in wrapper.adapter_state(adapter):
                unlabelled = memory.removesuffix(".weight") != memory and not saved.endswith(".weight")
                aliases = (prefix + join(place, f"{saved}.weight"),) if unlabelled else ()
                held = prefix + join(path, memory) if memory else ""
                names = again.get(place, ()) if own is None else ()
                repeats = tuple(prefix + join(name, saved) for name in names)
                yield Entry(prefix + join(place, saved), held, tensor, aliases, repeats, None, saved, own)
            if own is not None and (weight := brought_weight(wrapper, adapter)) is not None:
                name = prefix + plain(join(site.path, wrapper.kind.weight))
                yield Entry(name, "", weight, put=partial(stand_on, wrapper, adapter))
            if own is not None and own.common:
                shared.update({attribute: getattr(wrapper, attribute) for attribute in own.common})
                labelled = wrapper.adapter_cls.labelled
                repeated.append(prefix + place)
    prompts = prompts_of(model)
    for saved, memory, tensor in prompts.adapter_state(adapter) if prompts else ():
        held = f"base_model.{memory}" if memory and tuner_of(model) else memory
        # What an encoder makes of its parameters is in the file, and no module holds it: it has its own way back.
        yield Entry(saved, held, tensor, put=None if memory else partial(prompts.load_prompt, adapter))  # type: ignore[union-attr]
    for saved, memory, tensor in tuner.adapter_state(adapter) if (tuner := tuner_of(model)) else ():
        yield Entry(saved, memory, tensor)
    record = biases_of(root)
    in_place = record is not None and record.applied == adapter  # the base has this adapter's biases, no other one's
    for saved, memory, name, tensor in bias_state(root, adapter):
        yield Entry(prefix + plain(saved), prefix + memory if in_place else "", tensor, (prefix + name,))
    for attribute, container in shared.items():
        value, memory = container[adapter], f"base_model.{attribute}.{adapter}"
        if isinstance(value, nn.Module):
            label = f"{LABEL}." if labelled else ""
            for sub, tensor in tensors_in(value).items():
                yield Entry(f"base_model.{attribute}.{label}{sub}", f"{memory}.{sub}", tensor)
            continue
        put = None if isinstance(value, nn.Parameter) else _setter(container, adapter)
        places = tuple(join(place, attribute) for place in repeated)
        yield Entry(f"base_model.{attribute}", memory, value, places, put=put)


def _named_again(root: nn.Module, config: Any) -> dict[str, list[str]]:
    """Other names of modules that the config trains beside the adapted layers: first name -> those that it means too.

    A module that stands in two places is one here; 0.21.2 has a copy at each, and reads no file that lacks one.
    """
    tokens = getattr(config, "trainable_token_indices", None)
    meant = [*(getattr(config, "modules_to_save", None) or ()), *(tokens if isinstance(tokens, dict) else ())]
    found: dict[str, list[str]] = {}
    for other, first in other_names(root).items() if meant else ():
        if ends_with(meant, other):
            found.setdefault(first, []).append(other)
    return found


def leave_out_repeats(model: nn.Module, state: dict[str, Any], prefix: str = "") -> None:
    """Take from a whole model's state, made by 0.21.2, the tensors that it has twice and a model here holds once.

    They are the matrices that layers share, again at each layer, and the embedding of words that prompts look at.
    """
    if prompts_of(model):
        state.pop(f"{prefix}word_embeddings.weight", None)
    record = known_record(anatomy(model)[0])
    for adapter in model.peft_config if record is not None and record.shared.containers else ():
        for entry in entries(model, adapter):
            for alias in entry.aliases if entry.put else ():  # parameters are at each layer here too
                state.pop(f"{prefix}{alias}.{adapter}", None)


def _setter(container: Any, adapter: str) -> Callable[[torch.Tensor], None]:
    def put(value: torch.Tensor) -> None:
        old = container[adapter]
        if old.shape != value.shape or not torch.equal(old, value.to(old)):
            container[adapter] = value.to(old)  # not in place: another adapter may use the old one

    return put

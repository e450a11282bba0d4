"""What belongs to an adapter: each of its tensors, with its names in files and in memory, and where it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.rewritten import brought_weight, stand_on
from peft.core.model.auxiliary import bias_state, biases_of
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import file_path, join, plain, walk
from peft.core.prompts import PromptTuner


@dataclass
class Entry:
    """One tensor of an adapter: its name in the file and in memory, and the module that holds it (if any)."""

    saved: str
    memory: str
    tensor: torch.Tensor
    aliases: tuple[str, ...] = ()
    put: Callable[[torch.Tensor], None] | None = None
    as_saved: Callable[[torch.Tensor], torch.Tensor | dict[str, torch.Tensor]] = torch.Tensor.detach
    split: tuple[str, ...] = ()
    as_loaded: Callable[[dict[str, torch.Tensor]], torch.Tensor] | None = None
    takes: Callable[[torch.Size], bool] | None = None
    tail: str = ""  # its name within the adapted module

    def names(self) -> list[str]:
        """All names by which a state dict may mean this tensor; some clients give those in memory."""
        return [plain(name) for name in (self.memory, *self.aliases, self.saved) if name]

    def fits(self, value: torch.Tensor) -> bool:
        """Whether a tensor of this shape can take the place."""
        return self.tensor.shape == value.shape or (self.takes is not None and self.takes(value.shape))

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
        return tuner.model, "base_model.model."
    return (model.base_model, "base_model.") if prompts_of(model) else (model, "")


def prompts_of(model: nn.Module) -> PromptTuner | None:
    """What manages a model's prompts; None where its adapters change weights alone."""
    tuner = tuner_of(model)
    return (model if tuner is None else tuner).__dict__.get("_prompts")


def entries(model: nn.Module, adapter: str) -> Iterator[Entry]:
    """All tensors of an adapter, found by walking the layers that hold them."""
    root, prefix = anatomy(model)
    shared: dict[str, Any] = {}
    labelled = False
    repeated: list[str] = []  # where files may say again what the layers share
    for site in walk(root):
        for depth, (path, wrapper) in enumerate(site.wrappers):
            around = [*site.above, *site.wrappers[:depth]]
            place = plain(file_path(path, adapter, around, wrapper)) if path else path
            for saved, memory, tensor in wrapper.adapter_state(adapter):
                unlabelled = memory.removesuffix(".weight") != memory and not saved.endswith(".weight")
                aliases = (prefix + join(place, f"{saved}.weight"),) if unlabelled else ()
                held = prefix + join(path, memory) if memory else ""
                entry = Entry(prefix + join(place, saved), held, tensor, aliases, tail=saved)
                if isinstance(wrapper, BaseTunerLayer) and (own := wrapper.adapters.get(adapter)) is not None:
                    entry.as_saved = partial(own.as_saved, saved)
                    entry.split, entry.as_loaded = own.split, partial(own.as_loaded, saved)
                    entry.takes = partial(own.takes, saved)
                yield entry
            if isinstance(wrapper, BaseTunerLayer) and (weight := brought_weight(wrapper, adapter)) is not None:
                name = prefix + plain(join(site.path, wrapper.kind.weight))
                yield Entry(name, "", weight, put=partial(stand_on, wrapper, adapter))
            common = (
                wrapper.adapters[adapter].common if isinstance(wrapper, BaseTunerLayer) and adapter in wrapper else ()
            )
            if common:
                shared.update({attribute: getattr(wrapper, attribute) for attribute in common})
                labelled = wrapper.adapter_cls.labelled
                repeated.append(prefix + place)
    prompts: Any = prompts_of(model)
    for saved, memory, tensor in prompts.adapter_state(adapter) if prompts else ():
        held = f"base_model.{memory}" if memory and tuner_of(model) else memory
        yield Entry(saved, held, tensor, put=None if memory else partial(prompts.load_prompt, adapter))
    for saved, memory, tensor in tuner.adapter_state(adapter) if (tuner := tuner_of(model)) else ():
        yield Entry(saved, memory, tensor)
    for saved, memory, tensor in bias_state(root, adapter):
        yield Entry(prefix + plain(saved), prefix + memory if record_applies(root, adapter) else "", tensor)
    for attribute, container in shared.items():
        value, memory = container[adapter], f"base_model.{attribute}.{adapter}"
        if isinstance(value, nn.Module):
            label = "default." if labelled else ""
            for sub, tensor in value.state_dict(keep_vars=True).items():
                yield Entry(f"base_model.{attribute}.{label}{sub}", f"{memory}.{sub}", tensor)
            continue
        put = None if isinstance(value, nn.Parameter) else _setter(container, adapter)
        yield Entry(f"base_model.{attribute}", memory, value, tuple(join(p, attribute) for p in repeated), put)


def _setter(container: Any, adapter: str) -> Callable[[torch.Tensor], None]:
    def put(value: torch.Tensor) -> None:
        old = container[adapter]
        if old.shape != value.shape or not torch.equal(old, value.to(old)):
            container[adapter] = value.to(old)  # not in place: another adapter may use the old one

    return put


def record_applies(root: nn.Module, adapter: str) -> bool:
    """Whether the base model holds this adapter's biases now, and not those of another one."""
    record = biases_of(root)
    return record is not None and record.applied == adapter

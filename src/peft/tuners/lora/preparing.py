"""What starts need that are led by data: the modules they are about, and the inputs of those."""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from peft.core.base.kinds import Kind
from peft.core.model.targeting import Target, find_targets, resolve_targets
from peft.errors import some
from peft.meanwhile import in_mode
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.model import LoraModel


def targets_of(model: nn.Module, config: LoraConfig, start: str) -> dict[str, Target]:
    """The modules that a config adapts in a plain model and that a start has a meaning for, by name.

    Raises:
        ValueError: if the config asks for another start, or means no such module.
    """
    if config.init_lora_weights != start:
        raise ValueError(f"the config has init_lora_weights={config.init_lora_weights!r}; this prepares {start!r}.")
    config = copy.copy(config)
    resolve_targets(config, model, LoraModel.target_module_mapping, None, LoraModel.default_roles)
    found = find_targets(config, model, LoraModel.layer_cls, config.modules_to_save)
    if opaque := [target.key for target in found if target.kind.opaque]:
        raise ValueError(
            f"{start!r} looks at what a layer gets, and {opaque[0]!r} multiplies by that weight itself, inside. Leave "
            "it out of target_modules, or start in another way."
        )
    meant = {target.key: target for target in found if not (target.kind.whole or target.kind.lookup)}
    if not meant:
        raise ValueError(f"init_lora_weights={start!r} is about linear layers and convolutions, and none is targeted.")
    return meant


def rows(kind: Kind, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A layer's input as the vectors ``[n, in * kernel]`` that its weight multiplies; of a convolution its patches."""
    shape = kind.shape(module)
    if len(shape) > 2:
        unit = torch.eye(math.prod(shape[1:]), dtype=x.dtype, device=x.device)
        x = kind.channels_last(kind.down(module, x, unit))
    return x.reshape(-1, x.shape[-1])


@contextmanager
def seen_by(
    modules: Iterable[tuple[str, nn.Module]], see: Callable[[str, nn.Module, torch.Tensor], None]
) -> Iterator[dict[str, Any]]:
    """A context in which ``see(name, module, input)`` is called before each call of these modules.

    Yields:
        The handles of the hooks by name: what is removed sees no more.
    """

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            see(name, module, x.detach())

        return before

    with ExitStack() as hooks:
        yield {n: hooks.enter_context(m.register_forward_pre_hook(hook(n), with_kwargs=True)) for n, m in modules}


class Means:
    """Running means of tensors, by key; each tensor that is added belongs to it from then on."""

    def __init__(self) -> None:
        self._sums: dict[Any, torch.Tensor] = {}
        self._counts: Counter = Counter()

    def add(self, key: Any, value: torch.Tensor) -> None:
        """One more value of a key."""
        self._sums[key] = self._sums[key].add_(value) if key in self._sums else value
        self._counts[key] += 1

    def of(self, keys: dict[str, Any], why_not: str) -> dict[str, torch.Tensor]:
        """The means under names, by the key of each name.

        Raises:
            ValueError: if a key has no value; the message names those, and says ``why_not``.
        """
        if missing := [name for name, key in keys.items() if key not in self._sums]:
            raise ValueError(f"{some(missing)} {why_not}")
        return {name: self._sums[key] / self._counts[key] for name, key in keys.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode, without gradients; each module is as before after it."""
    with in_mode(model, training=False), torch.no_grad():
        yield


def read_cache(path: str | None, names: set[str]) -> dict[str, torch.Tensor] | None:
    """The tensors of these names that an earlier run has written, None where there is no such file yet.

    Raises:
        ValueError: if the file lacks one.
    """
    if path is None or not os.path.isfile(path) or not os.path.getsize(path):
        return None
    stored: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    if missing := sorted(names - set(stored)):
        raise ValueError(
            f"{path} has no {missing[0]!r}: it was made for another model, or other target_modules. Remove it, and it "
            "is made anew."
        )
    return {name: stored[name] for name in names}


def write_cache(tensors: dict[str, torch.Tensor], path: str | None) -> None:
    """Write tensors for :func:`read_cache`; the file is replaced whole, or stays as it was."""
    if path is not None:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, f"{path}.new")
        os.replace(f"{path}.new", path)  # whole, or not at all

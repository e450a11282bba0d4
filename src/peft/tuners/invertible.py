"""Invertible adapters: g(x) at the embeddings' output, and the inverse of g before a language model's head.

g couples the halves of the features, so it has an exact inverse whatever its networks are: additive as in NICE (Dinh
et al. 2015, arXiv 1410.8516), or affine as in Glow (Kingma and Dhariwal 2018, arXiv 1807.03039). Adapters of languages
have it beside bottlenecks (MAD-X, Pfeiffer et al. 2020, arXiv 2005.00052).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import ModulesToSave, option
from peft.core.adapter import part, setting
from peft.core.base.rows import rows_of
from peft.core.blocks.blocks import (
    BlockAdapter,
    BlockLayer,
    BlockTarget,
    BlockTuner,
    find_blocks,
    first_input,
    width_of,
    with_first_input,
)
from peft.core.model.registry import define_tuner
from peft.core.model.targeting import Target
from peft.core.model.walk import embeddings_of, locate, walk
from peft.errors import ConfigError, NoMatchingPeftModuleError
from peft.tuners.activations import activation


@dataclass
class InvertibleConfig(ModulesToSave):
    """Config of invertible adapters.

    For a language or a domain whose tokens the base model's embeddings serve badly; in a mixed model with an adapter
    of ``BottleneckConfig`` it is MAD-X's language adapter. It cannot be merged.
    """

    METHOD: ClassVar[str] = "INVERTIBLE"

    coupling: str = option(
        "nice",
        "How the halves of the features change each other: 'nice' adds, 'glow' scales and adds.",
        choices=("nice", "glow"),
    )
    reduction_factor: float = option(
        2, "Width of a half over the inner width of the networks; below 1 for wider ones.", above=0
    )
    non_linearity: str = option("relu", "Activation of the networks, by the name that transformers has for it.")
    invert_output: bool = option(
        True, "Apply the inverse before the head of a language model, where the model has one."
    )


Network = Callable[[torch.Tensor], torch.Tensor]
CLAMP = 5.0
"""A Glow coupling scales by exp(CLAMP * 0.636 atan(s / CLAMP)): by e^5 at most, and by e^s near s = 0."""


def affine(x: torch.Tensor, st: torch.Tensor, undo: bool) -> torch.Tensor:
    """x e(s) + t, or with ``undo`` the x that gives this.

    Args:
        x: ``[..., width]``. st: t ``[..., width]``, or s and t one after another ``[..., 2 * width]``.
    """
    if st.shape[-1] == x.shape[-1]:
        return x - st if undo else x + st
    s, t = st.chunk(2, -1)
    log = CLAMP * 0.636 * torch.atan(s / CLAMP)
    return (x - t) * torch.exp(-log) if undo else x * torch.exp(log) + t


def coupled(x: torch.Tensor, first: Network, second: Network) -> torch.Tensor:
    """y = (y1, y2) with y1 = x1 changed by first(x2), y2 = x2 changed by second(y1).

    Args:
        x: ``[..., width]``, x1 its first ``width // 2`` features. first, second: give what :func:`affine` takes.
    """
    x1, x2 = x.tensor_split((x.shape[-1] // 2,), -1)
    y1 = affine(x1, first(x2), False)
    return torch.cat([y1, affine(x2, second(y1), False)], -1)


def uncoupled(y: torch.Tensor, first: Network, second: Network) -> torch.Tensor:
    """The x of which :func:`coupled` makes y."""
    y1, y2 = y.tensor_split((y.shape[-1] // 2,), -1)
    x2 = affine(y2, second(y1), True)
    return torch.cat([affine(y1, first(x2), True), x2], -1)


class Coupling(nn.Module):
    """The networks ``first`` and ``second`` of :func:`coupled`, each linear, f, linear."""

    def __init__(self, config: InvertibleConfig, width: int) -> None:
        super().__init__()
        halves, outputs = (width // 2, width - width // 2), 2 if config.coupling == "glow" else 1

        def network(inner: int, outer: int) -> nn.Sequential:
            between = max(1, int(inner // config.reduction_factor))
            act = activation(config.non_linearity, "InvertibleConfig: non_linearity")
            return nn.Sequential(nn.Linear(inner, between), act, nn.Linear(between, outer * outputs))

        self.first, self.second = network(halves[1], halves[0]), network(*halves)
        for layer in (*self.first[::2], *self.second[::2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, undo: bool) -> torch.Tensor:
        """y of x, or x of y."""
        return (uncoupled if undo else coupled)(x, self.first, self.second)


class CouplingLayer(BlockLayer, nn.Module):
    """Wraps the first block of a stack, or the head of a language model: what it is given is changed.

    Several active adapters follow each other; before the head the last one is undone first.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = first_input(self.base_layer, args, kwargs)
        acting = self.acting(x)
        for adapter, rows in reversed(acting) if self.at_head else acting:  # what came last is undone first
            new = adapter.change(adapter.cast(rows_of(x, rows))).to(x.dtype)
            x = new if rows is None else x.index_copy(0, rows, new)
        args, kwargs = with_first_input(self.base_layer, args, kwargs, x) if acting else (args, kwargs)
        return self.base_layer(*args, **kwargs)

    @property
    def at_head(self) -> bool:
        """Whether it stands at the head, not at a block."""
        return "block" not in self.__dict__


class Invertible(BlockAdapter):
    """g and its inverse; the places of one width have one coupling."""

    layer_base: ClassVar[Any] = CouplingLayer
    invertible_coupling = part(nn.ModuleDict)
    undoes = setting()

    @classmethod
    def share(cls, config: InvertibleConfig, layers: Sequence[Any]) -> dict[str, Any]:
        widths = [width_of(layer.get_base_layer()) for layer in layers]
        known = {width: Coupling(config, width) for width in dict.fromkeys(widths)}
        return {"invertible_coupling": [known[width] for width in widths], "undoes": [x.at_head for x in layers]}

    def create(self, config: InvertibleConfig, key: str) -> None:
        """All is made by :meth:`share`."""

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """g(x) at a block, g^-1(x) at the head; ``[..., width]``."""
        return self.invertible_coupling(x, self.undoes)


class InvertibleTuner(BlockTuner):
    """Applies invertible adapters where a stack of blocks begins, and to the head."""

    def find(self, config: InvertibleConfig, model: nn.Module) -> list[Target]:
        """The first block of each stack (an encoder's and a decoder's), which reads the embeddings; and the head."""
        blocks = find_blocks(model)
        if not blocks:
            raise NoMatchingPeftModuleError(
                f"InvertibleConfig changes what blocks read, and {type(model).__name__} has 0 transformer blocks."
            )
        firsts: dict[tuple[str, ...], Target] = {}
        for block in blocks:
            names = block.key.split(".")
            number = next(i for i, name in enumerate(names) if name.isdigit())  # stages are of one stack
            target = BlockTarget(block.key, locate(model, block.key).module, block=block)
            firsts.setdefault(tuple(names[:number]), target)
        found, head = list(firsts.values()), embeddings_of(model)[1]
        heads = [Target(site.key, head) for site in walk(model) if config.invert_output and site.module is head]
        widths = [width_of(target.module) for target in found]
        if heads and (width := width_of(heads[0].module)) not in widths:
            raise ConfigError(
                f"InvertibleConfig: the head {heads[0].key} reads {width} features, and the blocks {widths[-1]}, so "
                "no inverse can stand before it; set invert_output=False."
            )
        return found + heads

    def targets_of(self, config: Any, model: nn.Module) -> list[Target]:
        return self.find(config, model)  # also those whose coupling a file holds under the name of another place


InvertibleModel = define_tuner(Invertible, InvertibleConfig, base=InvertibleTuner)

"""Modules placed in, beside or after a transformer block: where the parts of a block are, and how they are reached."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from peft.core.adapter import Adapter
from peft.core.addition import Addition, NoSum
from peft.core.base.kinds import kind_of
from peft.core.base.rows import rows_of, with_rows_added
from peft.core.layer.composed import Change, Composed, change_of, made_of
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.roles import entries_around, find_roles
from peft.core.model.targeting import Target
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import Holders, Site, join, unwrapped, walk


ATTENTION, CROSS, FEEDFORWARD = "attention", "cross", "feedforward"


@dataclass
class SubLayer:
    """One sub-layer of a transformer block: what lies between two additions to the residual stream.

    Attributes:
        role: :data:`ATTENTION`, :data:`CROSS` (attention to an encoder's output), or :data:`FEEDFORWARD`.
        first, last: names, below the block, of the modules that its input enters, and that its output leaves.
        core: for attentions, the name of the module that holds the projections.
    """

    role: str
    first: str
    last: str
    core: str = ""


@dataclass
class Block:
    """One transformer block: its name, its number among all blocks of the model, and its sub-layers in order.

    Attributes:
        norms: names, below the block, of its normalisations; those inside an attention are not its own.
    """

    key: str
    index: int
    sublayers: list[SubLayer]
    norms: list[str] = field(default_factory=list)


def find_blocks(model: nn.Module) -> list[Block]:
    """The transformer blocks of a model, in its order; empty where it has none.

    A block is an entry of a list of modules that holds an attention (a module with projections to values and to
    queries or keys) and, apart from it, weights of another part: the feed-forward network. The innermost such entry is
    meant.
    """
    sites = {site.key: site for site in walk(model)}
    all_norms = set(find_roles(model, ("norm",)))
    attentions: dict[str, None] = {}
    for key in find_roles(model, ("value",)):
        whole = isinstance(sites[key].module, nn.MultiheadAttention)
        attentions[key if whole else key.rpartition(".")[0]] = None
    blocks: dict[str, Block] = {}
    for attention in attentions:
        for key in entries_around(attention, sites):
            if key in blocks:  # by another attention of it
                break
            inside = [other for other in attentions if other.startswith(f"{key}.")]
            sublayers = _sublayers(key, sites, all_norms, inside)
            if any(part.role == FEEDFORWARD for part in sublayers):
                norms = [k.removeprefix(f"{key}.") for k in _norms(key, all_norms, inside)]
                blocks[key] = Block(key, 0, sublayers, norms)
                break
    order = {key: place for place, key in enumerate(sites)}
    found = sorted(blocks.values(), key=lambda block: order[block.key])
    for index, block in enumerate(found):
        block.index = index
    return found


def _children(key: str, sites: dict[str, Site]) -> list[str]:
    """Names of the modules right below one; lists and dicts of modules are seen through."""
    found = []
    for name in sites[key].module._modules:
        child = join(key, name)
        if child in sites:
            container = isinstance(sites[child].module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
            found += _children(child, sites) if container else [child]
    return found


def _norms(key: str, norms: set[str], attentions: list[str]) -> list[str]:
    """Normalisations below a module that are not inside an attention."""
    return [
        norm
        for norm in norms
        if norm.startswith(f"{key}.") and not any(norm.startswith(f"{attention}.") for attention in attentions)
    ]


def _weighty(key: str, sites: dict[str, Site]) -> bool:
    """Whether a module holds a matrix; one that only scales or shifts is no part of its own."""
    shapes = [getattr(p, "ds_shape", p.shape) for p in sites[key].module.parameters()]  # ZeRO-3 leaves them empty
    return any(len(shape) > 1 for shape in shapes)


def _parts(key: str, sites: dict[str, Site], norms: set[str]) -> list[str]:
    """A module, or what it consists of where it holds a normalisation beside its weights."""
    children = _children(key, sites)
    if not norms & set(children):
        return [key]
    return [part for child in children for part in _parts(child, sites, norms)]


def _sublayers(key: str, sites: dict[str, Site], norms: set[str], attentions: list[str]) -> list[SubLayer]:
    """Attentions in their order, then the feed-forward network."""
    found: list[SubLayer] = []
    rest: list[str] = []
    for branch in _children(key, sites):
        held = [other for other in attentions if other == branch or other.startswith(f"{branch}.")]
        if held:
            # The second attention of a block reads the encoder's output.
            found.append(_attention(branch, held[0], sites, norms, CROSS if found else ATTENTION))
        else:
            rest += [p for p in _parts(branch, sites, norms) if _weighty(p, sites) and p not in norms]
    if rest:
        found.append(SubLayer(FEEDFORWARD, rest[0], rest[-1]))
    for part in found:
        part.first, part.last, part.core = (
            name.removeprefix(f"{key}.") for name in (part.first, part.last, part.core)
        )
    return found


def _attention(branch: str, core: str, sites: dict[str, Site], norms: set[str], role: str) -> SubLayer:
    """The attention in a branch of a block: the branch whole, or without the normalisation that it holds."""
    if branch == core or not _norms(branch, norms, [core]):
        return SubLayer(role, branch, branch, core)
    # BERT's holds the norm of the sum as well: its output is that of the last matrix before this norm.
    outside = [k for k in sites if k.startswith(f"{branch}.") and not k.startswith(f"{core}.") and k != core]
    leaves = [k for k in outside if not sites[k].module._modules and _weighty(k, sites)]
    return SubLayer(role, core, leaves[-1] if leaves else core, core)


class BlockLayer(BaseTunerLayer):
    """The family of layers around a whole module, in which adapters act on what it computes. No weight equals them.

    A method overrides :meth:`forward`, or acts from inside the module (:class:`InsertLayer`). A mixed batch is never
    torn apart: the module runs once, and each adapter acts on its own rows (:meth:`acting`, :meth:`added`).

    Attributes:
        skipped: its adapters do nothing just now, while what they share with other blocks goes on.
        composes: it acts through :func:`change_of`, so its adapters can be averaged, fused and the like. Elsewhere a
            stack means that its members act as several active adapters do.
    """

    block: Block
    skipped = False
    composes: ClassVar[bool] = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def acting(self, x: torch.Tensor, held: Mapping[str, Any] | None = None) -> list[tuple[Any, torch.Tensor | None]]:
        """What acts on a batch ``[batch, ...]``, each with the rows that are its own (None: all).

        Args:
            held: adapter name -> what stands for it; by default the adapters of this layer.
        """
        if self._disable_adapters or (self.skipped and held is None):
            return []
        context = self.context
        names = self._active_adapter if context.current is None else context.current
        parts: list[tuple[Any, torch.Tensor | None]] = [(name, None) for name in names]
        if context.is_mixed:
            groups = context.groups(context.adapter_names or (), x.shape[0], x.device).parts
            parts = [(name, rows if len(groups) > 1 else None) for name, rows in groups]
        if self.composes and held is None:
            return [(found, rows) for name, rows in parts if (found := made_of(self, name)) is not None]
        held = self.adapters if held is None else held
        single = {name: value for name, value in held.items() if not isinstance(value, Composed)}
        return [(single[one], rows) for name, rows in parts for one in context.behind([name]) if one in single]

    def added(
        self,
        onto: torch.Tensor,
        state: torch.Tensor,
        step: Callable[..., Change | None],
        *given: torch.Tensor,
        place: str = "output",
        derive: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """``onto`` ``[batch, ...]`` and what each adapter changes of a state, of its own rows.

        Args:
            step: ``step(adapter, state, *given)`` is what one adapter changes.
            place: which of the places in the block it is.
            derive: what the first of ``given`` is for a state that other members of a stack have changed.
        """
        for adapter, rows in self.acting(onto):
            first, *rest = (rows_of(x, rows) for x in (state, *given))

            def own(leaf: Any, now: torch.Tensor, first: torch.Tensor = first, rest: Any = rest) -> Change | None:
                made = rest if derive is None or now is first else [derive(now), *rest[1:]]
                return step(leaf, *(leaf.cast(x) for x in (now, *made)))

            with self.context.on_rows(rows, len(onto)):
                change = change_of(adapter, first, own, place)
            if change is not None:
                onto = with_rows_added(onto, change.total.to(onto.dtype), rows)
        return onto

    def widths(self, adapters: Sequence[Any]) -> dict[str, int]:
        """The places at which these adapters change something: name -> features there."""
        return {"output": width_of(self.get_base_layer())}


class BlockAdapter(Adapter):
    """An adapter that acts on what a whole module computes."""

    any_module = True
    layer_base: ClassVar[Any] = BlockLayer
    adds: ClassVar[Addition] = NoSum()

    @property
    def block(self) -> Block:
        """The block that the layer wraps."""
        return self.layer.block

    def unmergeable(self) -> str | None:
        return "it acts on what a whole module computes, so no one weight equals it"


def first_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The tensor that a call hands over first, by position or by name."""
    return args[0] if args else kwargs[_first_name(module)]


def with_first_input(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], new: torch.Tensor
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with another tensor in the place of :func:`first_input`."""
    if args:
        return (new, *args[1:]), kwargs
    return args, {**kwargs, _first_name(module): new}


def _first_name(module: nn.Module) -> str:
    inner = unwrapped(module)
    if "forward" in inner.__dict__ or torch.compiler.is_compiling():  # replaced by somebody; and nothing is looked up
        return next(iter(inspect.signature(inner.forward).parameters))
    return [*signature_of(type(inner).forward).parameters][1]


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function that stands in a class, found once: each call of a block asks for it."""
    return (inspect.signature if torch.compiler.is_compiling() else _signature)(function)


_signature = functools.cache(inspect.signature)


def first_output(output: Any) -> torch.Tensor:
    """The tensor that a module computes, alone or before others."""
    return output if isinstance(output, torch.Tensor) else output[0]


def with_first(output: Any, new: torch.Tensor) -> Any:
    """The output with another tensor in the first place."""
    return new if isinstance(output, torch.Tensor) else type(output)((new, *output[1:]))


def width_of(module: nn.Module) -> int:
    """Features of the hidden states that a block or an attention takes: the input of its first linear layer."""
    kinds = ((site.module, kind_of(site.module)) for site in walk(module))
    return next(kind.sizes(layer)[0] for layer, kind in kinds if kind is not None and not kind.lookup)


@dataclass
class BlockTarget(Target):
    """A whole block to adapt."""

    block: Block | None = None


class BlockTuner(BaseTuner):
    """Applies a method to modules that are found by the structure of the model: :meth:`find`."""

    def find(self, config: Any, model: nn.Module) -> list[Target]:
        """The modules that the config means.

        Raises:
            NoMatchingPeftModuleError: if there are none.
        """
        raise NotImplementedError

    def prepare_config(self, config: Any, model: nn.Module, keys: set[str] | None) -> None:
        self._keys = keys

    def _layer_for(self, model: nn.Module, target: Target, holders: Holders) -> BaseTunerLayer:
        layer = super()._layer_for(model, target, holders)
        if isinstance(target, BlockTarget):
            layer.block = target.block  # type: ignore[assignment]
        return layer

    def targets_of(self, config: Any, model: nn.Module) -> list[Target]:
        found = self.find(config, model)
        return [target for target in found if self._keys is None or target.key in self._keys]

"""Adapters between the sub-layers of a transformer block, whichever way the block orders sums and normalisations.

A sub-layer (an attention, a feed-forward network) reads the residual stream x, and its output h is added to it. Three
orders are in use, N a normalisation. What :func:`find_places` finds of the feed-forward network of

    BERT      x' = N(x + MLP(x))      stream None, out "output.dense", norm "output.LayerNorm"
    LLaMA     x' = x + MLP(N(x))      stream "post_attention_layernorm", out "mlp", norm None
    Gemma 3   x' = x + N2(MLP(N(x)))  stream "pre_feedforward_layernorm", out "post_feedforward_layernorm", norm None

``out`` is the module whose output is h, so that Gemma's second norm belongs to the sub-layer; ``norm`` takes the sum
x + h; x itself is what ``stream`` takes, or the sub-layer where there is none. An adapter after the sub-layer that
reads h (Houlsby's) then gives

    BERT      x' = N(x + h + u(h))    by a change of h, at the hook of ``out``
    LLaMA     x' = x + h + u(h)       in the same way; Gemma's h is that after N2

and one that reads N(x + h) (Pfeiffer's) waits for the hook of ``norm`` in BERT, and reads h + x in the other two.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from threading import RLock
from typing import Any, ClassVar

import torch
from torch import nn

from peft.core.blocks.blocks import (
    Block,
    BlockAdapter,
    BlockLayer,
    BlockTarget,
    BlockTuner,
    SubLayer,
    find_blocks,
    first_input,
    first_output,
    width_of,
    with_first,
)
from peft.core.layer.composed import Change
from peft.core.model.threads import OfThread
from peft.core.model.walk import locate, parent_of
from peft.errors import NoMatchingPeftModuleError
from peft.meanwhile import in_mode
from peft.usage import note


class Seen(OfThread):
    """Tensors of the call under way in this thread: the stream ``x``, and ``input``, the sub-layer's own input."""

    x: torch.Tensor
    input: torch.Tensor


@dataclass
class Place:
    """Where a sub-layer meets the residual stream x: x + h, or N(x + h), with h its output.

    Attributes:
        stream: name of the normalisation whose input is x; None where the sub-layer reads x itself.
        out: name of the module whose output is h.
        norm: name of the normalisation N of the sum, None where there is none.
        seen: tensors of the call under way.
    """

    part: SubLayer
    stream: str | None
    out: str
    norm: str | None
    seen: Seen = field(default_factory=Seen, repr=False)


@dataclass(frozen=True)
class Joint:
    """How an inserted module u is joined to a sub-layer's output h, the stream x, and the norm N of their sum.

    Attributes:
        beside: u reads the sub-layer's input, and its output is added to h. The rest is for modules that come after.
        reads_sum: u reads N(h + x), or h + x where there is no N; else h.
        residual: what is added to the output of a module that reads the sum: "output" (h), "sum" (h + x), or "normed"
            (what it reads).
        sums: x is added to the result, and N applied.
    """

    beside: bool = False
    reads_sum: bool = False
    residual: str = "output"
    sums: bool = True

    @property
    def kept(self) -> str:
        """What u(...) is added to: "output", "sum" or "normed"; a module that reads h alone keeps h."""
        return self.residual if self.reads_sum else "output"

    @property
    def needs_norm(self) -> bool:
        """Whether the module reads what the norm of the sum gives, or stands in for it."""
        return not self.beside and (self.reads_sum or not self.sums)


_STREAMS = {
    # (what u is added to, whether x is added to the result): how often x is added to u, to which the block adds h + x
    ("output", True): 0,  #  x' = (h + u) + x
    ("output", False): -1,  # x' = h + u
    ("sum", True): 1,  #      x' = (h + x + u) + x
    ("sum", False): 0,  #     x' = h + x + u
    ("normed", True): 1,  #   without a norm of the sum, "normed" is the sum
    ("normed", False): 0,
}


_FINDING = RLock()  # one thread at a time: what it hooks is called by all of them


@dataclass(eq=False)
class _Event:
    """A call noticed while a block was observed."""

    what: str  # "in" or "out" of a sub-layer, or "norm"
    name: str
    given: torch.Tensor
    result: torch.Tensor


class InsertLayer(BlockLayer):
    """Wraps a block and inserts modules after, or beside, its sub-layers: those of :class:`Insert` adapters.

    What comes in which order is read off the block's first call, by what each of its normalisations takes and gives:
    before a sub-layer (LLaMA, GPT-2, T5), after the sum (BERT, BART), or before the sum (Gemma 3, OLMo 2). Of several
    active adapters, each adds what it changes on its own.
    """

    composes: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._places: list[Place] = []
        self._slots: list[tuple[nn.Module, str, nn.Module]] = []  # what is hooked, and where it was then
        self._handles: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._disable_adapters and not self._is_attached():
            with _FINDING:
                if not self._places:
                    self._places = find_places(self.base_layer, self.block, args, kwargs)
                self._attach()
        return self.base_layer(*args, **kwargs)

    # --- what becomes of the sums -----------------------------------------------------------------------------
    def _at_output(self, place: Place, h: torch.Tensor) -> torch.Tensor:
        """A sub-layer's output, before x is added to it."""
        role = place.part.role

        def step(adapter: Insert, h: torch.Tensor, x: torch.Tensor, given: torch.Tensor) -> Change | None:
            joint = adapter.joint(role)
            if joint is None or (place.norm is not None and joint.needs_norm):
                return None
            if joint.beside:
                return Change(adapter.change(role, given, h), given)
            kept = h if joint.kept == "output" else h + x
            read = h + x if joint.reads_sum else h
            streams = _STREAMS[joint.kept, joint.sums]
            return Change(adapter.change(role, read, kept), read, streams * x if streams else None)

        return self.added(h, h, step, place.seen.x, place.seen.input, place=role)

    def _at_norm(self, place: Place, z: torch.Tensor, y: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """y = N(z), where z = h + x."""
        role = place.part.role

        def change(inside: bool, adapter: Insert, z: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> Change | None:
            joint = adapter.joint(role)
            if joint is None or not joint.needs_norm or inside != joint.sums:
                return None
            h = z - x  # z may be changed by members of a stack already
            kept, read = {"output": h, "sum": z, "normed": y}[joint.kept], y if joint.reads_sum else h
            replaced = h if inside else y
            return Change(adapter.change(role, read, kept), read, None if kept is replaced else kept - replaced)

        inner = self.added(z, z, partial(change, True), y, place.seen.x, place=role, derive=norm.forward)
        # By `forward`: this runs in a hook of the norm, and a call of it would start the hooks again.
        outer = y if inner is z else norm.forward(inner)
        return self.added(outer, y, lambda a, y, z, x: change(False, a, z, y, x), z, place.seen.x, place=role)

    def widths(self, adapters: Sequence[Any]) -> dict[str, int]:
        width = width_of(self.get_base_layer())
        roles = dict.fromkeys(part.role for part in self.block.sublayers)
        return {role: width for role in roles if any(adapter.joint(role) is not None for adapter in adapters)}

    # --- hooks ------------------------------------------------------------------------------------------------
    def _is_attached(self) -> bool:
        """Whether the modules of the block are hooked as they are now: others may have wrapped them meanwhile."""
        return bool(self._slots) and all(parent._modules.get(name) is m for parent, name, m in self._slots)

    def _attach(self) -> None:
        """Hook the modules of the block, unless another thread has done so."""
        if self._is_attached():
            return
        self.release()
        slots: list[tuple[nn.Module, str, nn.Module]] = []
        for place in self._places:
            first = self._slot(place.part.first, slots)
            self._handles.append(first.register_forward_pre_hook(partial(self._enter, place), with_kwargs=True))
            if place.stream is not None:
                stream = self._slot(place.stream, slots)
                self._handles.append(stream.register_forward_pre_hook(partial(self._note_stream, place)))
            self._handles.append(self._slot(place.out, slots).register_forward_hook(partial(self._leave, place)))
            if place.norm is not None:
                self._handles.append(self._slot(place.norm, slots).register_forward_hook(partial(self._normed, place)))
        self._slots = slots  # last, as threads that find them do not wait for the hooks

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._slots = [], []

    def _slot(self, name: str, slots: list[tuple[nn.Module, str, nn.Module]]) -> nn.Module:
        """The module called so, with all wrappers around it; it is noted among the slots."""
        path = outermost(self.base_layer, name)
        parent, attribute = parent_of(self.base_layer, path)
        module = parent._modules[attribute]
        assert module is not None
        slots.append((parent, attribute, module))
        return module

    def _enter(self, place: Place, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._disable_adapters:
            place.seen.input = first_input(module, args, kwargs)
            if place.stream is None:
                place.seen.x = place.seen.input

    def _note_stream(self, place: Place, module: nn.Module, args: tuple) -> None:
        if not self._disable_adapters:
            place.seen.x = args[0]

    def _leave(self, place: Place, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._disable_adapters:
            return output
        output = with_first(output, self._at_output(place, first_output(output)))
        if place.norm is None:
            place.seen.__dict__.clear()
        return output

    def _normed(self, place: Place, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if self._disable_adapters:
            return output
        output = self._at_norm(place, args[0], output, module)
        place.seen.__dict__.clear()
        return output


class Insert(BlockAdapter):
    """An adapter with a module for each sub-layer of some roles. A method defines these two."""

    layer_base: ClassVar[Any] = InsertLayer

    def joint(self, role: str) -> Joint | None:
        """How the module for sub-layers of this role is joined; None where it has none."""
        raise NotImplementedError

    def change(self, role: str, h: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """u(h), which is to be added to ``residual``; both ``[batch, ..., width]``."""
        raise NotImplementedError


class InsertTuner(BlockTuner):
    """Applies a method to the blocks that have a sub-layer of a kind in ``config.roles()``, but for those of the
    numbers in ``config.leave_out``."""

    def find(self, config: Any, model: nn.Module) -> list[BlockTarget]:  # type: ignore[override]
        blocks, roles = find_blocks(model), config.roles()
        note(config.leave_out, [block.index for block in blocks])
        chosen = [
            block
            for block in blocks
            if block.index not in config.leave_out and any(part.role in roles for part in block.sublayers)
        ]
        if not chosen:
            raise NoMatchingPeftModuleError(
                f"{type(config).__name__} places nothing in {type(model).__name__}: it has {len(blocks)} transformer "
                f"blocks, of which leave_out={config.leave_out} are left out, and what is asked for stands at "
                f"{', '.join(roles) or 'no sub-layer'}."
            )
        return [BlockTarget(block.key, locate(model, block.key).module, block=block) for block in chosen]


def outermost(block: nn.Module, name: str) -> str:
    """The path of what stands in a block in the place called ``name``, wrapped or not."""
    site = locate(block, name)
    return site.wrappers[0][0] if site.wrappers else site.path


def find_places(block: nn.Module, shape: Block, args: tuple, kwargs: dict[str, Any]) -> list[Place]:
    """Where the sub-layers of a block meet the residual stream, by one more call of the block, in evaluation mode."""
    events, output = _observe(block, shape, args, kwargs)
    # Backwards, so that of equal marks the first stays.
    marks = {(event.what, event.name): i for i, event in reversed(list(enumerate(events)))}
    parts = [part for part in shape.sublayers if ("in", part.first) in marks and ("out", part.first) in marks]
    parts.sort(key=lambda part: marks["in", part.first])
    ends = [*(marks["in", part.first] for part in parts[1:]), len(events)]
    owns: list[_Event] = []  # normalisations of a sub-layer's output alone
    outs: list[tuple[SubLayer, str, _Event | None]] = []
    for part, until in zip(parts, ends):
        out = marks["out", part.first]
        after = [event for event in events[out + 1 : until] if event.what == "norm"]
        if after and _same(after[0].given, events[out].result):
            owns.append(after.pop(0))
            outs.append((part, owns[-1].name, after[0] if after else None))
        else:
            outs.append((part, part.last, after[0] if after else None))
    last = outs[-1][2] if outs else None
    summed = last is not None and _same(last.result, output)  # the block ends in the normalisation of a sum
    found = []
    for part, out_name, after_sum in outs:
        start = marks["in", part.first]
        read = [e for e in events[:start] if e.what == "norm" and _same(e.result, events[start].given)]
        stream = None if summed or not read or read[-1] in owns else read[-1].name
        found.append(Place(part, stream, out_name, after_sum.name if summed and after_sum else None))
    return found


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b or a.shape != b.shape:
        return a is b
    if a.is_meta:  # no values to compare
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return torch.equal(a, b)


def _observe(block: nn.Module, shape: Block, args: tuple, kwargs: dict[str, Any]) -> tuple[list[_Event], torch.Tensor]:
    """The calls in a block in their order, and its output; nothing is kept in caches."""
    events: list[_Event] = []

    def enter(part: SubLayer, module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        x = first_input(module, given, named)
        events.append(_Event("in", part.first, x, x))

    def leave(part: SubLayer, module: nn.Module, given: tuple, output: Any) -> None:
        events.append(_Event("out", part.first, first_output(output), first_output(output)))

    def note(name: str, module: nn.Module, given: tuple, output: Any) -> None:
        events.append(_Event("norm", name, given[0], output))

    # Dropout would draw from the user's generator, and tensors that are compared would differ.
    with ExitStack() as hooks, in_mode(block, training=False), torch.no_grad():
        for part in shape.sublayers:
            first, last = (block.get_submodule(outermost(block, name)) for name in (part.first, part.last))
            hooks.enter_context(first.register_forward_pre_hook(partial(enter, part), with_kwargs=True))
            hooks.enter_context(last.register_forward_hook(partial(leave, part)))
        for name in shape.norms:
            norm = block.get_submodule(outermost(block, name))
            hooks.enter_context(norm.register_forward_hook(partial(note, name)))
        # The least that works: a block may insist on its mask, or on the cache for which positions were made.
        for seen in (_bare, _without_cache, _beside_cache):
            try:
                output = block(*map(seen, args), **{k: seen(v, k) for k, v in kwargs.items()})
                break
            except Exception:
                events.clear()
                if seen is _beside_cache:
                    raise
    return events, first_output(output)


def _bare(value: Any, name: str = "") -> Any:
    """An argument of a block without what it keeps for later calls, and without masks, which may be made for those."""
    return None if name.endswith("mask") else _without_cache(value)


def _without_cache(value: Any, name: str = "") -> Any:
    return None if hasattr(value, "get_seq_length") else value


def _beside_cache(value: Any, name: str = "") -> Any:
    """An argument of a block, a cache as a copy: positions and masks may be made for all that it holds."""
    if not hasattr(value, "get_seq_length"):
        return value
    twin = copy.copy(value)
    for key, held in vars(twin).items():
        copied = list(map(copy.copy, held)) if key == "layers" else dict(held) if isinstance(held, dict) else held
        vars(twin)[key] = _beside_cache(copied)
    return twin

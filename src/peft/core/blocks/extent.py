"""Where the texts of a batch begin and end among the tokens of a stack of blocks: padded, cached, generated ones."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from peft.core.blocks.blocks import CROSS, find_blocks
from peft.core.model.context import Context
from peft.core.model.record import context_of, record_of
from peft.core.model.sequence import ARGUMENTS, cache_of, length_of
from peft.core.model.threads import Common, Facts
from peft.core.model.walk import locate


class Positions(NamedTuple):
    """Some tokens of each row.

    Attributes:
        index: which of the call's own tokens, ``[batch, positions]``.
        valid: whether the row has that one among them, ``[batch, positions]``; where not, the index means nothing.
    """

    index: torch.Tensor
    valid: torch.Tensor


class Bounds(NamedTuple):
    """Columns of each row's text, ``[batch]`` each, counted from the beginning of what the cache holds.

    Attributes:
        first: that of its first token. last: the one behind its last. prompt: the one behind its prompt's last.
    """

    first: torch.Tensor
    last: torch.Tensor
    prompt: torch.Tensor


def ends_of(bounds: Bounds, before: int, tokens: int, first: int, last: int) -> Positions:
    """The first positions of each text and the last of its prompt, none of them twice.

    Args:
        before: how many tokens stand in the cache. tokens: how many are the call's own.
        first, last: how many; where a prompt has fewer than both, its first ones are what the last ones leave.
    """
    device = bounds.first.device
    head = bounds.first[:, None] + torch.arange(first, device=device)
    end = bounds.prompt[:, None]
    tail = end - last + torch.arange(last, device=device)
    free = (head < end - last) | (head >= end)
    valid = torch.cat([free & (head < bounds.last[:, None]), tail >= bounds.first[:, None]], 1)
    index = torch.cat([head, tail], 1) - before
    valid &= (index >= 0) & (index < tokens)
    return Positions(index.clamp(0, tokens - 1), valid)


class StackOfBlocks(Common):
    """A stack of blocks.

    Attributes:
        writes, caches: its model generates, and keeps caches.
        decodes: it is that of a decoder beside an encoder.
    """

    def __init__(self, context: Context, writes: bool, caches: bool, decodes: bool) -> None:
        super().__init__()
        self.context, self.writes, self.caches, self.decodes = context, writes, caches, decodes

    def __reduce__(self) -> Any:
        return StackOfBlocks, (self.context, self.writes, self.caches, self.decodes)

    def nothing(self) -> dict[str, Any]:
        return {"mask": None, "before": 0, "depth": 0, "found": {}}


class Extent(Facts):
    """What the calls of the modules that hold a stack of blocks tell of its tokens.

    The prompt ends where ``generate`` begins to write, or, in a call with a label for each token, where labels begin
    to count. Otherwise the whole text of the call that fills an empty cache is the prompt.

    Attributes:
        mask: the ``attention_mask``, ``[batch, tokens]`` with those in the cache, or as a model prepares it,
            ``[batch, 1, tokens, tokens]``; None where nothing is padded.
        before: how many tokens stand in the cache.
        depth: how far in the module is that told last.
        found: what was worked out for the call.
    """

    common: StackOfBlocks
    mask: torch.Tensor | None
    before: int
    depth: int
    found: dict[tuple, Positions | None]

    def note(self, depth: int, names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook of a module that holds the stack; one further in comes later, and knows better."""
        self.begin()
        given = {**dict(zip(names, args)), **kwargs}
        if depth <= self.depth:  # a new call
            self.mask, self.before = None, 0
        self.depth = depth
        self.found.clear()
        mask, cache = given.get("attention_mask"), cache_of(given)
        # one for each kind of attention, all padded alike
        mask = next(iter(mask.values()), None) if isinstance(mask, dict) else mask
        # A mask of two dimensions says more than one that a model has prepared from it further in.
        if isinstance(mask, torch.Tensor) and (mask.dim() == 2 or self.mask is None):
            self.mask = mask
        if cache is not None:
            self.before = length_of(cache)

    def ends(self, h: torch.Tensor, first: int, last: int) -> Positions | None:
        """The first and the last positions of each row's text, for hidden states ``[batch, tokens, width]``.

        None where all of them were in earlier calls: what a decoder goes on to write costs nothing.

        Raises:
            ValueError: if the hidden states, or the mask, have other tokens than the call.
        """
        key = (first, last, h.shape[:2], h.device)
        if key not in self.found:
            self._check(h)
            # Asking for any valid one waits for the device; a call that fills an empty cache always has some.
            found = ends_of(self._bounds(h), self.before, h.shape[1], first, last)
            self.found[key] = found if not self.before or bool(found.valid.any()) else None
        return self.found[key]

    def positions(self, h: torch.Tensor) -> torch.Tensor:
        """Where each token stands in its row's text, ``[batch, tokens]``, below 0 in the padding before it.

        Args:
            h: ``[batch, tokens, width]``.
        """
        self._check(h)
        columns = torch.arange(self.before, self.before + h.shape[1], device=h.device)
        return columns - self._bounds(h).first[:, None]

    def _check(self, h: torch.Tensor) -> None:
        if h.dim() != 3:
            raise ValueError(f"hidden states {list(h.shape)} are not [batch, tokens, width]: no axis is of tokens.")

    def _bounds(self, h: torch.Tensor) -> Bounds:
        (batch, tokens), before = h.shape[:2], self.before
        width = before + tokens
        context = self.common.context
        most, lead = context.lead_of(self.common.decodes, batch, h.device)  # virtual tokens are no part of a text
        first, last = lead, torch.full_like(lead, width)
        if self.mask is not None:
            mask = context.of_rows("attention_mask", _padding(self.mask, before, tokens), batch, h.device)
            mask = mask & (torch.arange(width, device=h.device) >= lead[:, None])
            first = mask.int().argmax(1)  # of equal ones it gives the first
            last = torch.where(mask.any(1), width - mask.flip(1).int().argmax(1), 0)
        return Bounds(first, last, self._prompt(first, last, tokens, most))

    def _prompt(self, first: torch.Tensor, last: torch.Tensor, tokens: int, lead: int) -> torch.Tensor:
        """The column behind the last of each prompt, ``[batch]``."""
        ids, labels = self.common.context.prompt, self.common.context.labels
        if ids is not None and self.common.caches:
            return last.clamp(max=lead + ids.shape[1])
        if self.before > lead:  # the prompt was in earlier calls
            return torch.zeros_like(last)
        if labels is None or not self.common.writes or labels.shape[1] != tokens:
            return last
        counts = self.common.context.of_rows("labels", labels, len(last), last.device) != -100
        start = self.before + counts.int().argmax(1)
        return torch.where(counts.any(1) & (start > first), start, last)


def _padding(mask: torch.Tensor, before: int, tokens: int) -> torch.Tensor:
    """Whether a column holds a token, ``[batch, before + tokens]``.

    In a prepared mask each token sees itself, unless it is padding, and the last one sees those in the cache.
    """
    if mask.dim() > 2:
        seen = mask if mask.dtype == torch.bool else mask >= 0
        seen = seen.reshape(len(mask), -1, *mask.shape[-2:])[:, 0].expand(-1, tokens, -1)
        if seen.shape[-1] >= before + tokens:
            own = seen[..., before : before + tokens].diagonal(dim1=1, dim2=2)
            return torch.cat([seen[:, -1, :before], own], 1)
    if mask.dim() != 2 or mask.shape[1] != before + tokens:
        raise ValueError(
            f"the attention_mask {list(mask.shape)} does not tell which of {tokens} tokens are padding, with {before} "
            "in the cache. Give one of shape [batch, tokens], those in the cache included."
        )
    return mask != 0


def extent_of(model: nn.Module, stack: str) -> Extent:
    """What is known of the tokens of a stack of blocks; the modules that hold it, and no other stack, tell.

    Args:
        stack: name of the list of blocks.
    """
    extents = record_of(model).extents
    if stack in extents:
        return extents[stack]
    blocks = find_blocks(model)
    others = {block.key.rpartition(".")[0] for block in blocks} - {stack}
    own = (part for block in blocks if block.key.rpartition(".")[0] == stack for part in block.sublayers)
    decodes = any(part.role == CROSS for part in own)
    parts = stack.split(".")
    above = [".".join(parts[:end]) for end in range(len(parts))]
    above = [name for name in above if not any(other.startswith(f"{name}." if name else "") for other in others)]
    holders = [locate(model, name).module if name else model for name in above]
    holders = [module for module in holders if not isinstance(module, nn.ModuleList | nn.Sequential)]
    signatures = [tuple(inspect.signature(module.forward).parameters) for module in holders]
    generates = getattr(model, "can_generate", None)
    caches = any(name in ARGUMENTS for names in signatures for name in names)
    extent = extents[stack] = Extent(
        StackOfBlocks(context_of(model), generates is not None and generates(), caches, decodes)
    )
    record_of(model).hooks += tuple(
        module.register_forward_pre_hook(partial(extent.note, depth, names), with_kwargs=True)
        for depth, (module, names) in enumerate(zip(holders, signatures))
    )
    return extent

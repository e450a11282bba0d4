"""aLoRA: LoRA from the last invocation sequence of a row on; all before it is the base model (arXiv 2504.12397)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from peft.core.adapter import setting
from peft.core.base.kinds import Kind
from peft.core.model.sequence import Tokens
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.initialize import rewrites
from peft.tuners.lora.layer import Lora


class Span(NamedTuple):
    """Where an adapter acts in a layer's input.

    Attributes:
        first: the first position at which it acts in some row.
        mask: whether it acts, ``[rows, positions from first on]`` (of tokens laid out as rows ``[rows]``); None where
            it does everywhere from there on.
        places: the tokens at which it acts, numbered through all rows.
    """

    first: int
    mask: torch.Tensor | None
    places: torch.Tensor


def last_occurrence(ids: torch.Tensor, sequence: Sequence[int], segments: torch.Tensor | None = None) -> torch.Tensor:
    """Where a sequence of token ids begins for the last time in each row, ``[batch, 1]``; -1 where it does not occur.

    Args:
        ids: ``[batch, tokens]``.
        segments: where a row holds several texts, which of them each token is of, ``[batch, tokens]``; then the answer
            is one for each token, ``[batch, tokens]``, about the text that it is of.
    """
    n = len(sequence)
    if ids.shape[1] < n:
        return ids.new_full((len(ids), 1), -1)
    here = (ids.unfold(1, n, 1) == ids.new_tensor(sequence)).all(-1)  # [batch, tokens - n + 1]
    place = torch.arange(here.shape[1], device=ids.device)
    if segments is None:
        return torch.where(here, place, -1).amax(1, keepdim=True)
    first, last = segments[:, : here.shape[1]], segments[:, n - 1 :]
    place = torch.where(here & (first == last), place, -1)
    of_text = place.new_full((len(ids), int(segments.max()) + 1), -1).scatter_reduce(1, first, place, "amax")
    return of_text.gather(1, segments)


class ALora(Lora):
    """y' = y + 1[t >= t0] s B A drop(x): t0 is where the invocation sequence begins for the last time in the row.

    Keys and values before t0 are those of the base model, to the last bit, so its cache serves the adapter as well. A
    row without the sequence is the base model's. What ``PeftModel.generate`` adds to a prompt does not move t0.
    """

    option = "alora_invocation_tokens"
    alora_invocation_tokens = setting()

    @classmethod
    def refuses(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        if rewrites(config.init_lora_weights):
            return (
                f"init_lora_weights={config.init_lora_weights!r} changes the base weight, and before its invocation "
                "tokens an aLoRA is the base model as it was"
            )
        if kind.matrix and not kind.read_by_parent or kind.lookup:
            return None
        return (
            "aLoRA (alora_invocation_tokens) acts on some tokens of a row only, and this layer has one weight for all "
            "that it computes. Target linear layers and embeddings"
        )

    def create(self, config: LoraConfig, key: str) -> None:
        super().create(config, key)
        self.alora_invocation_tokens = tuple(config.alora_invocation_tokens or ())
        self.context.common.reads_tokens = True

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        tokens = self.context.tokens
        if tokens is None:  # embeddings were given
            warnings.warn(
                f"the model was called without token ids (input_ids), so the invocation tokens of {self.name!r} "
                "cannot be found in its input, and the adapter does nothing in this call."
            )
            return y
        first, mask, places = self.span(tokens, x)
        if first == 0 and mask is None:
            return super().output(x, y, base_y)
        if type(self) is ALora and self.kind.matrix:
            return self._added(x, y, places)
        if first == 0:
            return torch.where(mask.unsqueeze(-1), super().output(x, y, base_y), y)  # type: ignore[union-attr]
        changed = super().output(x[:, first:], y[:, first:], base_y[:, first:])
        if mask is not None:
            changed = torch.where(mask.unsqueeze(-1), changed, y[:, first:])
        return torch.cat([y[:, :first].to(changed.dtype), changed], 1)

    def _added(self, x: torch.Tensor, y: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """y with the update of the tokens at these places; for the others nothing is computed, and nothing kept."""
        there = x.flatten(0, -2).index_select(0, places)
        update = self.update(self.lora_dropout(there))
        wide = y.to(torch.promote_types(y.dtype, update.dtype))
        # index_add keeps the update for its backward pass, and takes a call for each token
        return wide.flatten(0, -2).index_put((places,), update, accumulate=True).view(y.shape)

    def span(self, tokens: Tokens, x: torch.Tensor) -> Span:
        """Where the adapter acts in this input; worked out once for all layers of a call that have such an input."""
        has_positions = self.kind.lookup or x.dim() > 2
        shape = tuple(x.shape[: 1 + has_positions])
        key = self.name, self.alora_invocation_tokens, shape, x.device
        found = self.context.worked_out
        if key not in found:
            found[key] = self._span(tokens, shape, x.device)
        return found[key]

    def _span(self, tokens: Tokens, shape: tuple[int, ...], device: torch.device) -> Span:
        start = last_occurrence(tokens.ids, self.alora_invocation_tokens, tokens.segments)
        count, never = tokens.own, tokens.before + tokens.own
        start = torch.where(start < 0, never, start) - tokens.before  # among the call's own tokens
        rows = self.context.rows
        if len(shape) == 1:  # tokens laid out as rows
            acts = torch.arange(count, device=start.device) >= start
            total = shape[0] if rows is None else rows[1]
            if total != acts.numel():
                raise ValueError(
                    f"{self.layer.key or 'a layer'} gets {total} rows in a call with {acts.numel()} tokens, so aLoRA "
                    "cannot tell where its invocation tokens stand in them. Leave the layer out of target_modules."
                )
            acts = acts.flatten().to(device)
            acts = acts if rows is None else acts[rows[0]]
            return Span(0, acts, acts.nonzero().flatten())
        batch, length = shape
        skipped = count - length  # by layers that see the last tokens only
        start = self.context.of_rows("input_ids", start, batch, device) - skipped
        acts = torch.arange(length, device=device) >= (start if start.shape[1] == 1 else start[:, skipped:])
        somewhere = acts.any(0)
        first = int(somewhere.int().argmax()) if bool(somewhere.any()) else length
        places, acts = acts.flatten().nonzero().flatten(), acts[:, first:]
        return Span(first, None if bool(acts.all()) else acts, places)

    def unmergeable(self) -> str | None:
        return "aLoRA acts on some tokens only, so no one weight equals it. Keep the adapter unmerged."

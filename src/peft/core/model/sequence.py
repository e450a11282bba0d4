"""The token ids of a call, with those of earlier calls that stand in its cache, for adapters that read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


ARGUMENTS = ("cache", "past_key_values", "past_key_value")
"""What releases of transformers call the cache among the arguments of a forward."""

UNKNOWN = -1  # in the place of the id of a token that entered the cache unseen, or as a vector


def length_of(cache: Any) -> int:
    """How many tokens a cache holds; 0 for None."""
    return 0 if cache is None else int(cache.get_seq_length())


class Tokens(NamedTuple):
    """The tokens of a call.

    Attributes:
        ids: what is known of the text so far, ``[batch, known]``, :data:`UNKNOWN` where it is not.
        before: how many tokens of it stand in the cache already; the call's own are the next.
        own: how many are the call's own.
        segments: which of the texts in its row each token is of, ``[batch, own]``; None where a row is one text.
    """

    ids: torch.Tensor
    before: int
    own: int
    segments: torch.Tensor | None = None


def tokens_of(args: tuple, kwargs: dict[str, Any], prompt: torch.Tensor | None) -> Tokens | None:
    """The tokens of a model's call, None where it is called with something else than ids.

    Args:
        prompt: the text that ``generate`` was given, ``[batch, tokens]``: then no later token counts as known.

    Raises:
        ValueError: if the cache was filled by a batch with other rows.
    """
    own = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(own, torch.Tensor) or own.dim() != 2 or own.is_floating_point():
        return None
    cache = cache_of(kwargs)
    before = length_of(cache)
    if prompt is not None:
        ids = prompt.to(own.device).repeat_interleave(max(1, len(own) // len(prompt)), 0)  # beams repeat it
        return Tokens(ids, before, own.shape[1])
    known = getattr(cache, "_peft_token_ids", own[:, :0])[:, :before].to(own.device)
    if len(known) != len(own):
        if len(own) % len(known):
            raise ValueError(
                f"the cache was filled by {len(known)} rows, and the call has {len(own)}, so it is not known which "
                "text a row goes on with. Give the rows of the cache, or the whole text without a cache."
            )
        known = known.repeat_interleave(len(own) // len(known), 0)
    unseen = own.new_full((len(own), before - known.shape[1]), UNKNOWN)
    segments = None if before else segments_of(own, kwargs)
    return Tokens(torch.cat([known, unseen, own], 1), before, own.shape[1], segments)


def segments_of(ids: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The texts packed into each row, numbered, ``[batch, tokens]``; None where no row has several.

    A text begins where ``position_ids`` do not go on by one. Models keep such texts apart only where they are given no
    ``attention_mask``; with one, a jump is that of padding.
    """
    positions = kwargs.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or kwargs.get("attention_mask") is not None:
        return None
    if positions.shape[1] != ids.shape[1]:
        return None
    begins = F.pad(positions.diff(dim=1) != 1, (1, 0))
    return begins.cumsum(1).expand_as(ids).to(ids.device) if bool(begins.any()) else None


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments, or the outputs, of a model; None where there is none."""
    return next((kwargs[name] for name in ARGUMENTS if kwargs.get(name) is not None), None)


def note_in_cache(tokens: Tokens | None, kwargs: dict[str, Any], output: Any) -> None:
    """Write the ids of what a cache holds onto the cache, so that copies of it know them too."""
    cache = cache_of(kwargs)
    if cache is None and isinstance(output, dict):
        cache = cache_of(output)
    if tokens is not None and hasattr(cache, "get_seq_length"):
        cache._peft_token_ids = tokens.ids

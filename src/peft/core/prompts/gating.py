"""A prefix with gates: [g_K K_p; K(x)], [g_V V_p; V(x)] in each attention layer, g of what that layer reads.

The prefix enters the cache before any layer has run, so each attention multiplies its part when it is called. What it
multiplies travels with the cache: it is there again when a layer is run a second time, and when a text goes on.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.core.blocks.blocks import ATTENTION, CROSS, find_blocks, first_input
from peft.core.model.record import context_of, record_of
from peft.core.model.walk import join, locate
from peft.errors import ConfigError


if TYPE_CHECKING:
    from peft.core.prompts.rows import Prompts


def attentions(model: nn.Module) -> list[nn.Module]:
    """The self-attentions that a prefix enters: those of the decoder, or of the only stack, in their order.

    Raises:
        ValueError: if none is found.
    """
    blocks = find_blocks(model)
    decoding = [block for block in blocks if any(part.role == CROSS for part in block.sublayers)] or blocks
    found = [
        locate(model, join(block.key, next(part.core for part in block.sublayers if part.role == ATTENTION))).module
        for block in decoding
    ]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no attention layers that are known, so a prefix has no gates.")
    return found


class GatedPrefix:
    """The keys and values of each layer, ``[batch, heads, tokens, width]``, without their gates."""

    def __init__(self, prompts: Prompts, states: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.prompts, self.states = prompts, states

    def __deepcopy__(self, memo: dict) -> GatedPrefix:
        return self  # copies of a cache belong to the same model

    def enter(self, cache: Any, number: int, h: torch.Tensor) -> None:
        """Put this layer's part into its cache, multiplied by the gates of ``h``, ``[batch, tokens, width]``."""
        held = getattr(cache, "self_attention_cache", cache).layers[number]
        gone = max(held.get_seq_length() - held.keys.shape[2], 0)  # a sliding window has let go of the first tokens
        for name, state, gate in zip(("keys", "values"), self.states[number], self.prompts.gates(number, h).unbind(1)):
            state = state.repeat_interleave(len(h) // len(state), 0)[:, :, gone:]
            gated, old = (state * gate.view(-1, 1, 1, 1)).to(state.dtype), getattr(held, name)
            if torch.is_grad_enabled():  # the graph may need the old values
                setattr(held, name, torch.cat([gated.to(old.device), old[:, :, state.shape[2] :]], 2))
            else:
                old[:, :, : state.shape[2]] = gated


def _before_attention(number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Hook of the attention of this number."""
    for cache in (*args, *kwargs.values()):
        prefix = getattr(cache, "_peft_prefix", None)
        if prefix is not None:
            prefix.enter(cache, number, first_input(module, args, kwargs))


def let_attentions_gate(model: nn.Module) -> None:
    """Hook the attentions of a model; the hooks go with the adapters."""
    context_of(model)  # its own hooks come first
    record_of(model).hooks += tuple(
        attention.register_forward_pre_hook(partial(_before_attention, number), with_kwargs=True)
        for number, attention in enumerate(attentions(model))
    )

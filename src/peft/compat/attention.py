"""LLaMA-Adapter's table of attentions, by the names that others import. The method itself finds them by structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from peft.tuners.adaption_prompt_utils import AttentionFunction, watched


def compute_query_states(model: nn.Module, **kwargs: Any) -> torch.Tensor:
    """The queries ``[batch, heads, tokens, features]`` that an attention module computes, rotated where it rotates.

    Args:
        model: the attention. kwargs: what its ``forward`` is called with, by name.
    """
    seen: list[torch.Tensor] = []

    def around(attend: AttentionFunction, module: nn.Module, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
        seen.append(query)
        return attend(module, query, *rest, **options)

    watched(model, around, (), kwargs)
    return seen[0]


llama_compute_query_states = gpt2_compute_query_states = compute_query_states


def is_adaption_prompt_trainable(params: str) -> bool:
    """Whether a parameter of this name is one of the method's."""
    return "adaption_" in params


def llama_rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(x1, x2) -> (-x2, x1) of the halves of the last axis; optimum-habana builds its attention on these two."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def llama_apply_rotary_pos_emb(
    q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Queries ``[batch, heads, tokens, features]`` rotated by their positions ``[batch, tokens]``.

    Args:
        cos, sin: tables ``[1, 1, positions, features]``, as rotary embeddings of older LLaMAs give them.
    """
    cos, sin = (table[0, 0][position_ids].unsqueeze(1) for table in (cos, sin))
    return q * cos + llama_rotate_half(q) * sin


class ModelTypeConfig(NamedTuple):
    """What the parts of an attention are called: ``k_proj_layer`` makes values too where ``v_proj_layer`` is None."""

    compute_query_states: Callable[..., torch.Tensor]
    target_modules: str
    k_proj_layer: str
    v_proj_layer: str | None
    o_proj_layer: str | None


_SEPARATE = ModelTypeConfig(compute_query_states, "self_attn", "k_proj", "v_proj", "o_proj")

TRANSFORMERS_MODEL_CONFIG = {
    "llama": _SEPARATE,
    "mistral": _SEPARATE,
    "gpt2": ModelTypeConfig(compute_query_states, "attn", "c_attn", None, None),
}

"""LLaMA-Adapter's table of attentions, by the names that others import. The method itself finds them by structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft.core.blocks.attention import AttentionFunction, watched


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


@dataclass
class ModelTypeConfig:
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

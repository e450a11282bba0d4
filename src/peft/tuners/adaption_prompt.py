"""LLaMA-Adapter: attn' = attn + W_o g softmax(s q K_p^T) V_p in the last layers (Zhang et al., arXiv 2303.16199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.compat.methods import AdaptionPromptCompat
from peft.config import PeftConfig, option
from peft.core.adapter import part
from peft.core.base.kinds import kind_of
from peft.core.base.rows import rows_of, with_rows_added
from peft.core.blocks.blocks import (
    ATTENTION,
    BlockAdapter,
    BlockLayer,
    BlockTuner,
    find_blocks,
    first_input,
    first_output,
    width_of,
    with_first,
)
from peft.core.model.registry import define_tuner
from peft.core.model.targeting import Target, matches
from peft.core.model.walk import join, locate, walk
from peft.errors import ConfigTypeError, NoMatchingPeftModuleError
from peft.peft_types import PeftType
from peft.tuners.adaption_prompt_utils import AttentionFunction, can_watch, keys_and_values, watched


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """Config of LLaMA-Adapter: a trained prompt that the last layers also attend to, behind a gate.

    For instruction tuning of decoders with about a million parameters: the gates start at zero, so training is
    steady from the first step. It cannot be merged.
    """

    METHOD: ClassVar[PeftType] = PeftType.ADAPTION_PROMPT

    target_modules: str | None = option(
        None,
        "Name of the attention modules, such as 'self_attn'. Left out, it is found by the structure of the model.",
    )
    adapter_len: int = option(None, "Number of prompt tokens in each adapted layer.", minimum=1)
    adapter_layers: int = option(None, "Number of layers to adapt, counted from the top.", minimum=1)


def adaption_prompt(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gate: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """g softmax(s q K_p^T) V_p: what the queries see of the prompt.

    Args:
        query: ``[batch, heads, tokens, features]``. key, value: K_p and V_p ``[batch, heads, adapter_len, features]``.
        gate: g ``[1]``. scale: s; None: 1 / sqrt(features).

    Returns:
        ``[batch, tokens, heads, features]``.
    """
    return gate * F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


class AdaptionPrompt(BlockAdapter):
    """A prompt P ``[1, adapter_len, width]``, of which the attention's own projections make K_p = W_k P and
    V_p = W_v P without a rotation for positions, and a gate g ``[1]`` that starts at zero."""

    adaption_prompt, adaption_gate = part(), part()

    def create(self, config: AdaptionPromptConfig, key: str) -> None:
        self.adaption_prompt = nn.Parameter(torch.randn(1, config.adapter_len, width_of(self.base)))
        self.adaption_gate = nn.Parameter(torch.zeros(1))

    def seen(
        self, pair: Any, query: torch.Tensor, rows: torch.Tensor | None, scale: float | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """What the queries of its rows (None: of all) see of the prompt, by its K_p and V_p."""
        query = rows_of(query, rows)
        key, value = (_for_heads(x, query, rows) for x in pair)
        return adaption_prompt(query, key, value, self.adaption_gate, scale).to(dtype)


class AdaptedAttention(BlockLayer, nn.Module):
    """Wraps an attention, whose queries also see the prompts of the adapters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base, x = self.base_layer, first_input(self.base_layer, args, kwargs)
        acting = [
            (adapter, rows, keys_and_values(base, adapter.adaption_prompt.to(x.dtype), args, kwargs))
            for adapter, rows in self.acting(x)
        ]
        if not acting:
            return base(*args, **kwargs)
        unprojected: list[torch.Tensor] = []

        def around(attend: AttentionFunction, module: nn.Module, query: torch.Tensor, *rest: Any, **options: Any):
            output, weights = attend(module, query, *rest, **options)
            update = torch.zeros_like(output)
            for adapter, rows, pair in acting:
                seen = adapter.seen(pair, query, rows, options.get("scaling"), output.dtype)
                update = with_rows_added(update, seen, rows)
            # Where the output projection keeps its weight transposed (GPT-2), what is added comes after it.
            if self.projects:
                return output + update, weights
            unprojected.append(update)
            return output, weights

        output = watched(base, around, args, kwargs)
        for update in unprojected:
            output = with_first(output, first_output(output) + update.flatten(2))
        return output

    @property
    def projects(self) -> bool:
        """Whether W_o acts on what the prompt gives: files leave it out where layers are transposed (GPT-2)."""
        kinds = [kind for site in walk(self.base_layer) if (kind := kind_of(site.module)) is not None]
        return not any(kind.fan_in_fan_out for kind in kinds)


def _for_heads(x: torch.Tensor, query: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Keys or values ``[1, groups, adapter_len, features]`` for each row and head of the queries."""
    if len(x) > 1 and rows is not None:  # the projections are adapted, differently for each row
        x = rows_of(x, rows)
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1).expand(len(query), -1, -1, -1)


class AdaptionPromptTuner(AdaptionPromptCompat, BlockTuner):
    """Applies LLaMA-Adapter to the self-attentions of the last transformer blocks."""

    def find(self, config: AdaptionPromptConfig, model: nn.Module) -> list[Target]:
        missing = [field for field in ("adapter_len", "adapter_layers") if getattr(config, field) is None]
        if missing:
            raise ConfigTypeError(
                f"AdaptionPromptConfig: {' and '.join(missing)} must be set, to whole numbers such as 4."
            )
        keys = [
            join(block.key, part.core)
            for block in find_blocks(model)
            for part in block.sublayers
            if part.role == ATTENTION
        ]
        if config.target_modules is None and keys:
            config.target_modules = keys[-1].rpartition(".")[2]
        chosen = [key for key in keys if matches([config.target_modules or ""], key)]
        if len(chosen) < config.adapter_layers:
            names = ", ".join(sorted({key.rpartition(".")[2] for key in keys})) or "nothing"
            raise NoMatchingPeftModuleError(
                f"adapter_layers={config.adapter_layers}, but {type(model).__name__} has {len(chosen)} "
                f"self-attentions called {config.target_modules!r}; those found are called {names}."
            )
        targets = [Target(key, locate(model, key).module) for key in chosen[-config.adapter_layers :]]
        for target in targets:
            if not can_watch(target.module):
                raise ValueError(
                    f"{target.key!r} ({type(target.module).__name__}) computes its attention by itself, not by the "
                    "attention functions of transformers, so its queries cannot be reached."
                )
        return targets


AdaptionPromptModel = define_tuner(
    AdaptionPrompt,
    AdaptionPromptConfig,
    base=AdaptionPromptTuner,
    layer=AdaptedAttention,
    prefix="adaption_prompt_",
)

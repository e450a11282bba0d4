"""Cartridges: attention over [K_p; K(x)], [V_p; V(x)] with trained K_p, V_p that stand for a long text (2506.06266).

Eyuboglu et al. 2025, arXiv 2506.06266. The first virtual tokens stay as they are: attention sinks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import PeftConfig, PromptLearningConfig, option
from peft.core.base.storage import device_of
from peft.core.files.io import load_peft_weights, write_adapter
from peft.core.prompts import VirtualTokens, caches, check_shape, define_prompt, put
from peft.errors import ConfigError
from peft.peft_types import PeftType


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Config of cartridges.

    For a long text that is asked about again and again: the trained cache takes a fraction of the text's memory,
    and several can be put one after another.
    """

    METHOD: ClassVar[PeftType] = PeftType.CARTRIDGE

    num_frozen_tokens: int = option(
        1, "How many virtual tokens at the beginning stay as they are; attention needs them as a sink.", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens:
            raise ConfigError(
                f"CartridgeConfig: num_frozen_tokens={self.num_frozen_tokens}, but there are only "
                f"{self.num_virtual_tokens} virtual tokens."
            )


class CartridgeEncoder(VirtualTokens):
    """Two tables, ``[frozen tokens, 2 layers width]`` and ``[other tokens, 2 layers width]``."""

    as_prefix: ClassVar[bool] = True
    frozen: ClassVar[tuple[str, ...]] = ("frozen_embedding",)

    def __init__(self, config: CartridgeConfig, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        width, held = 2 * int(config.num_layers or 0) * config.token_dim, config.num_frozen_tokens
        self.frozen_embedding = nn.Parameter(torch.empty(held, width), requires_grad=False)
        self.trainable_embedding = nn.Parameter(torch.empty(config.num_virtual_tokens - held, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at normal random numbers."""
        nn.init.normal_(self.frozen_embedding)
        nn.init.normal_(self.trainable_embedding)

    @property
    def weight(self) -> torch.Tensor:
        """The whole prefix, ``[tokens, 2 layers width]``."""
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    @property
    def embedding(self) -> Any:  # type: ignore[override]
        """Something that has the prefix as its ``weight``."""
        return self

    def forward(self, prefix_tokens: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight[prefix_tokens]

    def saved(self) -> torch.Tensor:
        return self.weight

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        check_shape(prompt_embeddings, self.weight)
        held = len(self.frozen_embedding)
        for name, part in zip(self._parameters, (prompt_embeddings[:held], prompt_embeddings[held:]), strict=True):
            put(self, name, part)

    def adapter_state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        yield "prompt_embeddings", "", self.weight.detach()


define_prompt(CartridgeEncoder, CartridgeConfig, prefix="cartridge_")


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> torch.Tensor:
    """The first tokens of a cache as a prefix, ``[num_virtual_tokens, 2 layers width]``.

    Args:
        past_key_values: a cache of transformers with one text in it, or a tuple of (keys, values) for each layer, each
            ``[1, heads, tokens, head width]``.

    Raises:
        ValueError: if it holds fewer tokens, or more than one text.
    """
    layers = getattr(past_key_values, "layers", None)
    pairs = [(x.keys, x.values) for x in layers] if layers is not None else [pair[:2] for pair in past_key_values]
    parts = []
    for states in (states for pair in pairs for states in pair):
        if states.shape[0] != 1:
            raise ValueError(f"the cache is of {states.shape[0]} texts; a prefix is made from one.")
        if states.shape[2] < num_virtual_tokens:
            raise ValueError(
                f"Need at least {num_virtual_tokens} cached tokens, got {states.shape[2]}: take a longer text, or "
                "fewer virtual tokens."
            )
        parts.append(states[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1))
    return torch.cat(parts, dim=1).detach().clone()


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> torch.Tensor:
    """Let a prefix (by default that of the active adapter) start as the first tokens of a cache.

    Returns:
        What the adapter has got, ``[tokens, 2 layers width]``.

    Raises:
        ValueError: if the adapter is no prefix, is made by a network, or does not fit the cache.
    """
    name = adapter_name or model.active_adapters[0]
    config = model.peft_config[name]
    encoder: Any = model.prompt_encoder[name] if config.is_prompt_learning else None
    if not getattr(encoder, "as_prefix", False):
        raise ValueError(f"{name!r} is a {type(config).__name__} adapter: it has no keys and values to start from.")
    count = config.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens
    values = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    encoder.load_prompt_embeddings(values)
    return values


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> torch.Tensor:
    """Let a prefix start as what the base model's attention keeps of the first tokens of a text.

    Args:
        use_chat_template: the text is the system message of a conversation.
        max_length: read only so many tokens.

    Returns:
        What the adapter has got, ``[tokens, 2 layers width]``.

    Raises:
        ValueError: if the text is shorter than the prefix.
    """
    from transformers import DynamicCache

    if use_chat_template:
        ids = tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=True, return_dict=False)
    else:
        ids = tokenizer(text)["input_ids"]
    ids = torch.as_tensor(ids).reshape(1, -1)[:, :max_length].to(device_of(model.word_embeddings))
    cache = DynamicCache()  # it keeps all tokens, where layers with a sliding window would not
    with torch.no_grad():
        model.get_base_model()(input_ids=ids, **{caches.name_of(model.get_base_model()): cache})
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=adapter_name, past_key_values=cache, num_virtual_tokens=num_virtual_tokens
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Write an adapter whose prefix is that of several saved ones, one after the other.

    Raises:
        ValueError: if there is none, one is no cartridge, or they belong to base models of different sizes.
    """
    paths = [os.fspath(path) for path in adapter_paths]
    configs = [PeftConfig.from_pretrained(path) for path in paths]
    if not configs or any(not isinstance(config, CartridgeConfig) for config in configs):
        kinds = {path: type(config).__name__ for path, config in zip(paths, configs, strict=True)}
        raise ValueError(f"adapter_paths should name at least one cartridge, and nothing else; got {kinds}.")
    parts = [load_peft_weights(path)["prompt_embeddings"] for path in paths]
    widths = {path: part.shape[1] for path, part in zip(paths, parts, strict=True)}
    if len(set(widths.values())) > 1:
        raise ValueError(f"these cartridges belong to base models of different sizes: {widths}.")
    configs[0].num_virtual_tokens = sum(len(part) for part in parts)
    write_adapter(output_path, {"prompt_embeddings": torch.cat(parts)}, configs[0], safe_serialization)

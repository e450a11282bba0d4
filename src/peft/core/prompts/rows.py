"""The prompts of a model, and which of them each row of a call gets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn

from peft.core.base.rows import joined, rows_of
from peft.core.base.storage import device_of
from peft.core.blocks.blocks import width_of
from peft.core.gates import Gate
from peft.core.layer.switch import Switch
from peft.core.model.context import BASE, Context
from peft.core.model.record import context_of
from peft.core.model.walk import embeddings_of
from peft.core.prompts import caches
from peft.core.prompts.feed import Feed
from peft.core.prompts.gating import GatedPrefix, attentions, let_attentions_gate
from peft.core.prompts.sizes import key_sizes
from peft.core.prompts.tokens import ENCODER, VirtualTokens
from peft.errors import ConfigError
from peft.meanwhile import in_mode


class Prompts(Switch):
    """The prompts of a model.

    Args:
        model: the base model.
        configs: adapter name -> config.

    Attributes:
        encoders: adapter name -> :class:`VirtualTokens`.
        tokens: adapter name -> the indices of its virtual tokens.
        replaced: what computes the active prompt in the place of its encoder, if a class derived from PeftModel says
            so: called with the number of rows and their tasks.
    """

    def __init__(self, model: nn.Module, configs: dict[str, Any]) -> None:
        self.model, self.configs = model, configs
        self._start()
        self.encoders = nn.ModuleDict()
        self.tokens: dict[str, torch.Tensor] = {}
        self.replaced: Callable[..., Any] | None = None
        self._gated = False

    # --- as what holds adapters -------------------------------------------------------------------------------
    @property
    def context(self) -> Context:  # type: ignore[override]
        """That of the model now: it may have been without adapters, and got a new one, since this was made."""
        return context_of(self.model)

    @property
    def adapter_names(self) -> list[str]:
        return list(self.encoders)

    @property
    def active_adapters(self) -> list[str]:
        return self.present(self._active_adapter)

    def __contains__(self, name: object) -> bool:
        return name in self.encoders

    def adapter_parameters(self, name: str) -> Iterator[torch.Tensor]:
        """What trains of one adapter's virtual tokens."""
        return self.encoders[name].trained() if name in self else iter(())

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        if name not in self:
            return
        encoder = self.encoders[name]
        with in_mode(encoder, training=False):  # a dropout would be saved with it
            state = list(encoder.adapter_state())
        for file, memory, tensor in state:
            yield file, f"{ENCODER}{name}.{memory}" if memory else "", tensor

    def check_active(self, names: list[str]) -> None:
        if len(names) > 1:
            raise ValueError(
                f"only one prompt can be active at a time, not {names}. For different prompts in the rows of one "
                "batch, pass adapter_names to the call."
            )

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled  # what trains stays so: no call reaches it meanwhile

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self:
            del self.encoders[adapter_name], self.tokens[adapter_name]
        self._forget(adapter_name)

    def made(self, cls: type[VirtualTokens], config: Any, word_embeddings: nn.Module) -> VirtualTokens:
        """The virtual tokens that a config asks for, with their gates."""
        encoder = cls(config, word_embeddings)
        if encoder.gates_each:
            each = encoder.gates_each
            encoder.prefix_gates = nn.ModuleList(Gate(width_of(module), each) for module in attentions(self.model))
        return encoder

    def add(self, name: str, encoder: VirtualTokens, in_float32: bool = True) -> None:
        """Take a prompt in, frozen, on the device of the embedding; its dtype too unless ``in_float32``."""
        weight, device = self.word_embeddings.weight, device_of(self.word_embeddings)
        dtype = weight.dtype if weight.is_floating_point() and not in_float32 else None
        if device.type != "meta" and not any(p.is_meta for p in encoder.parameters()):
            encoder.to(device, dtype)
        if encoder.gates is not None and not self._gated:
            let_attentions_gate(self.model)
            self._gated = True
        self.encoders[name] = encoder.requires_grad_(False)
        self.tokens[name] = torch.arange(encoder.count(self.configs[name]))

    def load_prompt(self, name: str, value: torch.Tensor) -> None:
        """Take what a file has as ``prompt_embeddings``, unless a network that is in the file too makes it."""
        encoder = self.encoders[name]
        if not encoder.has_network:
            encoder.load_prompt_embeddings(value)

    def make_room(self, name: str, state_dict: dict[str, torch.Tensor]) -> None:
        """Give a prompt the form in which a file has it: with its network, or as the table that the network made."""
        encoder = self.encoders[name]
        whole = any(key.startswith(ENCODER) for key in state_dict)
        if whole == encoder.has_network or not encoder.network or "prompt_embeddings" not in state_dict:
            return
        config = copy.copy(self.configs[name])
        config.inference_mode = not whole
        old = next(encoder.parameters())
        with torch.device(old.device):
            fresh = self.made(type(encoder), config, self.word_embeddings)
        self.encoders[name] = fresh.to(old.dtype).train(encoder.training).requires_grad_(False)
        self.set_requires_grad(name, old.requires_grad)

    # --- what rows get ----------------------------------------------------------------------------------------
    @property
    def word_embeddings(self) -> nn.Module:
        """The input embedding of the base model.

        Raises:
            ValueError: if the model does not say which it is.
        """
        module = embeddings_of(self.model)[0]
        if module is None:
            raise ConfigError(
                f"{type(self.model).__name__} does not say what its input embedding is, so there is nothing to put "
                "virtual tokens into. Give it a get_input_embeddings method, or use a method that adapts weights."
            )
        return module

    @property
    def in_use(self) -> list[str]:
        """The prompts that the rows of the call get; :data:`BASE` for rows without one."""
        names = self.context.adapter_names
        if self._disable_adapters:
            return []
        if names is None:
            return self.active_adapters
        return [name if name in self.encoders else BASE for name in names]

    @property
    def _used(self) -> dict[str, VirtualTokens]:
        return {name: self.encoders[name] for name in self.in_use if name != BASE}

    @property
    def one(self) -> VirtualTokens | None:
        """The prompt of all rows; None where they differ, or have none."""
        mixed, names = self.context.adapter_names is not None, self.in_use
        return self.encoders[names[0]] if names and not mixed else None

    def enter(self, cache: Any, feed: Feed) -> Any:
        """An empty cache with the prefix of each row in it."""
        states = self.prefix(feed.values)
        if any(encoder.gates is not None for encoder in self._used.values()):
            cache._peft_prefix = GatedPrefix(self, states)
        return caches.fill(cache, states)

    def gates(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """What the keys and the values of each row's prefix are multiplied by in one layer, ``[batch, 2]``.

        Args:
            h: what its attention reads, ``[batch, tokens, width]``.
        """
        context = self.context
        if context.adapter_names is None:
            return self._gates_of((self.in_use or [BASE])[0], layer, h)
        found, groups = [], context.groups(context.adapter_names, len(h), h.device)
        for name, rows in groups.parts:
            with context.on_rows(rows, len(h)):
                found.append(self._gates_of(name, layer, rows_of(h, rows)).to(h.dtype))
        return joined(found, groups.order)

    def _gates_of(self, name: str, layer: int, h: torch.Tensor) -> torch.Tensor:
        gates = self.encoders[name].gates if name in self.encoders else None
        if gates is None:
            return h.new_ones(len(h), 2)
        gate: Any = gates[layer]
        return gate.of(h.to(gate.weight.dtype), self.context).expand(-1, 2)

    @property
    def as_prefix(self) -> bool:
        """Whether the rows of the call get keys and values, and no virtual tokens before their texts.

        Raises:
            ValueError: if some get the one and some the other.
        """
        kinds = {encoder.as_prefix for encoder in self._used.values()}
        if len(kinds) > 1:
            raise ValueError(
                f"rows of one batch use prefixes and virtual tokens before the text ({', '.join(self._used)}), which "
                "enter a model in different ways. Give them in batches of their own."
            )
        return kinds == {True}

    @property
    def in_decoder(self) -> bool:
        """Whether the decoder of an encoder-decoder gets virtual tokens of its own."""
        return self.has_encoder and any(
            encoder.in_decoder and self.configs[name].num_transformer_submodules > 1
            for name, encoder in self._used.items()
        )

    @property
    def has_encoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that the next call may use."""
        return max((self.configs[name].num_virtual_tokens for name in self.in_use if name != BASE), default=0)

    def encode(self, name: str, batch: int, tasks: torch.Tensor | None = None) -> torch.Tensor:
        """The virtual tokens of one adapter, ``[batch, tokens, width]``."""
        encoder = self.encoders[name]
        index = self.tokens[name].to(next(encoder.parameters()).device)
        if encoder.uses_tasks:
            return encoder(index.expand(batch, -1), tasks)
        return encoder(index[None]).expand(batch, -1, -1)  # computed once for all rows

    def feed(self, batch: int, stack: int = 0) -> Feed | None:
        """What the rows of a call get: the active prompt, or each row its own. None: nothing.

        Args:
            stack: 0 for the encoder or the only stack, 1 for the decoder beside an encoder.
        """
        context, names, device = self.context, self.in_use, device_of(self.word_embeddings)
        if not names:
            return None
        tasks = context.tasks(batch, device)
        if context.adapter_names is None:
            return self._feed_of(names[0], batch, tasks, stack)
        groups, order, _ = context.groups(context.adapter_names, batch, device)
        feeds = {
            name: self._feed_of(name, len(rows), None if tasks is None else tasks[rows], stack)
            for name, rows in groups
            if name in self.encoders
        }
        size = max((feed.size for feed in feeds.values()), default=0)
        if size == 0:
            return None
        nothing = next(iter(feeds.values())).nothing
        parts = [(feeds[n] if n in feeds else nothing(len(rows))).padded(len(rows), size) for n, rows in groups]
        return Feed.joined(parts, order)

    def _feed_of(self, name: str, batch: int, tasks: torch.Tensor | None, stack: int) -> Feed:
        """What ``batch`` rows with one prompt get."""
        encoder = self.encoders[name]
        ours = self.replaced is None or encoder.as_prefix or name not in self._active_adapter
        values = self.encode(name, batch, tasks) if ours else self.replaced(batch, tasks)  # type: ignore[misc]
        if not encoder.as_prefix:
            n = self.configs[name].num_virtual_tokens
            values = values[:, n * stack : n * (stack + 1)]
        values = values.to(device_of(self.word_embeddings))
        own = (encoder.attended, encoder.own_labels)
        rows = [None if given is None else given.to(values.device).expand(batch, -1) for given in own]
        return Feed(values, None, rows[0], rows[1])

    def prompt(self, batch: int, tasks: torch.Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The active prompt: embeddings ``[batch, tokens, width]``, or a cache that holds its keys and values."""
        name = self.active_adapters[0]
        values = self.encode(name, batch, tasks)
        if not self.encoders[name].as_prefix:
            return values
        return self.enter(caches.new_cache(self.model, max_cache_len), Feed(values))

    @cached_property
    def _sizes(self) -> list[tuple[int, int]]:
        return key_sizes(self.model)

    def prefix(self, values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, ``[batch, heads, tokens, width]``, from ``[batch, tokens, 2 layers width]``.

        Each layer has as much room in the table as the widest one: its heads take the first entries of theirs, or of
        all where the number of heads differs too.

        For an encoder-decoder the file format steps through the table by four and starts again at its end, as if keys
        and values of cross attention stood between those of self attention.
        """
        config = next(self.configs[name] for name, encoder in self.encoders.items() if encoder.as_prefix)
        layers, most = config.num_layers, config.num_attention_heads
        weight = self.word_embeddings.weight
        table = values.to(weight.dtype) if weight.is_floating_point() else values
        table = table.view(*values.shape[:2], 2 * layers, -1)

        def states(index: int, layer: int) -> torch.Tensor:
            place = table[:, :, index % (2 * layers)]
            sizes: Any = self._sizes[layer] if layer < len(self._sizes) else (most, None)
            heads, width = sizes
            if heads == most:
                return place.unflatten(-1, (most, -1))[..., :width].transpose(1, 2)
            return place[..., : heads * width].unflatten(-1, (heads, width)).transpose(1, 2)

        step = 2 * config.num_transformer_submodules
        return [(states(step * layer, layer), states(step * layer + 1, layer)) for layer in range(layers)]

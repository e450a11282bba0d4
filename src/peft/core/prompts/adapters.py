"""The prompts of a model: adding, switching, files, and what each row of a call gets."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from peft.core.model import operations
from peft.core.model.context import BASE
from peft.core.model.gradient_checkpointing import stop_watching, watch_checkpointing
from peft.core.model.tuner import add_auxiliary, check_adapter_name, context_of, drop_context
from peft.core.model.walk import embeddings_of
from peft.core.prompts import caches
from peft.core.prompts.feed import Feed
from peft.core.prompts.sizes import settle_sizes
from peft.core.prompts.tokens import ENCODER, VirtualTokens
from peft.utils.error import ConfigError
from peft.utils.peft_types import PEFT_TYPE_TO_TUNER_MAPPING


class Prompts:
    """Manages the prompts of a model: the counterpart of :class:`BaseTuner` for methods that change no module.

    Args:
        model: the base model. Only modules that an adapter trains whole are wrapped in it.
        peft_config: adapter name -> config, or the config of ``adapter_name``.
        token_inputs: inputs of the task with one entry for each token, which virtual tokens get no say in (labels).
        position_inputs: inputs that hold positions of tokens.
        heads_read_ids: the task's head looks for padding in ``input_ids``.

    Attributes:
        prompt_encoder: adapter name -> :class:`VirtualTokens`.
        prompt_tokens: adapter name -> the indices of its virtual tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        token_inputs: Sequence[str] = (),
        position_inputs: Sequence[str] = (),
        heads_read_ids: bool = False,
    ) -> None:
        self.model = model
        self.peft_config: dict[str, Any] = (
            dict(peft_config) if isinstance(peft_config, dict) else {adapter_name: peft_config}
        )
        self.token_inputs, self.position_inputs = tuple(token_inputs), tuple(position_inputs)
        self.heads_read_ids = heads_read_ids
        self.prompt_encoder = nn.ModuleDict()
        self.prompt_tokens: dict[str, torch.Tensor] = {}
        self.active_adapter: str | list[str] = adapter_name
        self.disabled = False
        self.checkpointed: caches.Checkpointed | None = None
        self.inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        self.set_adapter(adapter_name, inference_mode=self.peft_config[adapter_name].inference_mode)
        model.peft_config = self.peft_config
        watch_checkpointing(model)

    # --- life of the adapters ---------------------------------------------------------------------------------
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Make the virtual tokens of ``self.peft_config[adapter_name]``, inactive and frozen.

        Raises:
            ValueError: if the config does not fit the model, which is then unchanged.
        """
        config = self.peft_config[adapter_name]
        check_adapter_name(adapter_name, list(self.prompt_encoder))
        cls = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        word_embeddings = self.word_embeddings
        settle_sizes(config, model, cls.as_prefix)
        cls.prepare_config(config)
        with torch.device("meta") if low_cpu_mem_usage else nullcontext():
            encoder = cls(config, word_embeddings)
        try:
            with torch.device("meta") if low_cpu_mem_usage else nullcontext():
                add_auxiliary(model, adapter_name, config)
        except Exception:
            operations.remove(model, adapter_name)
            raise
        self._place(adapter_name, encoder, autocast_adapter_dtype)
        operations.settle(model, adapter_name, autocast_adapter_dtype=False)

    def _place(self, name: str, encoder: VirtualTokens, in_float32: bool = True) -> None:
        weight = self.word_embeddings.weight
        dtype = weight.dtype if weight.is_floating_point() and not in_float32 else None
        if weight.device.type != "meta" and not any(p.is_meta for p in encoder.parameters()):
            encoder.to(weight.device, dtype)
        self.prompt_encoder[name] = encoder.train_on(False).train(self.model.training)
        self.prompt_tokens[name] = torch.arange(encoder.count(self.peft_config[name]))

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
    def active_adapters(self) -> list[str]:
        return operations.names_of(self.active_adapter)

    @property
    def adapter_names(self) -> list[str]:
        return list(self.prompt_encoder)

    @property
    def disable_adapters(self) -> bool:
        """Whether all prompts are switched off, as for a layer."""
        return self.disabled

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of one adapter's virtual tokens, as for a layer."""
        return list(self.prompt_encoder[name].parameters())

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one, and the only one that trains (none in ``inference_mode``).

        Raises:
            ValueError: for an unknown adapter, and for several.
        """
        names = operations.names_of(adapter_name)
        operations.require_adapters(self.model, names, self.peft_config)
        if len(names) > 1:
            raise ValueError(
                f"only one prompt can be active at a time, not {names}. For different prompts in the rows of one "
                "batch, pass adapter_names to the call."
            )
        if operations.adapters_of(self.model):
            own = [name for name in names if name in operations.adapters_of(self.model)]
            operations.set_adapter(self.model, own or names, inference_mode) if own else None
        for name, encoder in self.prompt_encoder.items():
            encoder.train_on(name in names and not inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Choose whether these adapters train, active or not."""
        names = operations.names_of(adapter_names)
        operations.require_adapters(self.model, names, self.peft_config)
        operations.set_requires_grad(self.model, adapter_names, requires_grad)
        for name in names:
            self.prompt_encoder[name].train_on(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the active one, another becomes active.

        Raises:
            ValueError: if there is no such adapter.
        """
        operations.require_adapters(self.model, [adapter_name], self.peft_config)
        operations.remove(self.model, adapter_name)
        del self.prompt_encoder[adapter_name], self.prompt_tokens[adapter_name], self.peft_config[adapter_name]
        if adapter_name in self.active_adapters:
            self.active_adapter = []
            for name in list(self.peft_config)[:1]:
                self.set_adapter(name)

    def enable_adapter_layers(self) -> None:
        """Switch the prompts on again."""
        self.disabled = False
        operations.enable_adapters(self.model, True)

    def disable_adapter_layers(self) -> None:
        """Switch all prompts off: the model is its base."""
        self.disabled = True
        operations.enable_adapters(self.model, False)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """A context in which the model is its base."""
        before, self.disabled = self.disabled, True
        try:
            with operations.adapters_disabled(self.model):
                yield
        finally:
            self.disabled = before

    def unload(self) -> nn.Module:
        """Take everything out of the base model and return it."""
        model = operations.unload(self.model, merge_first=False)
        if self.checkpointed is not None:
            self.checkpointed.remove()
        stop_watching(model)
        model.__dict__.pop("peft_config", None)
        drop_context(model)
        return model

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: a prompt is no change of a weight."""
        raise ValueError(
            f"{self._method()} changes what goes into the model, not its weights, so there is nothing to merge. Keep "
            "the PeftModel, or call unload() for the base model."
        )

    unmerge_adapter = merge_and_unload = merge_adapter

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: what a prompt does is not linear in it."""
        raise ValueError(
            f"what the virtual tokens of {self._method()} do is not linear in them, so no sum of prompts does what "
            "the sum of their effects would. Train one prompt on both tasks, or pass adapter_names for rows of a "
            "batch that use different prompts."
        )

    def _method(self) -> str:
        names = {str(getattr(config.peft_type, "value", config.peft_type)) for config in self.peft_config.values()}
        return ", ".join(sorted(names))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a prompt is no change of a weight."""
        return False

    # --- files ------------------------------------------------------------------------------------------------
    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(name in the file, name in memory or "", tensor) of everything that belongs to a prompt."""
        if name in self.prompt_encoder:
            with self._as_saved(name) as encoder:
                state = list(encoder.adapter_state())
            for file, memory, tensor in state:
                yield file, f"{ENCODER}{name}.{memory}" if memory else "", tensor

    @torch.no_grad()
    def saved_prompt(self, name: str) -> torch.Tensor:
        """The virtual tokens themselves, ``[tokens, width]``."""
        with self._as_saved(name) as encoder:
            return encoder.saved().detach()

    @contextmanager
    def _as_saved(self, name: str) -> Iterator[VirtualTokens]:
        """A context in which a prompt is in evaluation mode."""
        encoder = self.prompt_encoder[name]
        training = encoder.training
        try:
            yield encoder.eval()
        finally:
            encoder.train(training)

    def load_prompt(self, name: str, value: torch.Tensor) -> None:
        """Take what a file has as ``prompt_embeddings``, unless a network that is in the file too makes it."""
        encoder = self.prompt_encoder[name]
        if not encoder.has_network:
            encoder.load_prompt_embeddings(value)

    def make_room(self, name: str, state_dict: dict[str, torch.Tensor]) -> None:
        """Give a prompt the form in which a file has it: with its network, or as the table that the network made."""
        encoder = self.prompt_encoder[name]
        whole = any(key.startswith(ENCODER) for key in state_dict)
        if whole == encoder.has_network or not encoder.network or "prompt_embeddings" not in state_dict:
            return
        config = copy.copy(self.peft_config[name])
        config.inference_mode = not whole
        old = next(encoder.parameters())
        with torch.device(old.device):
            fresh = type(encoder)(config, self.word_embeddings)
        self.prompt_encoder[name] = fresh.to(old.dtype).train(encoder.training).train_on(old.requires_grad)

    # --- what goes into a call --------------------------------------------------------------------------------
    def encode(self, name: str, batch: int, tasks: torch.Tensor | None = None) -> torch.Tensor:
        """The virtual tokens of one adapter, ``[batch, tokens, width]``."""
        encoder = self.prompt_encoder[name]
        index = self.prompt_tokens[name].to(next(encoder.parameters()).device)
        if encoder.uses_tasks:
            return encoder(index.expand(batch, -1), tasks)
        return encoder(index[None]).expand(batch, -1, -1)

    def feed(self, batch: int, stack: int = 0) -> Feed | None:
        """What the rows of a call get: the active prompt, or each row its own. None: nothing.

        Args:
            stack: 0 for the encoder or the only stack, 1 for the decoder beside an encoder.
        """
        context = context_of(self.model)
        names = context.adapter_names
        device = self.word_embeddings.weight.device
        if self.disabled or (names is None and not self.active_adapters):
            return None
        tasks = context.tasks(batch, device)
        if names is None:
            return self._feed_of(self.active_adapters[0], batch, tasks, stack)
        groups, order, _ = context.groups(names, batch, device)
        feeds = {
            name: self._feed_of(name, len(rows), None if tasks is None else tasks[rows], stack)
            for name, rows in groups
            if name != BASE
        }
        size = max((feed.size for feed in feeds.values()), default=0)
        if size == 0:
            return None
        empty = next(iter(feeds.values()))
        parts = [
            (feeds[name] if name in feeds else empty.nothing(len(rows))).padded(len(rows), size)
            for name, rows in groups
        ]
        return Feed.joined(parts, order)

    def _feed_of(self, name: str, batch: int, tasks: torch.Tensor | None, stack: int) -> Feed:
        """What ``batch`` rows with one prompt get."""
        encoder, values = self.prompt_encoder[name], self.encode(name, batch, tasks)
        if not self.as_prefix:
            n = self.peft_config[name].num_virtual_tokens
            values = values[:, n * stack : n * (stack + 1)]
        values = values.to(self.word_embeddings.weight.device)
        own = (encoder.attended, encoder.own_labels)
        rows = [None if given is None else given.to(values.device).expand(batch, -1) for given in own]
        return Feed(values, None, rows[0], rows[1])

    def prompt(self, batch: int, tasks: torch.Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The active prompt: embeddings ``[batch, tokens, width]``, or a cache that holds its keys and values."""
        values = self.encode(self.active_adapters[0], batch, tasks)
        if not self.as_prefix:
            return values
        cache = caches.new_cache(self.model, max_cache_len)
        caches.fill(cache, self.prefix(values))
        return cache

    def prefix(self, values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, ``[batch, heads, tokens, width]``, from ``[batch, tokens, 2 layers width]``.

        For an encoder-decoder the file format steps through the table by four and starts again at its end, as if keys
        and values of cross attention stood between those of self attention.
        """
        config = next(iter(self.peft_config.values()))
        layers, heads = config.num_layers, config.num_attention_heads
        batch, tokens, width = values.shape
        table = values.view(batch, tokens, 2 * layers, heads, width // (2 * layers * heads)).permute(2, 0, 3, 1, 4)
        weight = self.word_embeddings.weight
        table = table.to(weight.dtype) if weight.is_floating_point() else table
        step = 2 * config.num_transformer_submodules
        return [(table[i % (2 * layers)], table[(i + 1) % (2 * layers)]) for i in range(0, step * layers, step)]

    @property
    def as_prefix(self) -> bool:
        return any(encoder.as_prefix for encoder in self.prompt_encoder.values())

    @property
    def in_decoder(self) -> bool:
        """Whether the decoder of an encoder-decoder gets virtual tokens of its own."""
        return self.has_encoder and any(
            encoder.in_decoder and self.peft_config[name].num_transformer_submodules > 1
            for name, encoder in self.prompt_encoder.items()
        )

    @property
    def has_encoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that the next call may use."""
        names = context_of(self.model).adapter_names or self.active_adapters
        return max((self.peft_config[n].num_virtual_tokens for n in names if n != BASE), default=0)

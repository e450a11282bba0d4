"""Virtual tokens ``[P; E(x)]`` before a text, or keys and values ``[K_p; K(x)]`` in every attention layer.

A method says what it trains (:class:`VirtualTokens`). How a model receives it, is here: embeddings, masks, positions,
labels, caches, generation, rows of a batch with different prompts, files.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from peft.compat import alias_submodules
from peft.core import caches, operations
from peft.core.checkpointing import stop_watching, watch_checkpointing
from peft.core.context import BASE
from peft.core.tuner import add_auxiliary, check_adapter_name, context_of, drop_context
from peft.core.walk import embeddings_of
from peft.utils.error import ConfigError
from peft.utils.peft_types import PEFT_TYPE_TO_TUNER_MAPPING, register_peft_method


ENCODER = "prompt_encoder."  # how tensors in a file begin that only further training needs


class VirtualTokens(nn.Module):
    """What a prompt method trains; one for each adapter.

    Args:
        config: its config, with all sizes settled.
        word_embeddings: the base model's input embedding, for methods that start from it.

    Attributes:
        embedding: the table; saved as ``prompt_embeddings`` unless a network stands between it and the prompt.
        as_prefix: the output is keys and values ``[..., tokens, 2 layers width]``, not embeddings.
        in_decoder: an encoder-decoder's decoder gets virtual tokens too, the second half of them.
        uses_tasks: ``forward`` takes the task of each row as well.
        network: names of the submodules between table and prompt, which exist while such a network is trained.
        frozen: names of parameters, or of modules that hold them, which are not trained.
        inputs: names of inputs that are the method's, not the base model's.
        attended: 1 for virtual tokens that the text may see, 0 for others, ``[tokens]``; None: it sees all.
        own_labels: labels of the virtual tokens, ``[tokens]``; None: none of them is predicted.
    """

    as_prefix: ClassVar[bool] = False
    in_decoder: ClassVar[bool] = False
    uses_tasks: ClassVar[bool] = False
    network: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()
    attended: torch.Tensor | None = None
    own_labels: torch.Tensor | None = None
    embedding: Any

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        """indices ``[batch, tokens]`` -> ``[batch, tokens, width]``; ``task_ids``: ``[batch]``."""
        return self.embedding(indices)

    @classmethod
    def prepare_config(cls, config: Any) -> None:
        """Settle the fields of the method's own."""

    @classmethod
    def count(cls, config: Any) -> int:
        """How many virtual tokens the table has."""
        return config.num_virtual_tokens * (1 if cls.as_prefix else config.num_transformer_submodules)

    @property
    def has_network(self) -> bool:
        return any(hasattr(self, name) for name in self.network)

    def train_on(self, requires_grad: bool) -> VirtualTokens:
        """Let it train, or not."""
        for name, p in self.named_parameters():
            p.requires_grad_(requires_grad and name.partition(".")[0] not in self.frozen)
        return self

    def saved(self) -> torch.Tensor:
        """What a file has as ``prompt_embeddings``, ``[tokens, width]``."""
        if not self.has_network:
            return self.embedding.weight
        rows = torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)
        with torch.no_grad():
            return self.eval()(rows[None])[0]

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Become a given prompt, ``[tokens, width]``.

        Raises:
            ValueError: if a network makes the prompt, or the shape is another one.
        """
        if self.has_network:
            raise ValueError("this prompt is the output of a network, which cannot be told what to give.")
        check_shape(prompt_embeddings, self.embedding.weight)
        put(self.embedding, "weight", prompt_embeddings)

    def label_weights(self, types: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
        """How much each token counts in the loss, ``[batch, tokens + length]``; None: all the same.

        Args:
            types: the input called ``inputs[0]``, ``[batch, length]``, or None.
        """
        return None

    def select_labels(self, labels: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Labels of a text, ``[batch, length]``, with -100 for tokens that its types exclude from the loss."""
        return labels

    def adapter_state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(name in the file, name in memory, tensor); a tensor that is computed has no name in memory."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            if self.has_network:
                yield ENCODER + name, name, tensor
            elif name != "embedding.weight":
                yield name, name, tensor
        yield "prompt_embeddings", "" if self.has_network else "embedding.weight", self.saved()


@dataclass
class Feed:
    """The virtual tokens of one call.

    Attributes:
        values: ``[batch, tokens, width]``; shorter rows are padded at their beginning.
        lengths: how many tokens each row has, ``[batch]``; None: all of them.
        attended: 1 for tokens that the text may see, 0 for others, ``[batch, tokens]``; None: it sees all.
        labels: labels of the virtual tokens, ``[batch, tokens]``; None: none of them is predicted.
    """

    values: torch.Tensor
    lengths: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    @property
    def size(self) -> int:
        return self.values.shape[1]

    def nothing(self, rows: int) -> Feed:
        """A feed of no tokens for some rows."""
        return Feed(self.values[:1, :0].expand(rows, -1, -1))

    def padded(self, rows: int, size: int) -> Feed:
        """The same, with padding in front up to ``size`` tokens."""
        gap, device = size - self.size, self.values.device
        attended = (
            torch.ones(rows, self.size, dtype=torch.long, device=device) if self.attended is None else self.attended
        )
        labels = attended.new_full((rows, self.size), -100) if self.labels is None else self.labels
        pad = nn.functional.pad
        return Feed(
            pad(self.values, (0, 0, gap, 0)),
            torch.full((rows,), self.size, device=device),
            pad(attended, (gap, 0)),
            pad(labels, (gap, 0), value=-100),
        )

    @classmethod
    def joined(cls, parts: list[Feed], order: torch.Tensor) -> Feed:
        """Padded feeds of groups of rows as one, with the rows in the order of the batch."""
        values, lengths, attended, labels = (
            torch.cat([getattr(part, field) for part in parts])[order]
            for field in ("values", "lengths", "attended", "labels")
        )
        even = bool((lengths == values.shape[1]).all())
        return cls(values, None if even else lengths, None if even and bool(attended.all()) else attended, labels)

    def mask(self, like: torch.Tensor) -> torch.Tensor:
        """1 for virtual tokens, 0 for padding: ``[batch, tokens]`` in the dtype of ``like``."""
        return like.new_ones(like.shape[0], self.size) if self.attended is None else self.attended.to(like)

    @property
    def needs_mask(self) -> bool:
        return self.lengths is not None or self.attended is not None

    def positions(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the virtual tokens, and those of the text, ``[batch, length]``, moved behind them."""
        if self.lengths is None:
            return torch.arange(self.size, device=text.device).expand(len(text), -1).to(text.dtype), text + self.size
        return self._index(text).clamp(min=0).to(text.dtype), text + self.lengths[:, None].to(text)

    def fill(self, like: torch.Tensor, value: int) -> torch.Tensor:
        return like.new_full((like.shape[0], self.size), value)

    def _index(self, like: torch.Tensor) -> torch.Tensor:
        return torch.arange(self.size, device=like.device) - (self.size - self.lengths.to(like.device))[:, None]

    def join(self, virtual: torch.Tensor, text: torch.Tensor, to_the_left: bool = False) -> torch.Tensor:
        """Both, one after the other; ``to_the_left`` moves the padding of shorter rows to their end."""
        whole = torch.cat([virtual.to(text), text], dim=1)
        if not to_the_left or self.lengths is None:
            return whole
        start = self.size - self.lengths.to(whole.device)
        index = (torch.arange(whole.shape[1], device=whole.device) + start[:, None]) % whole.shape[1]
        return whole[torch.arange(len(whole), device=whole.device)[:, None], index]


class PromptTuner:
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

    # --- calls ------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the prompts of the call."""
        inputs = named(self.model.forward, args, kwargs)
        given = self._taken(inputs)
        main = next((inputs[n] for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None), None)
        if self.disabled or (main is None and inputs.get("encoder_outputs") is None):
            return self.model(**inputs)
        if self.as_prefix:
            return self._forward_with_prefix(inputs)
        if main is not None:
            if self.heads_read_ids and inputs.get("input_ids") is not None and not self.has_encoder:
                return self._forward_with_ids(inputs)
            if given is not None and self.active_adapters and inputs.get("labels") is not None:
                encoder = self.prompt_encoder[self.active_adapters[0]]
                inputs["labels"] = encoder.select_labels(inputs["labels"], given)
            inputs = self.extended(inputs)
            if (weights := self._label_weights(given, main)) is not None:
                return self._with_weighted_loss(inputs, weights)
        return self.model(**(self._decoder_extended(inputs) if self.in_decoder else inputs))

    def _taken(self, inputs: dict[str, Any]) -> Any:
        """Take the methods' own inputs out of a call; the first of them is given back."""
        names = {name for encoder in self.prompt_encoder.values() for name in encoder.inputs}
        taken = [inputs.pop(name) for name in names if name in inputs]
        return next((value for value in taken if value is not None), None)

    def _label_weights(self, types: torch.Tensor | None, text: torch.Tensor) -> torch.Tensor | None:
        if context_of(self.model).adapter_names is not None or not self.active_adapters:
            return None  # rows of a mixed batch count alike
        return self.prompt_encoder[self.active_adapters[0]].label_weights(types, *text.shape[:2])

    def _with_weighted_loss(self, inputs: dict[str, Any], weights: torch.Tensor) -> Any:
        """The loss is sum(w * cross entropy) over the labelled tokens, divided by their number."""
        labels = inputs.pop("labels", None)
        output = self.model(**inputs)
        if labels is not None:
            output["loss"] = weighted_cross_entropy(output.logits, labels, weights)
        return output

    def extended(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the encoder, or of the only stack, with the virtual tokens in front."""
        ids, embeds = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
        feed = self.feed(len(ids if embeds is None else embeds))
        if feed is None:
            return inputs if ids is None else {**inputs, "input_ids": ids}
        embeds = self.model.get_input_embeddings()(ids) if embeds is None else embeds
        left = self.has_encoder or not is_causal(self.model)
        inputs = {**inputs, "inputs_embeds": feed.join(feed.values, embeds, left)}
        self._extend_companions(feed, inputs, embeds[..., 0], left)
        if not self.has_encoder:
            self._extend_labels(feed, inputs, left)
        return inputs

    def _extend_companions(self, feed: Feed, inputs: dict[str, Any], text: torch.Tensor, left: bool) -> None:
        """Mask, positions and token types; ``text`` is any tensor ``[batch, length]``."""
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is None and feed.needs_mask:
            mask = torch.ones(text.shape, dtype=torch.long, device=text.device)
        if mask is not None:
            check_mask(mask, "attention_mask")
            inputs["attention_mask"] = feed.join(feed.mask(mask), mask, left)
        if positions is None and feed.lengths is not None and not left:
            positions = self._positions_for_padding(text)
        if positions is not None:
            inputs["position_ids"] = feed.join(*feed.positions(positions), left)
        if (types := inputs.get("token_type_ids")) is not None:
            inputs["token_type_ids"] = feed.join(feed.fill(types, 0), types, left)

    def _positions_for_padding(self, text: torch.Tensor) -> torch.Tensor | None:
        """Positions of a text, which a model needs when rows have prompts of different length.

        Raises:
            ValueError: if the model counts positions itself, and would count the padding.
        """
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            return torch.arange(text.shape[1], device=text.device).expand(len(text), -1)
        if any(isinstance(m, nn.Embedding) and "pos" in n and "bias" not in n for n, m in self.model.named_modules()):
            raise ValueError(
                f"{type(self.model).__name__} takes no position_ids and counts positions itself, so the rows of a "
                "batch cannot have prompts of different length. Use prompts of one length, or a batch for each."
            )
        return None

    def _extend_labels(self, feed: Feed, inputs: dict[str, Any], left: bool = False) -> None:
        for name in self.token_inputs:
            if (labels := inputs.get(name)) is not None:
                own = feed.fill(labels, -100) if feed.labels is None else feed.labels
                inputs[name] = feed.join(own, labels, left)
        for name in self.position_inputs:
            if (place := inputs.get(name)) is not None:
                inputs[name] = place + (feed.lengths.to(place) if left and feed.lengths is not None else feed.size)

    def _decoder_extended(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the decoder of an encoder-decoder, with its virtual tokens in front."""
        ids, embeds, labels = (inputs.get(n) for n in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
        if ids is None and embeds is None and labels is not None:
            from peft.utils.other import shift_tokens_right

            config = self.model.config
            ids = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        if ids is None and embeds is None:
            return inputs
        feed = self.feed(next(len(given) for given in (embeds, ids) if given is not None), stack=1)
        if feed is None:
            return inputs
        embeds = self.model.get_input_embeddings()(ids) if embeds is None else embeds
        inputs = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
        inputs["decoder_inputs_embeds"] = feed.join(feed.values, embeds)
        mask = inputs.get("decoder_attention_mask")
        if mask is None and feed.lengths is not None:
            self._positions_for_padding(embeds[..., 0])
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        if mask is not None:
            check_mask(mask, "decoder_attention_mask")
            inputs["decoder_attention_mask"] = feed.join(feed.mask(mask), mask)
        self._extend_labels(feed, inputs)
        return inputs

    def _forward_with_ids(self, inputs: dict[str, Any]) -> Any:
        """The head sees token ids, in which it looks for padding, while the stack under it gets embeddings."""
        backbone = backbone_of(self.model)
        ids = inputs["input_ids"]
        feed = self.feed(len(ids))
        inputs = self.extended(inputs)
        if feed is None or backbone is self.model:
            return self.model(**inputs)
        left = not is_causal(self.model)
        filler = int(self.model.config.get_text_config().pad_token_id == 0)  # any token that is no padding
        embeds = inputs.pop("inputs_embeds")
        inputs["input_ids"] = feed.join(feed.fill(ids, filler), ids, left)
        return self._calling(backbone, inputs, input_ids=None, inputs_embeds=embeds)

    def _calling(self, receiver: nn.Module, inputs: dict[str, Any], **changed: Any) -> Any:
        """Call the model; ``receiver``, a module in it, gets other values of some arguments."""
        if receiver is self.model:
            return self.model(**{**inputs, **changed})

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return (), {**named(module.forward, args, kwargs), **changed}

        handle = receiver.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return self.model(**inputs)
        finally:
            handle.remove()

    # --- prefixes ---------------------------------------------------------------------------------------------
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

    def _forward_with_prefix(self, inputs: dict[str, Any]) -> Any:
        receiver = caches.receiver_of(self.model)
        name = str(caches.cache_argument(receiver.forward))
        cache = inputs.pop(name, None)
        text = self._text(inputs)
        feed = None if text is None else self.feed(len(text))
        if feed is None:
            return self.model(**inputs, **({} if cache is None else {name: cache}))
        self._extend_for_prefix(feed, inputs, text)
        if caches.length_of(cache):  # the prefix is in it already
            return self._calling(receiver, inputs, **{name: cache})
        cache = caches.new_cache(self.model) if cache is None else cache
        caches.fill(cache, self.prefix(feed.values))
        if not caches.is_checkpointing(self.model):
            return self._calling(receiver, inputs, **{name: cache})
        if self.checkpointed is None:
            self.checkpointed = caches.Checkpointed(self.model)
        with self.checkpointed.call(self.model, caches.freeze(cache)):
            return self._calling(receiver, inputs, **{name: cache})

    def _text(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """A tensor ``[batch, length]`` of the stack that gets the prefix."""
        before = "decoder_" if self.has_encoder else ""
        for name in (f"{before}input_ids", f"{before}inputs_embeds", "labels" if self.has_encoder else ""):
            if (given := inputs.get(name)) is not None:
                return given[..., 0] if given.is_floating_point() else given
        return inputs.get("input_ids")  # some models make the decoder's input from that of the encoder

    def _extend_for_prefix(self, feed: Feed, inputs: dict[str, Any], text: torch.Tensor) -> None:
        before = "decoder_" if self.has_encoder else ""
        mask, positions = inputs.get(f"{before}attention_mask"), inputs.get(f"{before}position_ids")
        if feed.lengths is not None:
            mask = torch.ones(text.shape, dtype=torch.long, device=text.device) if mask is None else mask
            positions = self._positions_for_padding(text) if positions is None else positions
        if mask is not None:
            check_mask(mask, f"{before}attention_mask")
            inputs[f"{before}attention_mask"] = feed.join(feed.mask(mask), mask)
        if positions is not None:
            inputs[f"{before}position_ids"] = feed.positions(positions)[1]

    # --- generation -------------------------------------------------------------------------------------------
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate`` with the prompts of the call; only the text and its continuation come back."""
        if args:
            kwargs = {"inputs": args[0], **dict(zip(GENERATE, args[1:])), **kwargs}
        self._taken(kwargs)
        if self.disabled or (not self.active_adapters and context_of(self.model).adapter_names is None):
            return self.model.generate(**kwargs)
        if self.has_encoder and not self.as_prefix:
            kwargs = self._encoder_inputs(kwargs)
        with self._preparing():
            return self.model.generate(**kwargs)

    def _encoder_inputs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``generate`` with virtual tokens before the encoder's text."""
        kwargs = dict(kwargs)
        given = kwargs.pop("inputs", None)
        if given is not None:
            kwargs["inputs_embeds" if given.is_floating_point() else "input_ids"] = given
        ids = kwargs.get("input_ids")
        if kwargs.get("encoder_outputs") is not None or (ids is None and kwargs.get("inputs_embeds") is None):
            return kwargs
        pad = getattr(self.model.generation_config, "pad_token_id", None)
        if kwargs.get("attention_mask") is None and ids is not None and pad is not None and bool((ids == pad).any()):
            kwargs["attention_mask"] = (ids != pad).long()  # what generate itself does where it sees the ids
        return self.extended(kwargs)

    @contextmanager
    def _preparing(self) -> Iterator[None]:
        """A context in which ``generate`` of the base model enters the prompts as it prepares each step."""
        model = self.model
        wrapped = {
            "prepare_inputs_for_generation": partial(self._prepare_step, model.prepare_inputs_for_generation),
            "_prepare_cache_for_generation": partial(_with_more_room, model._prepare_cache_for_generation, self),
        }
        vars(model).update(wrapped)
        try:
            yield
        finally:
            for name in wrapped:
                vars(model).pop(name, None)

    def _prepare_step(self, prepare: Callable, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """One step of generation: virtual tokens go in where the cache is empty; later the mask tells of them."""
        kwargs = named(prepare, (input_ids, *args), kwargs)
        input_ids = kwargs.pop("input_ids")
        if kwargs.get("use_cache") is False:
            for name in caches.ARGUMENTS:
                kwargs.pop(name, None)  # in which a prefix came at the step before
        cache = next((kwargs[name] for name in caches.ARGUMENTS if kwargs.get(name) is not None), None)
        begun = caches.length_of(cache) > 0
        decoder = self.has_encoder
        if decoder and not self.as_prefix and not self.in_decoder:
            return prepare(input_ids, **kwargs)
        feed = self.feed(len(input_ids), stack=int(decoder))
        if feed is None:
            return prepare(input_ids, **kwargs)
        if begun and kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None:
            kwargs["next_sequence_length"] += feed.size  # a conversation goes on: the cache holds the prompt too
        if self.as_prefix and not begun:
            cache = caches.new_cache(self.model) if cache is None else cache
            caches.fill(cache, self.prefix(feed.values))
            kwargs[self.cache_name] = cache
        self._extend_step(feed, kwargs, input_ids, enter=not self.as_prefix and not begun)
        if self.as_prefix or begun:
            return prepare(input_ids, **kwargs)
        if decoder:
            return self._first_decoder_step(feed, prepare(input_ids, **kwargs))
        embeds = kwargs.pop("inputs_embeds", None)
        embeds = self.model.get_input_embeddings()(input_ids) if embeds is None else embeds
        kwargs.update(inputs_embeds=feed.join(feed.values, embeds), is_first_iteration=True, next_sequence_length=None)
        return prepare(input_ids, **kwargs)

    @property
    def cache_name(self) -> str:
        """What the model calls the cache among its arguments."""
        return str(caches.cache_argument(caches.receiver_of(self.model).forward))

    def _extend_step(self, feed: Feed, kwargs: dict[str, Any], ids: torch.Tensor, enter: bool) -> None:
        """Mask, positions and token types of one step; ``enter``: its inputs hold the virtual tokens themselves."""
        before = "decoder_" if self.has_encoder else ""
        mask, positions = kwargs.get(f"{before}attention_mask"), kwargs.get(f"{before}position_ids")
        if mask is None and feed.needs_mask:
            self._positions_for_padding(ids)
            mask = torch.ones(ids.shape, dtype=torch.long, device=ids.device)
        if mask is not None and mask.dim() == 2:
            kwargs[f"{before}attention_mask"] = feed.join(feed.mask(mask), mask)
        if positions is not None:
            virtual, moved = feed.positions(positions)
            kwargs[f"{before}position_ids"] = feed.join(virtual, moved) if enter else moved
        if enter and (types := kwargs.get("token_type_ids")) is not None:
            kwargs["token_type_ids"] = feed.join(feed.fill(types, 0), types)

    def _first_decoder_step(self, feed: Feed, inputs: dict[str, Any]) -> dict[str, Any]:
        embeds = self.model.get_input_embeddings()(inputs.pop("decoder_input_ids"))
        inputs["decoder_inputs_embeds"] = feed.join(feed.values, embeds)
        return inputs


GENERATE = ("generation_config", "logits_processor", "stopping_criteria")
"""Positional arguments of transformers' ``generate`` after the inputs."""


def _with_more_room(prepare: Callable, prompts: PromptTuner, *args: Any, **kwargs: Any) -> Any:
    """Have ``generate`` make its cache longer: one of fixed size is to hold the virtual tokens too."""
    inputs = named(prepare, args, kwargs)
    inputs["max_cache_length"] += prompts.longest
    return prepare(**inputs)


def named(function: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names."""
    if not args:
        return dict(kwargs)
    return {**inspect.signature(function).bind_partial(*args).arguments, **kwargs}


def weighted_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum(w * cross entropy of the next token) / number of labels.

    Args:
        logits: ``[batch, length, vocabulary]``. labels: ``[batch, length]``, -100 for none. weights: the same.
    """
    labels, weights = labels[:, 1:].to(logits.device), weights[:, 1:].to(logits.device, torch.float32)
    each = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, reduction="none")
    return (each * weights).sum() / (labels != -100).sum().clamp(min=1)


@torch.no_grad()
def put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a parameter other values, or its first ones where it is on the meta device."""
    old = getattr(module, name)
    if old.is_meta:
        setattr(module, name, nn.Parameter(value.detach().to(old.dtype).clone(), old.requires_grad))
    else:
        old.copy_(value)


def check_shape(given: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise ValueError where a prompt has not the shape of its place."""
    if given.shape != wanted.shape:
        raise ValueError(f"the prompt is {list(given.shape)}, but its place {list(wanted.shape)} [tokens, width].")


def check_mask(mask: Any, name: str) -> None:
    """Raise ValueError for a mask that says more than which tokens are padding."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError(
            f"{name} should be a tensor [batch, length] of 0 and 1, so that virtual tokens can be added to it; got "
            f"{tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__}."
        )


def is_causal(model: nn.Module) -> bool:
    """Whether tokens see only those before them, so that a text is best padded at its beginning."""
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def backbone_of(model: nn.Module) -> nn.Module:
    """The stack of layers under a task's head; the model itself if it has no head."""
    inner = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    return inner if isinstance(inner, nn.Module) else model


# --- sizes ----------------------------------------------------------------------------------------------------


def settle_sizes(config: Any, model: nn.Module, as_prefix: bool) -> None:
    """Fill in the sizes that the config leaves open, from the model.

    Raises:
        ValueError: if a size is neither given nor found, or given and not that of the model.
    """
    if config.num_virtual_tokens is None:
        raise ConfigError(f"{type(config).__name__} needs num_virtual_tokens, the length of the prompt.")
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == "SEQ_2_SEQ_LM" else 1
    found = sizes_of(model, as_prefix)
    for field, value in found.items():
        given = getattr(config, field)
        binding = as_prefix or field == "token_dim"
        if given is not None and value is not None and given != value and binding:
            raise ConfigError(
                f"the prompt has {field}={given}, but {type(model).__name__} has {value}: it was made for another "
                f"base model{f' ({config.base_model_name_or_path})' if config.base_model_name_or_path else ''}. Load "
                f"that model, or leave {field} out of a new config."
            )
        setattr(config, field, value if given is None else given)
    missing = [field for field in found if getattr(config, field) is None and (as_prefix or field == "token_dim")]
    if missing:
        raise ConfigError(f"{type(model).__name__} does not say its {', '.join(missing)}: set them in the config.")


def sizes_of(model: nn.Module, as_prefix: bool) -> dict[str, int | None]:
    """``num_layers``, ``num_attention_heads`` and ``token_dim``: of the embedding, or of all key heads of a layer."""
    config = getattr(model, "config", None)
    joint = getattr(config, "is_encoder_decoder", False) or not hasattr(config, "get_text_config")
    text = config if joint else config.get_text_config(decoder=True)
    layers, heads = (_first(text, names) for names in (("num_hidden_layers", "num_layers"), ("num_attention_heads",)))
    if as_prefix:
        layers = _first(text, ("num_decoder_layers", "decoder_layers")) or layers
        width, heads = _first(text, ("hidden_size",)), _first(text, ("decoder_attention_heads",)) or heads
        each = _first(text, ("head_dim", "d_kv")) or (width // heads if width and heads else None)
        if getattr(text, "multi_query", False):
            heads = 1
        heads = _first(text, ("num_key_value_heads", "num_kv_heads")) or heads
        width = each * heads if each and heads else None
        return {"num_layers": layers, "num_attention_heads": heads, "token_dim": width}
    weight = getattr(embeddings_of(model)[0], "weight", None)
    width = _first(embeddings_of(model)[0], ("embedding_dim",)) or (None if weight is None else weight.shape[-1])
    return {"num_layers": layers, "num_attention_heads": heads, "token_dim": width}


def _first(source: Any, names: Sequence[str]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(source, name, None), int)), None)


def define_prompt(encoder_cls: type[VirtualTokens], config_cls: Any, *, prefix: str) -> None:
    """Register a prompt method.

    Args:
        encoder_cls: what it trains. config_cls: its config.
        prefix: how its tensors' names would start, if it had any in the model; others must not use it.
    """
    name = config_cls.METHOD.value.lower()
    register_peft_method(name=name, config_cls=config_cls, model_cls=encoder_cls, prefix=prefix)
    alias_submodules(sys.modules[encoder_cls.__module__])

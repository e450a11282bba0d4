"""Generation with prompts: they enter where the cache is still empty; later the mask tells of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from peft.core.model.tuner import context_of
from peft.core.prompts import caches
from peft.core.prompts.calls import PromptedCalls, named
from peft.core.prompts.feed import Feed


class PromptTuner(PromptedCalls):
    """Manages the prompts of a model; see :class:`Prompts` for arguments and attributes."""

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
        step: Any = partial(self._prepare_step, model.prepare_inputs_for_generation)
        step.__signature__ = inspect.signature(model.prepare_inputs_for_generation)  # generate asks what it takes
        wrapped = {
            "prepare_inputs_for_generation": step,
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

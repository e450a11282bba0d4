"""Generation with prompts: they enter where the cache is still empty; later the mask tells of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from peft.core.model.sequence import ARGUMENTS, cache_of, length_of
from peft.core.prompts import caches
from peft.core.prompts.calls import Calls, named


class Generation:
    """How ``generate`` of the base model receives the prompts."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.prompts, self.model = calls, calls.prompts, calls.model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate`` with the prompts of the call; only the text and its continuation come back."""
        if args:
            kwargs = {"inputs": args[0], **dict(zip(GENERATE, args[1:])), **kwargs}
        self.calls.taken(kwargs)
        if not self.prompts.in_use:
            return self.model.generate(**kwargs)
        if self.prompts.has_encoder and not self.prompts.as_prefix:
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
        return self.calls.extended(kwargs)

    @contextmanager
    def _preparing(self) -> Iterator[None]:
        """A context in which ``generate`` of the base model enters the prompts as it prepares each step."""
        model = self.model
        step: Any = partial(self._prepare_step, model.prepare_inputs_for_generation)
        step.__signature__ = inspect.signature(model.prepare_inputs_for_generation)  # generate asks what it takes
        wrapped = {
            "prepare_inputs_for_generation": step,
            "_prepare_cache_for_generation": partial(self._with_more_room, model._prepare_cache_for_generation),
        }
        # On the instance, for this call: `generate` finds them before those of the class.
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
            for name in ARGUMENTS:
                kwargs.pop(name, None)  # in which a prefix came at the step before
        cache = cache_of(kwargs)
        begun = length_of(cache) > 0
        decoder, as_prefix = self.prompts.has_encoder, self.prompts.as_prefix
        if decoder and not as_prefix and not self.prompts.in_decoder:
            return prepare(input_ids, **kwargs)
        feed = self.prompts.feed(len(input_ids), stack=int(decoder))
        if feed is None:
            return prepare(input_ids, **kwargs)
        if begun and kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None:
            kwargs["next_sequence_length"] += feed.size  # a conversation goes on: the cache holds the prompt too
        if as_prefix and not begun:
            cache = caches.new_cache(self.model) if cache is None else cache
            kwargs[caches.name_of(self.model)] = self.prompts.enter(cache, feed)
        enter, before = not as_prefix and not begun, "decoder_" if decoder else ""
        self.calls.accompany(feed, kwargs, input_ids, before=before, enter=enter, counted=True)
        if not enter:
            return prepare(input_ids, **kwargs)
        table = self.model.get_input_embeddings()
        if decoder:
            inputs = prepare(input_ids, **kwargs)
            inputs["decoder_inputs_embeds"] = feed.join(feed.values, table(inputs.pop("decoder_input_ids")))
            return inputs
        embeds = kwargs.pop("inputs_embeds", None)
        embeds = table(input_ids) if embeds is None else embeds
        kwargs.update(inputs_embeds=feed.join(feed.values, embeds), is_first_iteration=True, next_sequence_length=None)
        return prepare(input_ids, **kwargs)

    def _with_more_room(self, prepare: Callable, *args: Any, **kwargs: Any) -> Any:
        """Have ``generate`` make its cache longer: one of fixed size is to hold the virtual tokens too."""
        inputs = named(prepare, args, kwargs)
        inputs["max_cache_length"] += self.prompts.longest
        return prepare(**inputs)


GENERATE = ("generation_config", "logits_processor", "stopping_criteria")
"""Positional arguments of transformers' ``generate`` after the inputs."""

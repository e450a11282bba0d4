"""A forward call with prompts: embeddings, masks, positions, labels, or a cache that holds the prefix."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peft.core.model.tuner import context_of
from peft.core.prompts import caches
from peft.core.prompts.adapters import Prompts
from peft.core.prompts.feed import Feed


class PromptedCalls(Prompts):
    """How the base model receives virtual tokens before a text, or a prefix in its cache."""

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

"""A forward call with prompts: embeddings, masks, positions, labels, or a cache that holds the prefix."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import nn

from peft.core.model.record import context_of
from peft.core.model.sequence import ARGUMENTS, length_of
from peft.core.prompts import caches
from peft.core.prompts.feed import Feed
from peft.core.prompts.rows import Prompts


@dataclass(frozen=True)
class Task:
    """What virtual tokens before the text do to the inputs of a task.

    Attributes:
        token_inputs: inputs with one entry for each token, which virtual tokens get no say in (labels).
        heads_read_ids: the task's head looks for padding in ``input_ids``.
    """

    token_inputs: tuple[str, ...] = ()
    heads_read_ids: bool = False


PLAIN = Task()


class Calls:
    """How the base model receives virtual tokens before a text, or a prefix in its cache."""

    def __init__(self, prompts: Prompts, task: Task) -> None:
        self.prompts, self.task = prompts, task
        self.model = prompts.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward with the prompts of the call."""
        inputs = named(self.model.forward, args, kwargs)
        given, prompts = self.taken(inputs), self.prompts
        main = next((inputs[n] for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None), None)
        if prompts.disable_adapters or (main is None and inputs.get("encoder_outputs") is None):
            return self.model(**inputs)
        if prompts.as_prefix:
            return self._forward_with_prefix(inputs)
        if main is not None:
            if self.task.heads_read_ids and inputs.get("input_ids") is not None and not prompts.has_encoder:
                return self._forward_with_ids(inputs)
            one = prompts.one  # rows of a mixed batch count alike
            if given is not None and one is not None and inputs.get("labels") is not None:
                inputs["labels"] = one.select_labels(inputs["labels"], given)
            inputs = self.extended(inputs)
            if one is not None and (weights := one.label_weights(given, *main.shape[:2])) is not None:
                return self._with_weighted_loss(inputs, weights)
        return self.model(**(self._decoder_extended(inputs) if prompts.in_decoder else inputs))

    def taken(self, inputs: dict[str, Any]) -> Any:
        """Take the methods' own inputs out of a call; the first of them is given back."""
        names = {name for encoder in self.prompts.encoders.values() for name in encoder.inputs}
        taken = [inputs.pop(name) for name in names if name in inputs]
        return next((value for value in taken if value is not None), None)

    def _with_weighted_loss(self, inputs: dict[str, Any], weights: torch.Tensor) -> Any:
        """The loss is sum(w * cross entropy) over the labelled tokens, divided by their number."""
        labels = inputs.pop("labels", None)
        output = self.model(**inputs)
        if labels is not None:
            output["loss"] = weighted_cross_entropy(output.logits, labels, weights)
        return output

    # --- virtual tokens before the text -----------------------------------------------------------------------
    def extended(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the encoder, or of the only stack, with the virtual tokens in front."""
        left = self.prompts.has_encoder or not is_causal(self.model)
        return self._entered(inputs, "", left, not self.prompts.has_encoder)

    def _decoder_extended(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of the decoder of an encoder-decoder, with its virtual tokens in front."""
        given = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
        if not given and (labels := inputs.get("labels")) is not None:
            config = self.model.config
            ids = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
            inputs = {**inputs, "decoder_input_ids": ids}
        return self._entered(inputs, "decoder_", False, True)

    def _entered(self, inputs: dict[str, Any], before: str, left: bool, labelled: bool) -> dict[str, Any]:
        """Inputs of a stack with virtual tokens in front; what their names begin with, and whether labels are its."""
        ids, embeds = (inputs.get(f"{before}{name}") for name in ("input_ids", "inputs_embeds"))
        text = ids if embeds is None else embeds
        feed = None if text is None else self.prompts.feed(len(text), stack=int(before != ""))
        if feed is None:
            return inputs
        embeds = self.model.get_input_embeddings()(ids) if embeds is None else embeds
        inputs = {k: v for k, v in inputs.items() if k != f"{before}input_ids"}
        inputs[f"{before}inputs_embeds"] = feed.join(feed.values, embeds, left)
        self.accompany(feed, inputs, embeds[..., 0], before=before, left=left)
        if labelled:
            self._extend_labels(feed, inputs, left)
        return inputs

    def accompany(
        self,
        feed: Feed,
        inputs: dict[str, Any],
        text: torch.Tensor,
        *,
        before: str = "",
        enter: bool = True,
        left: bool = False,
        counted: bool = False,
    ) -> None:
        """Extend mask, positions and token types in the inputs of a call for the virtual tokens before its text.

        Args:
            text: any tensor ``[batch, length]``.
            before: what the names of these inputs begin with.
            enter: the virtual tokens pass through the stack; otherwise its cache holds them, and only the mask tells.
            left: rows are padded at their end.
            counted: the model counts positions by the mask, where none are given.

        Raises:
            ValueError: if rows have prompts of different length, and the model would count the padding.
        """
        context_of(self.model).lead(before != "", feed.size, feed.lengths if left else None)
        mask_name, position_name, type_name = (f"{before}{n}" for n in COMPANIONS)
        mask, positions, types = (inputs.get(name) for name in (mask_name, position_name, type_name))
        if mask is None and feed.needs_mask:
            mask = torch.ones(text.shape, dtype=torch.long, device=text.device)
        if positions is None and feed.lengths is not None and not left:
            # Asked also where the model counts by the mask: it refuses models that would count the padding.
            positions = self._positions(text, position_name)
            positions = None if counted else positions
        if mask is not None:
            check_mask(mask, mask_name)
            inputs[mask_name] = feed.join(feed.mask(mask), mask, left)
        if positions is not None:
            virtual, moved = feed.positions(positions)
            inputs[position_name] = feed.join(virtual, moved, left) if enter else moved
        if types is not None and enter:
            inputs[type_name] = feed.join(feed.fill(types, 0), types, left)

    def _positions(self, text: torch.Tensor, name: str) -> torch.Tensor | None:
        """Positions of a text, which a model needs when rows have prompts of different length."""
        if name in inspect.signature(self.model.forward).parameters:
            return torch.arange(text.shape[1], device=text.device).expand(len(text), -1)
        if any(isinstance(m, nn.Embedding) and "pos" in n and "bias" not in n for n, m in self.model.named_modules()):
            raise ValueError(
                f"{type(self.model).__name__} takes no {name} and counts positions itself, so the rows of a "
                "batch cannot have prompts of different length. Use prompts of one length, or a batch for each."
            )
        return None

    def _extend_labels(self, feed: Feed, inputs: dict[str, Any], left: bool = False) -> None:
        for name in self.task.token_inputs:
            if (labels := inputs.get(name)) is not None:
                own = feed.fill(labels, -100) if feed.labels is None else feed.labels
                inputs[name] = feed.join(own, labels, left)

    def _forward_with_ids(self, inputs: dict[str, Any]) -> Any:
        """The head sees token ids, in which it looks for padding, while the stack under it gets embeddings."""
        backbone = backbone_of(self.model)
        ids = inputs["input_ids"]
        feed = self.prompts.feed(len(ids))
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

        own = get_ident()

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if get_ident() != own:
                return None  # another thread's call
            return (), {**named(module.forward, args, kwargs), **changed}

        with receiver.register_forward_pre_hook(hook, with_kwargs=True):
            return self.model(**inputs)

    # --- prefixes ---------------------------------------------------------------------------------------------
    def _forward_with_prefix(self, inputs: dict[str, Any]) -> Any:
        receiver, name = caches.receiver_of(self.model), caches.name_of(self.model)
        given = [inputs.pop(other) for other in ARGUMENTS if other in inputs]  # an older name will do
        cache = next((one for one in given if one is not None), None)
        before = "decoder_" if self.prompts.has_encoder else ""
        text = self._text(inputs, before)
        feed = None if text is None else self.prompts.feed(len(text))
        if feed is None or text is None:
            return self.model(**inputs, **({} if cache is None else {name: cache}))
        self.accompany(feed, inputs, text, before=before, enter=False)
        if length_of(cache):  # the prefix is in it already
            return self._calling(receiver, inputs, **{name: cache})
        if cache is None and self.prompts.replaced is not None:
            cache = self.prompts.replaced(len(text))
        else:
            cache = caches.new_cache(self.model) if cache is None else cache
            self.prompts.enter(cache, feed)
        if not caches.is_checkpointing(self.model):
            return self._calling(receiver, inputs, **{name: cache})
        with caches.kept_by_checkpoints(self.model):
            return self._calling(receiver, inputs, **{name: caches.freeze(cache)})

    def _text(self, inputs: dict[str, Any], before: str) -> torch.Tensor | None:
        """A tensor ``[batch, length]`` of the stack that gets the prefix."""
        for name in (f"{before}input_ids", f"{before}inputs_embeds", "labels" if before else ""):
            if (given := inputs.get(name)) is not None:
                return given[..., 0] if given.is_floating_point() else given
        return inputs.get("input_ids")  # some models make the decoder's input from that of the encoder


COMPANIONS = ("attention_mask", "position_ids", "token_type_ids")


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


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """Labels ``[batch, tokens]`` as inputs of a decoder: moved right by one behind the start token, -100 as padding.

    Raises:
        ValueError: if ``pad_token_id`` is None.
    """
    if pad_token_id is None:
        raise ValueError("pad_token_id must be given, e.g. by model.config.pad_token_id: labels of -100 become it")
    start = input_ids.new_full((input_ids.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat((start, input_ids[:, :-1]), dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)

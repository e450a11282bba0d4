"""A shadow network that stands alone, and what couples it with its base, by the names that others import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from peft.core.blocks.blocks import first_output
from peft.tuners.shadow_utils import FOLLOWED, last_of, loss_of


@dataclass(slots=True)
class ShadowCarrier:
    """The states of the base and of its shadow, ``[batch, tokens, width]`` each, between two blocks."""

    hidden: torch.Tensor
    shadow: torch.Tensor


class ShadowCache(Cache):
    """The caches of a base model and of its shadow network as one.

    What changes the rows or the length of a cache changes both; all else is the base's.
    """

    def __init__(self, base: Any = None, shadow: Any = None) -> None:
        self.base, self.shadow = base, shadow

    @property
    def is_compileable(self) -> bool:
        return False  # the two differ in their layers and widths

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "shadow"):
            raise AttributeError(name)
        return getattr(self.base, name)

    def __len__(self) -> int:
        return len(self.base)


def _of_both(name: str) -> Any:
    def method(self: ShadowCache, *args: Any, **kwargs: Any) -> Any:
        results = [getattr(cache, name)(*args, **kwargs) for cache in (self.base, self.shadow) if cache is not None]
        return results[0] if results else None

    return method


def _of_base(name: str) -> Any:
    if isinstance(getattr(Cache, name), property):
        return property(lambda self: getattr(self.base, name))
    return lambda self, *args, **kwargs: getattr(self.base, name)(*args, **kwargs)


for _name in dir(Cache):
    if not _name.startswith("_") and _name not in vars(ShadowCache):
        setattr(ShadowCache, _name, _of_both(_name) if _name in FOLLOWED else _of_base(_name))


class DetachedShadowModel(PreTrainedModel, GenerationMixin):
    """``head(projection(backbone(x)))``: a shadow network as a small model of its own.

    Args:
        backbone: the network, a transformer without a head.
        projection: from its width to the base's. head: what makes logits of that.
        is_classification: logits of the last token of each row only.
        input_embeddings: the base's table, if the network reads that; it is used, and not saved with the model.
    """

    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        backbone: PreTrainedModel,
        projection: nn.Module | None = None,
        head: nn.Module | None = None,
        is_classification: bool = False,
        input_embeddings: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone.config)
        self.backbone, self.is_classification = backbone, is_classification
        self.projection = nn.Identity() if projection is None else projection
        self.head = nn.Identity() if head is None else head
        self.__dict__["input_embeddings"] = input_embeddings
        self.all_tied_weights_keys: dict[str, str] = {}

    def can_generate(self) -> bool:  # type: ignore[override]
        return not self.__dict__.get("is_classification", False)

    def get_input_embeddings(self) -> nn.Module:
        return self.__dict__["input_embeddings"] or self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.__dict__["input_embeddings"] = None
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.is_classification else self.head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits ``[batch, tokens, vocabulary]``, or ``[batch, classes]``, and the loss if there are labels."""
        shared = self.__dict__["input_embeddings"]
        if shared is not None and kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"], input_ids = shared(input_ids), None
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        output = self.backbone(attention_mask=attention_mask, **kwargs)
        states = self.projection(first_output(output))
        given = {name: getattr(output, name, None) for name in ("hidden_states", "attentions")}
        if self.is_classification:
            every = self.head(states)
            loss = None if labels is None else loss_of(every, labels, attention_mask)
            return SequenceClassifierOutput(loss=loss, logits=last_of(every, attention_mask), **given)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(states[:, keep])
        loss = None if labels is None else loss_of(logits, labels, attention_mask)
        cache = getattr(output, "past_key_values", None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, **given)

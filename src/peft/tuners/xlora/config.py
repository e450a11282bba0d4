"""Config of X-LoRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from peft.config import PeftConfig, option
from peft.errors import PeftWarning
from peft.peft_types import PeftType


@dataclass
class XLoraConfig(PeftConfig):
    """Config of X-LoRA: trained LoRA adapters, the experts, are weighed anew for each token.

    For when there are adapters of several domains or skills and the input should choose among them, token by token.
    The weights come from a small classifier over the last hidden state of a first pass, and only it is trained. Each
    call costs two passes, without a cache of keys and values.
    """

    METHOD: ClassVar[PeftType] = PeftType.XLORA

    hidden_size: int | None = option(
        None, "Width of the model's last hidden state. Left out, it is read from the model.", minimum=1
    )
    adapters: dict[str, str] | None = option(
        None, "The experts: a name of your choice -> folder or repository of a LoRA adapter."
    )
    enable_softmax: bool = option(True, "Whether the weights of the experts are a softmax, so that they add up to 1.")
    enable_softmax_topk: bool = option(
        False, "Whether the top_k_lora weights are a softmax of their own; then turn enable_softmax off."
    )
    layerwise_scalings: bool = option(False, "Whether each layer has weights of its own; otherwise all have the same.")
    xlora_depth: int = option(1, "Number of linear layers in the classifier.", minimum=1)
    xlora_size: int = option(2048, "Width between the layers of a classifier of depth 2 or more.", minimum=1)
    xlora_dropout_p: float = option(0.2, "Dropout between the layers of the classifier.", minimum=0.0, below=1.0)
    use_trainable_adapters: bool = option(
        False, "Whether the experts are trained along with the classifier; the file then holds them too."
    )
    softmax_temperature: float = option(
        1.0, "What the classifier's outputs are divided by before the softmax.", above=0
    )
    top_k_lora: int | None = option(
        None, "How many experts act on a token, those with the largest weights; all if left out.", minimum=1
    )
    scaling_pass_value: float | None = option(
        0.0, "Weight of every expert in the first pass; 0 means the base model alone, None the mean of the experts."
    )
    global_scaling_weight: float = option(1.0, "Factor of the weighted sum of the experts.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn("enable_softmax_topk has no effect without top_k_lora.", PeftWarning)
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn(
                "enable_softmax and enable_softmax_topk are both on, a softmax of a softmax; turn one off.",
                PeftWarning,
            )

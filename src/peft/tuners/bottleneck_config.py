"""What configs of bottleneck adapters and Compacter say alike: where the networks stand, and how they are joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.config import ModulesToSave, option
from peft.core.blocks.blocks import ATTENTION, CROSS, FEEDFORWARD
from peft.errors import ConfigError
from peft.usage import note


AFTER: dict[str, Any] = {
    "mh_adapter": False, "output_adapter": True, "is_parallel": False, "scaling": 1.0, "residual_before_ln": True,
    "original_ln_before": False, "original_ln_after": True, "stochastic_depth": 0.0,
}  # fmt: skip
"""Fields of a network after the feed-forward network, which reads its output: what presets start from."""


@dataclass
class NetworkFields(ModulesToSave):
    """Fields of the methods that put a network W_up f(W_down h) at sub-layers. Those left out are as in the preset."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    preset: str = option("", "Where the other fields start.")
    mh_adapter: bool = option(None, "Put an adapter at the self-attention.")
    output_adapter: bool = option(None, "Put an adapter at the feed-forward network.")
    cross_adapter: bool = option(
        False,
        "Put an adapter at the attention of a decoder to its encoder.",
        lacks="no block that gets adapters attends to an encoder",
    )
    reduction_factor: Any = option(
        None,
        "Width of the hidden states over width of the bottleneck; below 1 for wider ones. A dict has one for each "
        "numbered block, {'0': 8, 'default': 16}; blocks are counted over the whole model, an encoder's first.",
    )
    non_linearity: str = option(None, "Activation f, by the name that transformers has for it, such as 'gelu'.")
    is_parallel: bool = option(None, "Read the input of the sub-layer (beside it) instead of its output.")
    scaling: float | str = option(
        None, "Factor s: a number, 'learned' for one trained number, or 'channel' for one a feature; trained from 1."
    )
    use_gating: bool = option(
        False, "Multiply by a gate for each sample, the mean over its tokens of sigmoid(w h + b)."
    )
    dropout: float = option(0.0, "Dropout on the adapter's output.", minimum=0, below=1)
    stochastic_depth: float = option(
        None, "Probability to leave the adapter out for a sample in training.", minimum=0, below=1
    )
    ln_before: bool = option(False, "A trained layer norm of the adapter's own before W_down.")
    ln_after: bool = option(False, "A trained layer norm of the adapter's own after W_up.")
    adapter_residual_before_ln: bool = option(
        False, "Add the residual before the norm of ln_after, not after.", needs="ln_after"
    )
    original_ln_before: bool = option(
        None,
        "A sequential adapter reads N(h + x), with x the residual stream, h the sub-layer's output, and N the block's "
        "normalisation of the sum where it has one (BERT, BART); otherwise it reads h.",
    )
    original_ln_after: bool = option(
        None, "Add x, and apply N where the block has it, to the sum of h and a sequential adapter's output."
    )
    residual_before_ln: bool | str = option(
        None,
        "What is added to the output of an adapter that reads N(h + x): h (True), h + x ('post_add'), or N(h + x).",
        choices=(True, False, "post_add"),
    )
    leave_out: list[int] = option(list, "Numbers of the blocks that get no adapter.")

    def __post_init__(self) -> None:
        super().__post_init__()
        start = {**AFTER, **self.PRESETS[self.preset]}
        for name, value in start.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        after = ("original_ln_before", "original_ln_after", "residual_before_ln")
        for name in after if self.is_parallel else () if self.original_ln_before else after[2:]:
            if getattr(self, name) != start[name]:
                needed = "is_parallel=False" if self.is_parallel else "original_ln_before"
                self._tell_vain(name, f"it counts only with {needed}.")
        kind = type(self).__name__
        if isinstance(self.scaling, str) and self.scaling not in ("learned", "channel"):
            raise ConfigError(f"{kind}: scaling is a number, 'learned' or 'channel', not {self.scaling!r}.")
        if not isinstance(self.reduction_factor, dict):
            self.reduction_factor = {"default": self.reduction_factor}
        self.reduction_factor = {str(key): value for key, value in self.reduction_factor.items()}
        if "default" not in self.reduction_factor or min(self.reduction_factor.values()) <= 0:
            raise ConfigError(
                f"{kind}: reduction_factor should be positive, and a dict of them should have a 'default': "
                f"{self.reduction_factor!r}."
            )

    def roles(self) -> list[str]:
        """The kinds of sub-layers that get an adapter."""
        wanted = {ATTENTION: self.mh_adapter, CROSS: self.cross_adapter, FEEDFORWARD: self.output_adapter}
        return [role for role, here in wanted.items() if here]

    def factor_at(self, index: int) -> float:
        """The reduction factor in the block of this number."""
        note(self.reduction_factor, (str(index), "default"))
        return self.reduction_factor.get(str(index), self.reduction_factor["default"])

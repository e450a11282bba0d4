"""(IA)^3: rescaled keys, values and feed-forward activations (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, FanInFanOut, ModulesToSave, TargetModules, option
from peft.core.adapter import part, setting
from peft.core.addition import LinearIn
from peft.core.families import Scale
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.registry import define_tuner
from peft.core.model.targeting import found_targets, matches, table_row
from peft.core.model.tuner import BaseTuner
from peft.default_targets import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
from peft.errors import ConfigError
from peft.peft_types import PeftType


@dataclass
class IA3Config(TargetModules, ExcludeModules, FanInFanOut, ModulesToSave):
    """Config of (IA)^3: y' = l * (W x + b), and y' = W (l * x) + b for feed-forward modules.

    For few-shot learning: one number for each activation, a tenth of a LoRA's parameters or less, at a learning
    rate near 3e-3. Merged, it costs nothing.
    """

    METHOD: ClassVar[PeftType] = PeftType.IA3

    feedforward_modules: list[str] | str | None = option(
        None, "Which of the target modules scale their input instead of their output; names, or a regex.", names=set
    )
    init_ia3_weights: bool = option(True, "Start at one, so that nothing changes; otherwise at random numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        inner: Any = self.feedforward_modules
        targets: Any = self.target_modules
        both = isinstance(inner, set) and isinstance(targets, set)
        if both and (strangers := sorted(inner - targets)):
            raise ConfigError(
                f"IA3Config: feedforward_modules {strangers} should be among the target_modules as well."
            )


class IA3(Scale):
    """A vector l over the outputs ``[out, 1]``, or over the inputs ``[1, in]`` of feed-forward modules."""

    ia3_l = part()
    feedforward = setting()
    adds = LinearIn("ia3_l", neutral=1.0)

    def create(self, config: IA3Config, key: str) -> None:
        self.feedforward = matches(config.feedforward_modules, key)
        size = self.in_features if self.feedforward else self.out_features
        ones = [1] * (len(self.shape) - 2)
        # Drawn in any case: what is drawn later is the same.
        start = torch.randn((1, size, *ones) if self.feedforward or ones else (size, 1))
        self.ia3_l = nn.Parameter(start.fill_(1) if config.init_ia3_weights else start)

    def scale_in(self) -> torch.Tensor | None:
        return self.ia3_l.flatten() if self.feedforward else None

    def scale_out(self) -> torch.Tensor | None:
        return None if self.feedforward else self.ia3_l.flatten()


class IA3Layer(BaseTunerLayer):
    """A layer with (IA)^3 adapters."""

    @property
    def is_feedforward(self) -> bool:
        """Whether the adapters scale the input."""
        return any(self.feedforward.values())


class IA3Tuner(BaseTuner):
    """Applies (IA)^3: finds the feed-forward modules of an architecture."""

    def prepare_config(self, config: Any, model: nn.Module, keys: set[str] | None) -> None:
        if config.target_modules is None and config.feedforward_modules is None and keys is None:
            if table_row(self.target_module_mapping, model) is None:
                config.feedforward_modules = found_targets(model, ("feedforward",))
            else:
                config.feedforward_modules = set(
                    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(model.config.model_type, ())
                )
        super().prepare_config(config, model, keys)


IA3Model = define_tuner(IA3, IA3Config, base=IA3Tuner, layer=IA3Layer, default_roles=("key", "value", "feedforward"))

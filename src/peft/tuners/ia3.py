"""(IA)^3: rescaled keys, values and feed-forward activations (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import ExcludeModules, FanInFanOut, ModulesToSave, TargetModules, option
from peft.core.families.families import ScaleLayer
from peft.core.model.registry import define_tuner
from peft.core.model.targeting import found_targets, matches, table_row
from peft.core.model.tuner import BaseTuner
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from peft.utils.error import ConfigError
from peft.utils.peft_types import PeftType


@dataclass
class IA3Config(TargetModules, ExcludeModules, FanInFanOut, ModulesToSave):
    """Config of (IA)^3: y' = l * (W x + b), and y' = W (l * x) + b for feed-forward modules.

    For few-shot learning: one number for each activation, a tenth of a LoRA's parameters or less, at a learning
    rate near 3e-3. Merged, it costs nothing.
    """

    METHOD: ClassVar[PeftType] = PeftType.IA3

    feedforward_modules: list[str] | str | None = option(
        None, "Which of the target modules scale their input instead of their output; names, or a regex."
    )
    init_ia3_weights: bool = option(True, "Start at one, so that nothing changes; otherwise at random numbers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        modules = self.feedforward_modules
        if isinstance(modules, list | tuple):
            self.feedforward_modules = set(modules)  # type: ignore[assignment]
        both = isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set)
        if both and (strangers := sorted(self.feedforward_modules - self.target_modules)):
            raise ConfigError(
                f"IA3Config: feedforward_modules {strangers} should be among the target_modules as well."
            )


class IA3Layer(ScaleLayer):
    """A vector l over the outputs, or over the inputs of feed-forward modules."""

    weights: ClassVar[dict[str, type]] = {"ia3_l": nn.ParameterDict}
    settings: ClassVar[dict[str, type]] = {"feedforward": dict}
    linear: ClassVar[tuple[str, ...]] = ("ia3_l",)

    @property
    def is_feedforward(self) -> bool:
        """Whether the adapters scale the input."""
        return any(self.feedforward.values())

    def update_layer(self, name: str, config: IA3Config, key: str) -> None:
        feedforward = matches(config.feedforward_modules, key)
        size = self.in_features if feedforward else self.out_features
        ones = [1] * (len(self.shape) - 2)
        shape = (1, size, *ones) if feedforward or ones else (size, 1)
        start = torch.randn(shape)
        self.put(
            name, feedforward=feedforward, ia3_l=nn.Parameter(start.fill_(1) if config.init_ia3_weights else start)
        )

    def scale_in(self, name: str) -> torch.Tensor | None:
        return self.ia3_l[name].flatten() if self.feedforward[name] else None

    def scale_out(self, name: str) -> torch.Tensor | None:
        return None if self.feedforward[name] else self.ia3_l[name].flatten()


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


IA3Model = define_tuner(
    "IA3Model",
    IA3Layer,
    IA3Config,
    prefix="ia3_",
    targets=TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    default_roles=("key", "value", "feedforward"),
    base=IA3Tuner,
)

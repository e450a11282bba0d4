"""AdaLoRA's layers, and how they start."""

from __future__ import annotations

from typing import Any

import torch

from peft.core.layer.layer import BaseTunerLayer
from peft.errors import ConfigError
from peft.tuners.lora.layer import LoraLayer


FIXED = "AdaLoRA has one update, in the form of a singular value decomposition. Leave it out, or use LoraConfig."


@torch.no_grad()
def started(a: torch.Tensor, e: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, E and B with the values that they start from, in place."""
    return a.normal_(std=0.02), e.zero_(), b.normal_(std=0.02)


class AdaLoraLayer(LoraLayer):
    """A layer with AdaLoRA adapters: one of LoRA's by class, though its adapters are of another form."""

    update_layer = BaseTunerLayer.update_layer  # type: ignore[assignment]

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        left, right, _ = super().get_delta_factors(adapter_name)
        return left, right, 1.0  # the scale is in the pair

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any = True, **options: Any) -> None:
        """Start an adapter anew; there is one way to start.

        Raises:
            ConfigError: another start is asked for.
        """
        if init_lora_weights is not True or options:
            raise ConfigError(f"AdaLoRA cannot start by {init_lora_weights!r}. {FIXED}")
        adapter: Any = self.adapters[adapter_name]
        started(adapter.lora_A, adapter.lora_E, adapter.lora_B)

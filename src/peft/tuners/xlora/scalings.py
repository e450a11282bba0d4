"""What can be asked of the weights of the experts, and changed in how they are used."""

from __future__ import annotations

import torch

from peft.tuners.xlora.config import XLoraConfig


class Scalings:
    """The weights of the last call, a log of all, and the settings that may change between calls."""

    peft_config: dict[str, XLoraConfig]
    router: str
    experts: list[str]
    latest: torch.Tensor | None = None

    @property
    def config(self) -> XLoraConfig:
        """The router's config."""
        return self.peft_config[self.router]

    def start_log(self) -> None:
        """Begin with an empty log, switched off."""
        self.log: list[torch.Tensor] = []
        self.logging = False

    def get_latest_scalings(self) -> torch.Tensor | None:
        """The weights of the last call, ``[batch, tokens, layers, experts]``; None before the first."""
        return self.latest

    def set_topk_lora(self, value: int | None) -> None:
        """How many experts act on a token; None: all."""
        self.config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Set the factor of the weighted sum."""
        self.config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """The factor of the weighted sum."""
        return self.config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Weight of every expert in the first pass; None: one over their number."""
        self.config.scaling_pass_value = 1 / len(self.experts) if value is None else value

    def enable_scalings_logging(self) -> None:
        """Keep the weights of every call from now on."""
        self.logging = True

    def disable_scalings_logging(self) -> None:
        """Keep no more weights; what was kept stays until :meth:`clear_scalings_log`."""
        self.logging = False

    def clear_scalings_log(self) -> None:
        """Forget the weights that were kept."""
        self.log.clear()

    def get_scalings_log(self) -> list[torch.Tensor]:
        """The weights that were kept, one tensor a call; the list is a copy, the tensors are not."""
        return list(self.log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
        """Number of tokens -> (places in the log, weights kept there)."""
        buckets: dict[int, tuple[list[int], list[torch.Tensor]]] = {}
        for i, scalings in enumerate(self.log):
            places, tensors = buckets.setdefault(scalings.shape[1], ([], []))
            places.append(i)
            tensors.append(scalings)
        return buckets

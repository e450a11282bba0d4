"""AdaLoRA: dW = s / r B diag(E) A, with a rank budget that the layers compete for (ICLR 2023, arXiv 2303.10512)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.compat.methods import AdaLoraCompat
from peft.config import option
from peft.core.adapter import input_dropout, part, setting
from peft.core.base.kinds import fan
from peft.core.families import LowRank, Scaled
from peft.core.model.registry import define_tuner
from peft.core.model.tuner import BaseTuner
from peft.errors import ConfigError
from peft.kernels.decompositions import orthogonality
from peft.peft_types import PeftType
from peft.tuners.adalora_layer import FIXED, AdaLoraLayer, started
from peft.tuners.adalora_utils import Allocating, kept_of
from peft.tuners.adalora_utils import RankAllocator as RankAllocator  # a name of the API
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.model import LoraModel


_OFF = (
    *("use_dora", "use_rslora", "lora_bias", "use_gating"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "alora_invocation_tokens"),
    *("use_qalora", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config", "megatron_config"),
)


@dataclass
class AdaLoraConfig(LoraConfig):
    """Config of AdaLoRA: LoRA whose ranks shrink during training, in the layers that need them least.

    For the best use of a small budget of parameters when nobody knows which layers matter. The training loop calls
    ``model.update_and_allocate(step)`` after each backward pass and before the gradients are cleared.
    """

    METHOD: ClassVar[PeftType] = PeftType.ADALORA

    r: int = option(
        8, "Not used by this method.", instead="the ranks are init_r at the start and target_r at the end."
    )
    target_r: int = option(8, "Average rank of the layers at the end.", minimum=1)
    init_r: int = option(12, "Rank of each layer at the start.", minimum=1)
    tinit: int = option(0, "Steps at the start that train with all ranks.", minimum=0)
    tfinal: int = option(0, "Steps at the end that train with the final ranks.", minimum=0)
    deltaT: int = option(1, "Steps from one allocation of the budget to the next.", minimum=1)
    beta1: float = option(0.85, "Decay of the average of importances.", minimum=0, below=1)
    beta2: float = option(0.85, "Decay of the average of their uncertainty.", minimum=0, below=1)
    orth_reg_weight: float = option(
        0.5, "Weight of |P^T P - I|, which keeps A and B orthogonal, in the loss.", minimum=0
    )
    total_step: int | None = option(None, "Steps of the whole training. Required to train.", minimum=1)
    rank_pattern: dict | None = option(
        None, "Which ranks are left, by the name of the tensor E -> list of booleans. Written by the training."
    )

    def __post_init__(self) -> None:
        pattern, self.rank_pattern = self.rank_pattern, None  # it holds masks, not numbers
        super().__post_init__()
        self.rank_pattern = pattern
        for field in _OFF:
            if getattr(self, field):
                raise ConfigError(f"AdaLoraConfig: {field}={getattr(self, field)!r} does not apply. {FIXED}")
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(f"AdaLoraConfig: init_lora_weights must be True or False. {FIXED}")
        if self.total_step is None and not self.inference_mode:
            raise ConfigError(
                "AdaLoraConfig: give total_step, the number of training steps, for the budget's schedule."
            )
        if self.total_step is not None and self.tinit + self.tfinal >= self.total_step:
            raise ConfigError(
                f"AdaLoraConfig: tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step="
                f"{self.total_step} to allocate ranks in."
            )


def adalora_pair(a: torch.Tensor, e: torch.Tensor, b: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A' and B of dW = s P L Q = B A', with P = B, L = diag(E), Q = A in the paper's equation 3.

    Args:
        a: ``[r, in * kernel]``. e: ``[r, 1]``. b: ``[out, r]``. scale: s.
    """
    return a * (e * scale), b


class AdaLora(LowRank, Scaled):
    """dW = s / (r + 1e-5) B diag(E) A: A ``[r, in * kernel]``, E ``[r, 1]``, B ``[out, r]``; r is what A started with.

    ``left`` holds the ranks that the budget has left, once they are settled: the others take no part any more.
    """

    # E last, as in 0.21.2: the states of an optimizer go by the order of parameters
    lora_A, lora_B, lora_E = part(), part(), part()
    r = setting()
    ranknum = setting(nn.ParameterDict)
    lora_alpha, scaling, lora_dropout = setting(), setting(), input_dropout()
    left = setting()
    loss_weight: ClassVar[str] = "orth_reg_weight"

    def create(self, config: AdaLoraConfig, key: str) -> None:
        kept, (out, inner) = kept_of(config.rank_pattern, key), fan(self.shape)
        rank = config.init_r if kept is None else len(kept)
        # 0.21.2 draws all of these, and a rank, before the start that is used: one seed gives the same adapter.
        a, e, b, _ = torch.randn(rank, inner), torch.randn(rank, 1), torch.randn(out, rank), torch.randn(1)
        if config.init_lora_weights:
            a, e, b = started(a, e, b)
        self.lora_A, self.lora_E, self.lora_B = nn.Parameter(a), nn.Parameter(e), nn.Parameter(b)
        self.r, self.left = config.init_r, None
        # Others read it, so it has its value on the meta device too.
        self.ranknum = nn.Parameter(torch.tensor([float(config.init_r)], device="cpu"), requires_grad=False)
        self.lora_alpha = config.alpha_at(key)
        self.lora_dropout, self.scaling = config.lora_dropout, self.initial_scaling()

    def initial_scaling(self) -> float:
        return float(self.lora_alpha if self.lora_alpha > 0 else self.r)

    def marks(self, kept: torch.Tensor) -> torch.Tensor:
        """1 for the ranks of these indices, 0 for the others, ``[r]``."""
        return torch.zeros(len(self.lora_E)).index_fill(0, kept, 1)

    def factored(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, E and B without the ranks that the budget has taken."""
        a, e, b, left = self.lora_A, self.lora_E, self.lora_B, self.left
        if left is None:
            return a, e, b
        left = left.to(a.device)
        return a[left], e[left], b[:, left]

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = adalora_pair(*self.factored(), self.scaling / (self.r + 1e-5))
        return (a, b) if len(a) else (F.pad(a, (0, 0, 0, 1)), F.pad(b, (0, 1)))  # convolutions have no rank 0

    def as_saved(self, saved: str, tensor: torch.Tensor) -> torch.Tensor:
        left = self.left
        return tensor if left is None else tensor[:, left] if saved == "lora_B" else tensor[left]

    def loss_term(self) -> torch.Tensor:
        """How far A and B are from orthogonal, the mean of both; with the ranks that the budget has taken."""
        return orthogonality(self.lora_A, self.lora_B) / 2  # equation 4


class AdaLoraTuner(AdaLoraCompat, Allocating, LoraModel):
    """What AdaLoRA does to a whole model: it shares out the ranks, and keeps A and B orthogonal by the loss."""

    add_weighted_adapter = BaseTuner.add_weighted_adapter  # type: ignore[assignment]
    without_start = BaseTuner.without_start

    def update_and_allocate(self, global_step: int) -> None:
        """Share out the budget of ranks; call it in each step after the backward pass, with the number of the step.

        After ``total_step - tfinal`` the ranks are settled: from then on the model computes with those left, and
        ``config.rank_pattern`` says which.
        """
        for name in self.active_adapters:
            config, adapters = self.peft_config[name], self.ranked(name)
            trains = all(adapter.lora_E.requires_grad for adapter in adapters.values())
            if config.total_step is None or not trains or not adapters:
                continue
            allocator = self.allocator(name)
            settled = any(adapter.left is not None for adapter in adapters.values())
            whole = all(len(adapter.lora_E) == adapter.r for adapter in adapters.values())
            if not settled and global_step <= allocator.end and whole:
                last = global_step == allocator.end
                _, kept = allocator.update_and_allocate(self.model, global_step, force_mask=last)
                config.rank_pattern = kept or config.rank_pattern
                for key, adapter in adapters.items() if last else ():
                    adapter.left = kept_of(config.rank_pattern, key)
            elif settled:
                allocator.mask({key: adapter.marks(adapter.left) for key, adapter in adapters.items()})


AdaLoraModel = define_tuner(AdaLora, AdaLoraConfig, base=AdaLoraTuner, layer=AdaLoraLayer)

"""AdaLoRA: dW = s / r B diag(E) A, with a rank budget that the layers compete for (ICLR 2023, arXiv 2303.10512)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import NotYet, option, resolve_pattern
from peft.core.base.kinds import fan
from peft.core.families.families import LowRankLayer, ScaledLayer, input_dropout
from peft.core.model.registry import define_tuner
from peft.core.model.walk import walk
from peft.tuners.adalora_utils import BudgetTuner, RankAllocator, mask_of
from peft.tuners.lora.config import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
from peft.utils.error import ConfigError
from peft.utils.peft_types import PeftType


_FIXED = "AdaLoRA has one update, in the form of a singular value decomposition. Leave it out, or use LoraConfig."
_OFF = (
    *("use_dora", "use_rslora", "lora_bias"),
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
    NOT_YET: ClassVar[dict[str, NotYet]] = {}

    target_r: int = option(8, "Average rank of the layers at the end.", minimum=1)
    init_r: int = option(12, "Rank of each layer at the start.", minimum=1)
    tinit: int = option(0, "Steps at the start that train with all ranks.", minimum=0)
    tfinal: int = option(0, "Steps at the end that train with the final ranks.", minimum=0)
    deltaT: int = option(1, "Steps from one allocation of the budget to the next.", minimum=1)
    beta1: float = option(0.85, "Decay of the average of importances.", minimum=0, below=1)
    beta2: float = option(0.85, "Decay of the average of their uncertainty.", minimum=0, below=1)
    orth_reg_weight: float = option(0.5, "Weight of |P^T P - I|, which keeps A and B orthogonal, in the loss.")
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
                raise ConfigError(f"AdaLoraConfig: {field}={getattr(self, field)!r} does not apply. {_FIXED}")
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(f"AdaLoraConfig: init_lora_weights must be True or False. {_FIXED}")
        if self.total_step is None and not self.inference_mode:
            raise ConfigError(
                "AdaLoraConfig: give total_step, the number of training steps, for the budget's schedule."
            )
        if self.total_step is not None and self.tinit + self.tfinal >= self.total_step:
            raise ConfigError(
                f"AdaLoraConfig: tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step="
                f"{self.total_step} to allocate ranks in."
            )


class AdaLoraLayer(LowRankLayer, ScaledLayer):
    """dW = s / (r + 1e-5) B diag(E) A: A ``[r, in * kernel]``, E ``[r, 1]``, B ``[out, r]``; r is what A started with.

    ``left`` holds the ranks that the budget has left, once they are settled: the others take no part any more.
    """

    weights: ClassVar[dict[str, type]] = {
        "lora_A": nn.ParameterDict,
        "lora_E": nn.ParameterDict,
        "lora_B": nn.ParameterDict,
    }
    settings: ClassVar[dict[str, type]] = {
        "r": dict,
        "ranknum": nn.ParameterDict,
        "lora_alpha": dict,
        "scaling": dict,
        "lora_dropout": nn.ModuleDict,
        "left": dict,
    }
    dropout: ClassVar[str] = "lora_dropout"

    def update_layer(self, name: str, config: AdaLoraConfig, key: str) -> None:
        mask = mask_of(config, key, name)
        rank = config.init_r if mask is None else sum(mask)
        out, inner = fan(self.shape)
        a, b = torch.randn(rank, inner) * 0.02, torch.randn(out, rank) * 0.02
        e = torch.zeros(rank, 1) if config.init_lora_weights else torch.randn(rank, 1)
        self.put(name, lora_A=nn.Parameter(a), lora_E=nn.Parameter(e), lora_B=nn.Parameter(b), left=None)
        self.put(name, ranknum=nn.Parameter(torch.tensor(float(config.init_r), device="cpu"), requires_grad=False))
        self.put(name, r=config.init_r, lora_alpha=resolve_pattern(config.alpha_pattern, key, config.lora_alpha))
        self.put(name, lora_dropout=input_dropout(config.lora_dropout), scaling=self.initial_scaling(name))

    def initial_scaling(self, name: str) -> float:
        alpha = self.lora_alpha[name]
        return float(alpha if alpha > 0 else self.r[name])

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        a, e, b = (self.ranks_left(name, part) for part in ("lora_A", "lora_E", "lora_B"))
        return a * (e * (self.scaling[name] / (self.r[name] + 1e-5))), b

    def ranks_left(self, name: str, attribute: str) -> torch.Tensor:
        """A tensor of the adapter without the ranks that the budget has taken."""
        tensor, left = getattr(self, attribute)[name], self.left[name]
        if left is None:
            return tensor
        index = left.to(tensor.device)
        return tensor[:, index] if attribute == "lora_B" else tensor[index]

    def as_saved(self, name: str, saved: str, tensor: torch.Tensor) -> torch.Tensor:
        left = self.left[name]
        return tensor if left is None else tensor[:, left] if saved == "lora_B" else tensor[left]

    def penalty(self, name: str) -> torch.Tensor:
        """|A A^T - I| + |B^T B - I|, Frobenius norms, of the ranks that are left."""
        a, b = self.ranks_left(name, "lora_A"), self.ranks_left(name, "lora_B")
        eye = torch.eye(len(a), device=a.device, dtype=a.dtype)
        return (a @ a.T - eye).norm() + (b.T @ b - eye).norm()


class AdaLoraTuner(BudgetTuner):
    """What AdaLoRA does to a whole model: it shares out the ranks, and keeps A and B orthogonal by the loss."""

    def update_and_allocate(self, global_step: int) -> None:
        """Share out the budget of ranks; call it in each step after the backward pass, with the number of the step.

        After ``total_step - tfinal`` the ranks are settled: from then on the model computes with those left, and
        ``config.rank_pattern`` says which.
        """
        for name in self.active_adapters:
            config = self.peft_config[name]
            layers = self._adapted(name)
            trains = all(layer.lora_E[name].requires_grad for layer in layers.values())
            if config.total_step is None or not trains or not layers:
                continue
            allocator = self.kept(name, RankAllocator(config, layers, name))
            end = config.total_step - config.tfinal
            settled = any(layer.left[name] is not None for layer in layers.values())
            if not settled and global_step <= end and self._loaded_whole(layers, name):
                allocator.observe()
                if global_step == end or (global_step > config.tinit and global_step % config.deltaT == 0):
                    config.rank_pattern = allocator.allocate(allocator.budget(global_step))
                if global_step == end:
                    for key, layer in layers.items():
                        layer.left[name] = torch.tensor(config.rank_pattern[f"{key}.lora_E"]).nonzero()[:, 0]
            elif settled:
                marks = {k: torch.zeros(len(w.lora_E[name])).index_fill(0, w.left[name], 1) for k, w in layers.items()}
                allocator.mask(marks)

    def _adapted(self, name: str) -> dict[str, AdaLoraLayer]:
        """The layers of an adapter by the names of their modules."""
        found = ((site.key, w) for site in walk(self.model) for _, w in site.wrappers)
        return {key: w for key, w in found if isinstance(w, AdaLoraLayer) and name in w}

    @staticmethod
    def _loaded_whole(layers: dict[str, AdaLoraLayer], name: str) -> bool:
        return all(len(layer.lora_E[name]) == layer.r[name] for layer in layers.values())

    def finish(self, outputs: Any) -> Any:
        """The model's outputs; a loss among them gets the penalty on A and B that are not orthogonal."""
        loss = getattr(outputs, "loss", None)
        for name in self.active_adapters:
            layers = [layer for layer in self._adapted(name).values() if not layer.disable_adapters]
            if isinstance(loss, torch.Tensor) and layers and self.peft_config[name].orth_reg_weight:
                mean = sum(layer.penalty(name) for layer in layers) / (2 * len(layers))
                loss = outputs.loss = loss + self.peft_config[name].orth_reg_weight * mean.to(loss)
        return outputs


AdaLoraModel = define_tuner(
    "AdaLoraModel",
    AdaLoraLayer,
    AdaLoraConfig,
    prefix="lora_",
    targets=TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    base=AdaLoraTuner,
)

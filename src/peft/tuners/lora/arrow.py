"""Arrow: each token goes to the LoRA adapters whose directions it is most like (arXiv 2405.11157), with GenKnowSub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from peft.core.adapter import setting
from peft.core.base.kinds import Kind
from peft.kernels.decompositions import resized
from peft.tuners.lora.arrow_products import mixed, stacked
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.initialize import is_drawn
from peft.tuners.lora.layer import Lora
from peft.tuners.lora.norm_cache import stamp_of


class Experts(NamedTuple):
    """What tokens are routed over.

    Attributes:
        directions: ``[experts, in]``. stack: A and B of each expert in a `Stack`; None where it outlives no call.
        stamp: changes when something does that they were made of. trains: gradients flow into the pairs.
    """

    directions: torch.Tensor
    stack: Any
    stamp: tuple
    trains: bool


def direction(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The input that B A stretches most, its first right singular vector ``[in]``, found without B A.

    Args:
        a: ``[r, in]``. b: ``[out, r]``.
    """
    q, left = torch.linalg.qr(a.detach().mT.float())  # A = left^T q^T
    return q @ torch.linalg.svd(b.detach().float() @ left.mT, full_matrices=False)[2][0]


def without_common(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], general: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """GenKnowSub (arXiv 2505.10939): A and B of each pair minus the means of the general ones; ranks may differ."""
    r = max(len(a) for a, _ in (*pairs, *general))
    mean_a = torch.stack([resized(a, r, 0) for a, _ in general]).mean(0)
    mean_b = torch.stack([resized(b, r, 1) for _, b in general]).mean(0)
    return [(resized(a, r, 0) - mean_a, resized(b, r, 1) - mean_b) for a, b in pairs]


class Arrow(Lora):
    """y' = y + drop(sum_e c_e s_e B_e A_e x) over the k experts of each token, other adapters of the same layer.

    The router trains nothing. Its own A and B take part in nothing; they stand in its file, as others write it.
    """

    option: ClassVar[str] = "arrow_config"
    arrow_config, arrow_experts = setting(), setting()
    untrained: ClassVar[frozenset[str]] = frozenset({"lora_A", "lora_B"})
    excludes: ClassVar[dict[str, str]] = dict.fromkeys(
        ("Dora", "Kasa", "VeLora", "MonteCLora", "BdLora", "QaLora", "Mica"),
        "an Arrow router has no update of its own that another variant could change; the adapters that it routes over "
        "are made before it",
    )

    @classmethod
    def refuses(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        if not kind.matrix or kind.read_by_parent:
            return "Arrow routes each token by its features, which only the inputs of linear layers are. Target those"
        if config.lora_bias:
            return "an Arrow router has no update of its own that a bias (lora_bias) could be of"
        if not is_drawn(config) or config.init_lora_weights == "eva":
            return f"an Arrow router has no update that init_lora_weights={config.init_lora_weights!r} could start"
        return None

    def create(self, config: LoraConfig, key: str) -> None:
        super().create(config, key)
        self.arrow_config = config.arrow_config
        for tensor in self.held_pair():
            tensor.requires_grad_(False)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        options = self.arrow_config
        adapters = self.named(options.task_adapter_names)
        if not adapters:
            return x.new_zeros(*x.shape[:-1], self.shape[0])
        experts = self.experts(adapters)
        flat = adapters[0].cast(x).reshape(-1, x.shape[-1])  # [tokens, in]
        y = mixed(flat, experts.directions, options.top_k, options.router_temperature, experts.stack)
        return self.lora_dropout(y).view(*x.shape[:-1], -1)

    def experts(self, adapters: Sequence[Lora]) -> Experts:
        """What tokens are routed over, kept until a tensor changes; while they train only the directions are kept."""
        general = self.named(self.arrow_config.gks_adapter_names) if self.arrow_config.use_gks else []
        parts = self.layer._modules  # by their names, for this is done for every token that is generated
        downs, ups = parts["lora_A"]._modules, parts["lora_B"]._modules
        held = [part[adapter.name]._parameters["weight"] for adapter in (*adapters, *general) for part in (downs, ups)]
        scales = [adapter.scaling for adapter in adapters]
        stamp, trains = (*stamp_of(held), *scales), torch.is_grad_enabled() and any(t.requires_grad for t in held)
        kept = self.arrow_experts
        if kept is not None and kept.stamp == stamp and not kept.trains and not trains:
            return kept
        # What is kept of a call in inference mode may be asked for by one with gradients.
        with torch.inference_mode(False), torch.set_grad_enabled(trains):
            pairs = [adapter.pair() for adapter in adapters]
            if general:
                pairs = without_common(pairs, [adapter.pair() for adapter in general])
            known = kept is not None and kept.stamp == stamp
            directions = kept.directions if known else torch.stack([direction(a, b) for a, b in pairs])
            made = Experts(directions, stacked(pairs, scales, self.arrow_config.top_k, trains), stamp, trains)
        self.arrow_experts = made._replace(stack=None) if trains else made  # no graph outlives its call
        return made

    def named(self, names: Sequence[str] | None) -> list[Any]:
        """The adapters of these names that the layer has.

        Raises:
            ValueError: if one is more than a pair.
        """
        here: list[Any] = [self.layer.adapters[name] for name in names or () if name in self.layer]
        for adapter in here:
            if not adapter.adds_product or adapter.lora_bias:
                raise ValueError(
                    f"Arrow mixes the pairs A and B of its experts, and {adapter.name!r} is more than a pair "
                    f"({type(adapter).__name__}{', with lora_bias' * bool(adapter.lora_bias)}). Route over plain LoRA "
                    "adapters."
                )
        return here

    def delta_weight(self) -> torch.Tensor:
        raise ValueError(self.unmergeable())

    def unmergeable(self) -> str | None:
        return "Arrow chooses its adapters anew for each token, so no one weight equals it. Keep the adapter unmerged."

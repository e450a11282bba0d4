"""The variants of LoRA, in the order in which they wrap each other when several are combined: the outermost first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peft._lazy import also_known
from peft.compat.lora_variant import standing_for
from peft.core.adapter import setting
from peft.core.layer.classes import check_names
from peft.tuners.lora.alora import ALora, last_occurrence
from peft.tuners.lora.arrow import Arrow
from peft.tuners.lora.bdlora import BdLora
from peft.tuners.lora.dora import Dora
from peft.tuners.lora.gated import Gated
from peft.tuners.lora.kasa import Kasa
from peft.tuners.lora.layer import Lora, LoraLayer
from peft.tuners.lora.mica import Mica
from peft.tuners.lora.monteclora import MonteCLora
from peft.tuners.lora.qalora import QaLora
from peft.tuners.lora.velora import VeLora


class Theirs(Lora):
    """LoRA's A and B, and a third party's variant that says what is computed with them."""

    variant = setting()
    reversible = False

    def make_pair(self, config: Any) -> None:
        super().make_pair(config)
        self.variant = self.layer.resolve_lora_variant(config=config)  # type: ignore[attr-defined]
        self.variant.init(self.layer, adapter_name=self.name, config=config)

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        return self.variant.forward(self.layer, active_adapter=self.name, x=x, result=y)

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        stored = self.variant.merge_safe(self.layer, self.name, self.kind.restore(weight, self.base))
        return self.kind.orient(stored, self.base)


_NAMES: dict[type[Lora], str] = {
    ALora: "ALoraLinearVariant",
    Dora: "DoraLinearVariant DoraEmbeddingVariant DoraConv1dVariant DoraConv2dVariant DoraConv3dVariant",
    Gated: "",
    Arrow: "ArrowLinearVariant",
    Kasa: "KasaLinearVariant",
    VeLora: "VeloraLinearVariant",
    MonteCLora: "MontecloraLinearVariant",
    BdLora: "BdLoraLinearVariant",
    QaLora: "QALoraLinearVariant",
    Mica: "MiCALinearVariant MiCAEmbeddingVariant",
}
"""Variant -> its names in 0.21, which tests of variants, and copies of a layer's forward, import from here."""

VARIANTS = tuple(_NAMES)

for variant in (*VARIANTS, Theirs):
    check_names(variant, LoraLayer)
Lora.variants[:] = VARIANTS
Lora.of_others = Theirs

for variant, names in _NAMES.items():
    vars().update(standing_for(variant, *names.split()))


def calculate_alora_offsets(
    peft_config: dict[str, Any],
    active_adapter: str,
    input_ids: torch.Tensor,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """How many tokens from the end of each row an aLoRA acts on; None where it does not. Tests of servers call it.

    Args:
        input_ids: ``[batch, tokens]``. adapter_names: the adapter of each row; by default the active one of all.
    """
    found: list[int | None] = []
    for row, name in zip(input_ids, adapter_names or [active_adapter] * len(input_ids)):
        tokens = getattr(peft_config.get(name), "alora_invocation_tokens", None)
        start = int(last_occurrence(row[None], tokens)) if tokens else -1
        found.append(len(row) - start if start >= 0 else None)
    return found


also_known(__name__)

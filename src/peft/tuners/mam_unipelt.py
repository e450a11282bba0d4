"""Ready unions: MAM (He et al. 2022, arXiv 2110.04366) and UniPELT (Mao et al. 2022, arXiv 2110.07577)."""

from __future__ import annotations

from typing import Any

from peft.tuners.bottleneck import BottleneckConfig
from peft.tuners.lora.config import LoraConfig
from peft.tuners.prefix_tuning import PrefixTuningConfig
from peft.tuners.union import UnionConfig


class MAMConfig(UnionConfig):
    """A mix-and-match adapter: a prefix of 30 tokens, and bottlenecks beside the feed-forward networks, times 4.

    Args:
        prefix_tuning, adapter: instead of these parts. fields: those of :class:`UnionConfig`.

    Examples:
        >>> model = get_peft_model(base, MAMConfig(task_type="CAUSAL_LM"))
    """

    def __init__(
        self, prefix_tuning: PrefixTuningConfig | None = None, adapter: BottleneckConfig | None = None, **fields: Any
    ) -> None:
        prefix = PrefixTuningConfig(num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=800)
        parts = {"prefix_tuning": prefix_tuning or prefix, "adapter": adapter or BottleneckConfig(preset="parallel")}
        super().__init__(fields.pop("parts", parts), **fields)


class UniPELTConfig(UnionConfig):
    """UniPELT: a LoRA on queries and values, a prefix of 10 tokens and bottlenecks, each with its gates.

    Args:
        prefix_tuning, adapter, lora: instead of these parts. fields: those of :class:`UnionConfig`.

    Examples:
        >>> model = get_peft_model(base, UniPELTConfig(task_type="CAUSAL_LM"))
    """

    def __init__(
        self,
        prefix_tuning: PrefixTuningConfig | None = None,
        adapter: BottleneckConfig | None = None,
        lora: LoraConfig | None = None,
        **fields: Any,
    ) -> None:
        prefix = PrefixTuningConfig(
            num_virtual_tokens=10, prefix_projection=True, encoder_hidden_size=512, use_gating=True
        )
        parts = {
            "prefix_tuning": prefix_tuning or prefix,
            "adapter": adapter or BottleneckConfig(use_gating=True),
            "lora": lora or LoraConfig(use_gating=True),
        }
        super().__init__(fields.pop("parts", parts), **fields)

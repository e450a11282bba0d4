"""What scripts read on the layers of 0.21 and no layer keeps: computed from what its adapters hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from peft.compat.asked import Asked
from peft.core.base.kinds import fan
from peft.core.layer.weight import base_weight


def _none(adapter: Any) -> None:
    """No adapter has one: the dict is there, and empty."""


def _places(name: str) -> Callable[[Any], torch.Tensor]:
    def rows_and_columns(adapter: Any) -> torch.Tensor:
        places, columns = getattr(adapter, name), fan(adapter.shape)[1]
        return torch.stack((places // columns, places % columns))

    return rows_and_columns


def _originals(adapter: Any) -> torch.Tensor:
    weight = base_weight(adapter.layer)
    return (weight.mT if adapter.kind.lookup else weight)[adapter.token_indices]


def _rows(module: Any) -> int:
    return 0 if module is None else len(module.weight)


# Method -> attribute of its layers -> what it has for an adapter; an adapter for which that is None is left out.
READABLE: dict[str, dict[str, Callable[[Any], Any]]] = {
    "adalora": dict.fromkeys(
        ("lora_bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "use_dora", "use_rslora"), _none
    ),
    "boft": {"boft_block_size": lambda a: a.boft_R.shape[-1], "boft_block_num": lambda a: a.boft_R.shape[1]},
    "deft": {
        "deft_r": lambda a: a.r,
        "deft_scaling": lambda a: a.scaling,
        "deft_decomposition": lambda a: a.decomposition_method,
    },
    "fourierft": {"fourierft_scaling": lambda a: a.scaling, "indices": _places("fourierft_places")},
    "gralora": {
        "r": lambda a: a.gralora_A.shape[-1],
        "gralora_k": lambda a: len(a.gralora_A),
        "hybrid_r": lambda a: _rows(a.gralora_A_general),
    },
    "miss": {"miss_mini_r": lambda a: a.miss_block.shape[1] if a.form == "mini" else 1},
    "oft": {"oft_dropout": lambda a: nn.Dropout(a.oft_R.dropout) if a.oft_R.dropout else nn.Identity()},
    "peanut": {"r": lambda a: _rows(a.peanut_A), "depth": lambda a: len(a.peanut_encoders or ())},
    "shira": {"r": lambda a: a.shira_weight.numel() // sum(a.shape)},
    "supertuning": {"supertuning_rank": lambda a: _rows(a.supertuning_lora_A)},
    "trainable_tokens": {"trainable_tokens_original": _originals},
    "waveft": {
        "waveft_scaling": lambda a: a.scaling,
        "waveft_indices": _places("waveft_places"),
        "waveft_use_idwt": lambda a: a.waveft_wavelet is not None,
        "waveft_wavelet_family": lambda a: a.waveft_wavelet or "db1",
    },
}


def make_readable(method: str, layer_cls: Any) -> None:
    """Let the layers of a method say what :data:`READABLE` has for it, unless a layer says it itself."""
    for attribute, of_adapter in READABLE.get(method, {}).items():
        if not hasattr(layer_cls, attribute):
            setattr(layer_cls, attribute, Asked(_by_adapter(of_adapter)))


def _by_adapter(of_adapter: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def of_layer(layer: Any) -> dict[str, Any]:
        """Adapter -> its value."""
        held = {} if isinstance(layer, type) else {name: of_adapter(a) for name, a in layer.adapters.items()}
        return {name: value for name, value in held.items() if value is not None}

    return of_layer

"""Operations on the tensors of adapters, as transformers' loader chains them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft.core.files.entries import Entry, entries


try:
    from transformers.core_model_loading import (
        Concatenate,
        ConversionOps,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
    )
except ImportError:  # older than version 5: its models have no stacked experts, and nothing here is ever asked for
    Concatenate = ConversionOps = object  # type: ignore[assignment,misc]
    MergeModulelist = WeightConverter = WeightRenaming = None  # type: ignore[assignment,misc]


__all__ = [
    "Concatenate",
    "FlattenDims",
    "JoinParts",
    "MergeModulelist",
    "PeftConcatenate",
    "PermuteDims",
    "WeightConverter",
    "WeightRenaming",
    "block_diagonal",
]


def _mapped(input_dict: dict[str, Any], change: Any) -> dict[str, Any]:
    return {name: change(value[0] if isinstance(value, list) else value) for name, value in input_dict.items()}


class FlattenDims(ConversionOps):
    """Neighbouring dimensions become one: (0, 1) makes [a, b, c] into [a * b, c]."""

    def __init__(self, dims: int | tuple[int, ...]) -> None:
        self.dims = dims

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        dims = (self.dims, self.dims + 1) if isinstance(self.dims, int) else self.dims
        return _mapped(input_dict, lambda t: t.flatten(min(dims), max(dims)))

    def __repr__(self) -> str:
        return f"FlattenDims(dims={self.dims})"


class PermuteDims(ConversionOps):
    """Dimensions in another order, as ``torch.permute``."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        self.dims = tuple(dims)

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return _mapped(input_dict, lambda t: t.permute(self.dims).contiguous())

    def __repr__(self) -> str:
        return f"PermuteDims(dims={self.dims})"


class PeftConcatenate(Concatenate):
    """The ``lora_B`` of modules that were concatenated along ``dim``: [experts, out, r] each, block-diagonal."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        blocks = []
        for pattern in source_patterns:
            if pattern in input_dict:
                value = input_dict.pop(pattern)
                blocks += value if isinstance(value, list) else [value]
        return {self.get_target_pattern(target_patterns): block_diagonal(blocks)}


class JoinParts(ConversionOps):
    """What a file holds for one tensor of an adapter, several tensors or another form, becomes that tensor."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.known: dict[str, Entry] = {}

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        model: nn.Module | None = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        given = [v[0] if isinstance(v, list) else v for pattern in source_patterns for v in [input_dict[pattern]]]
        if not self.known and model is not None:
            self.known = {entry.key: entry for entry in entries(model, self.adapter)}
        entry = self.known.get(full_layer_name)
        whole = given[0] if entry is None or not entry.split else entry.as_loaded(dict(zip(entry.split, given)))
        return {target_patterns[0]: whole}

    def __repr__(self) -> str:
        return f"JoinParts({self.adapter!r})"


def block_diagonal(blocks: list[torch.Tensor]) -> torch.Tensor:
    """[experts, out_i, r_i] each -> [experts, sum of out_i, sum of r_i], zero outside the blocks."""
    rows, columns = sum(b.shape[1] for b in blocks), sum(b.shape[2] for b in blocks)
    result = blocks[0].new_zeros(blocks[0].shape[0], rows, columns)
    row = column = 0
    for block in blocks:
        result[:, row : row + block.shape[1], column : column + block.shape[2]] = block
        row, column = row + block.shape[1], column + block.shape[2]
    return result

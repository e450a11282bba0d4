"""Adapters left out of some blocks while a model runs (AdapterDrop, Rueckle et al. 2021, arXiv 2010.11918)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from peft.core.blocks.blocks import BlockLayer, find_blocks
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.walk import walk
from peft.meanwhile import having


@contextmanager
def blocks_skipped(model: nn.Module, numbers: Iterable[int]) -> Iterator[None]:
    """A context in which the adapters of some blocks, and of the layers in them, do nothing.

    Args:
        numbers: of the blocks, counted from 0 in the order of the model.

    Raises:
        ValueError: if the model has no such block, or no adapter in any of its layers.
    """
    blocks, chosen = find_blocks(model), set(numbers)
    if unknown := chosen - set(range(len(blocks))):
        raise ValueError(
            f"{type(model).__name__} has no block {', '.join(map(str, sorted(unknown)))}: it has {len(blocks)} "
            "transformer blocks, counted from 0."
        )
    inside = {blocks[number].key for number in chosen}
    layers, left = [], []
    for site in walk(model):
        here = [wrapper for _, wrapper in site.wrappers if isinstance(wrapper, BaseTunerLayer)]
        parts = site.key.split(".")
        if here and any(".".join(parts[:end]) in inside for end in range(1, len(parts) + 1)):
            left += here
        layers += here
    if not layers:
        raise ValueError("no layer of the model has an adapter: prompts are no part of single blocks.")
    apart = [layer for layer in left if not isinstance(layer, BlockLayer) and not layer.disable_adapters]
    around = [layer for layer in left if isinstance(layer, BlockLayer) and not layer.skipped]
    for layer in apart:
        layer.enable_adapters(False)
    try:
        with having(around, skipped=True):
            yield
    finally:
        for layer in apart:
            layer.enable_adapters(True)

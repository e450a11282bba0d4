"""Flux: the names of its authors, which kohya-ss and ComfyUI use, and those of diffusers.

The authors keep query, key and value in one matrix, ``img_attn.qkv``, and in the single blocks the first matrix of the
feed-forward as well, ``linear1``; diffusers keeps each apart. One LoRA over the fused rows is LoRAs of the parts with
the same A. The other way, parts with one A and one scale are its rows again; others stand side by side.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from peft.convert.held import Held, Pair, Pairs, held_of, pairs_of
from peft.utils.error import ConfigError


_MLP_RATIO = 4  # of the hidden size, in all of Flux
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_OUTSIDE = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_SWAPPED = "final_layer.adaLN_modulation.1"  # (shift, scale) there, (scale, shift) in diffusers
_BLOCKS = (("double_blocks", "transformer_blocks", _DOUBLE), ("single_blocks", "single_transformer_blocks", _SINGLE))


def is_original(names: Iterable[str]) -> bool:
    """Whether modules have the names of Flux's authors."""
    return any(re.match(r"(double|single)_blocks\.", name) for name in names)


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether modules have the names of diffusers' Flux: of its single blocks, as others have double ones."""
    return any(name.startswith("single_transformer_blocks.") for name in names)


def _parts_of(module: str) -> tuple[str, ...] | None:
    """diffusers' modules that one of the authors' is."""
    for original, prefix, table in _BLOCKS:
        if found := re.fullmatch(rf"{original}\.(\d+)\.(.+)", module):
            return tuple(f"{prefix}.{found[1]}.{part}" for part in table[found[2]]) if found[2] in table else None
    return _OUTSIDE.get(module)


def _whole_of(module: str) -> tuple[str, int] | None:
    """The authors' module that one of diffusers' is in, and which part it is."""
    for original, prefix, table in _BLOCKS:
        if found := re.fullmatch(rf"{prefix}\.(\d+)\.(.+)", module):
            places = ((f"{original}.{found[1]}.{name}", parts) for name, parts in table.items())
            return next(((name, parts.index(found[2])) for name, parts in places if found[2] in parts), None)
    return next(((name, 0) for name, parts in _OUTSIDE.items() if module in parts), None)


# --- to diffusers -------------------------------------------------------------------------------------------------


def to_diffusers(held: Held) -> Held:
    """A LoRA on the authors' modules as one on diffusers'.

    Raises:
        ConfigError: a module is none of Flux's.
    """
    found, made = pairs_of(held), {}
    for module, pair in found.pairs.items():
        parts = _parts_of(module)
        if parts is None:
            raise ConfigError(f"{module} is no module of Flux with a counterpart in diffusers.")
        sizes = _sizes(parts, len(pair.up), pair.down.shape[1])
        rows = _swapped(pair) if module == _SWAPPED else pair
        for part, at in zip(parts, torch.arange(len(pair.up)).split(sizes)):
            made[part] = _rows(rows, at)
    return held_of(Pairs(made, found.others, found.rslora))


def _sizes(parts: tuple[str, ...], out: int, inner: int) -> list[int]:
    if len(parts) == 4:
        return [inner, inner, inner, out - 3 * inner]
    return [out // len(parts)] * len(parts)


def _rows(pair: Pair, at: torch.Tensor) -> Pair:
    """The LoRA of some outputs."""
    bias, magnitude = (None if t is None else t[at] for t in (pair.bias, pair.magnitude))
    return Pair(pair.down, pair.up[at].contiguous(), pair.alpha, magnitude, bias)


def _swapped(pair: Pair) -> Pair:
    return _rows(pair, torch.arange(len(pair.up)).roll(len(pair.up) // 2))


# --- to the authors' names ----------------------------------------------------------------------------------------


def to_original(held: Held) -> Held:
    """A LoRA on diffusers' modules as one on the authors'; parts that are not adapted get zeros.

    Raises:
        ConfigError: a module is none of Flux's, or a DoRA is on some of the parts only.
    """
    found = pairs_of(held)
    groups: dict[str, dict[int, Pair]] = {}
    for module, pair in found.pairs.items():
        place = _whole_of(module)
        if place is None:
            raise ConfigError(f"{module} is no module of Flux with a counterpart among its authors' names.")
        scaled = Pair(pair.down, pair.up, found.scale(module) * pair.rank, pair.magnitude, pair.bias)
        groups.setdefault(place[0], {})[place[1]] = scaled
    made = {}
    for module, parts in groups.items():
        pair = _fused(module, parts)
        made[module] = _swapped(pair) if module == _SWAPPED else pair
    return held_of(Pairs(made, found.others))


def _fused(module: str, parts: dict[int, Pair]) -> Pair:
    """One LoRA of several modules with the same input."""
    names, one = _parts_of(module) or (), next(iter(parts.values()))
    if len(names) == 1:
        return one
    inner = one.down.shape[1]
    outs = [len(parts[i].up) if i in parts else inner * (_MLP_RATIO if name.endswith("proj_mlp") else 1)
            for i, name in enumerate(names)]  # fmt: skip
    if any(pair.magnitude is not None for pair in parts.values()) and len(parts) < len(names):
        raise ConfigError(f"{module} would be a DoRA in {len(parts)} of its {len(names)} parts only.")
    ends = torch.tensor([0, *outs]).cumsum(0).tolist()
    same = all(torch.equal(pair.down, one.down) and pair.alpha == one.alpha for pair in parts.values())
    rank = one.rank if same else sum(pair.rank for pair in parts.values())
    up, left = one.up.new_zeros(ends[-1], rank), 0
    for i, pair in sorted(parts.items()):
        columns = slice(None) if same else slice(left, left + pair.rank)
        up[ends[i] : ends[i + 1], columns] = pair.up if same else pair.up * (pair.alpha / pair.rank)
        left += pair.rank
    down = one.down if same else torch.cat([pair.down for _, pair in sorted(parts.items())])

    def joined(field: str) -> torch.Tensor | None:
        given = {i: getattr(pair, field) for i, pair in parts.items() if getattr(pair, field) is not None}
        whole = one.up.new_zeros(ends[-1])
        for i, value in given.items():  # a bias of B is scaled as its product is
            scale = 1 if same or field == "magnitude" else parts[i].alpha / parts[i].rank
            whole[ends[i] : ends[i + 1]] = value * scale
        return whole if given else None

    return Pair(down, up, one.alpha if same else rank, joined("magnitude"), joined("bias"))

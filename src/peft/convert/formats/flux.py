"""Flux: the names of its authors, which kohya-ss and ComfyUI use, and those of diffusers.

The authors keep query, key and value in one matrix, ``img_attn.qkv``, and in the single blocks the first matrix of the
feed-forward as well, ``linear1``; diffusers keeps each apart. One LoRA over the fused rows is LoRAs of the parts with
the same A, and one LoHa LoHas with the same factors of the inputs. The other way, parts with one A and one scale are
its rows again; others stand side by side. A LoKr is no LoKr of some of its rows, but the LoRA that it equals.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch

from peft.convert.held import (
    Held,
    Pair,
    Pairs,
    alpha_and_rank,
    held_of,
    is_lora,
    modules_of,
    on_modules,
    pairs_of,
    renames_no,
    without_whole_modules,
)
from peft.convert.source import Base, Bundle
from peft.errors import ConfigError
from peft.kernels.decompositions import face_splitting
from peft.tuners.lokr import lokr_factor


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


def with_all_rows(module: str, pair: Pair) -> Pair:
    """The LoRA of a single block's ``linear1``, also where a file has its query, key and value alone (x-flux)."""
    inner = pair.down.shape[1]
    if re.fullmatch(r"single_blocks\.\d+\.linear1", module) is None or len(pair.up) != 3 * inner:
        return pair
    up = torch.cat([pair.up, pair.up.new_zeros(_MLP_RATIO * inner, pair.rank)])
    return dataclasses.replace(pair, up=up)


def weight_in(base: Base, module: str) -> torch.Tensor:
    """The weight of a module of a base model, put together of diffusers' where the module is one of the authors'."""
    parts = _parts_of(module) if is_diffusers(base.names) else None
    weight = torch.cat([base.tensor(part, "weight") for part in parts or (module,)])
    return weight.roll(len(weight) // 2, 0) if parts and module == _SWAPPED else weight


def as_in(held: Held, base: Base) -> Held:
    """The adapter on the modules of a base that is a Flux of one of the two sets of names; any other as it is."""
    here, there = modules_of(held), base.names
    if is_diffusers(there) and any(_parts_of(module) for module in here):
        return to_diffusers(without_whole_modules(held, "Flux"))
    if is_original(there) and any(_whole_of(module) for module in here):
        return to_original(without_whole_modules(held, "Flux"))
    return held


def flux_encoders(bundle: Bundle) -> Bundle:
    """The bundle with the T5 of Flux, which other pipelines have third and it has second, as diffusers calls it."""
    modules = [m for name in ("transformer", "diffusion_model") if name in bundle for m in modules_of(bundle[name])]
    if not (is_original(modules) or is_diffusers(modules)) or "text_encoder_2" in bundle:
        return bundle
    return {"text_encoder_2" if name == "text_encoder_3" else name: held for name, held in bundle.items()}


# --- to diffusers -------------------------------------------------------------------------------------------------


def to_diffusers(held: Held) -> Held:
    """An adapter on the authors' modules as one on diffusers': a LoRA, LoHa, or LoKr, which becomes a LoRA.

    Raises:
        ConfigError: a module is none of Flux's, or the adapter is of another method.
    """
    if held.method == "LOHA":
        return _loha_to_diffusers(held)
    found, made = _pairs(held), {}
    for module, pair in found.pairs.items():
        parts = _split(module)
        sizes = _sizes(parts, len(pair.up), pair.down.shape[1])
        rows = _swapped(pair) if module == _SWAPPED else pair
        for part, at in zip(parts, torch.arange(len(pair.up)).split(sizes)):
            if pair.magnitude is None and pair.up.any() and not pair.up[at].any():
                continue  # zeros stand for a part that is not adapted
            made[part] = _rows(rows, at)
    return held_of(Pairs(made, found.others, found.rslora))


def _split(module: str) -> tuple[str, ...]:
    parts = _parts_of(module)
    if parts is None:
        raise ConfigError(f"{module} is no module of Flux with a counterpart in diffusers.")
    return parts


def _pairs(held: Held) -> Pairs:
    """The pairs of a LoRA, or of a LoHa or LoKr as the LoRA that it equals."""
    if is_lora(held):
        return pairs_of(held)
    equal = {"LOHA": _pair_of_loha, "LOKR": _pair_of_lokr}.get(held.method)
    if equal is None:
        raise renames_no(held, "Flux")
    return Pairs({module: equal(parts, *alpha_and_rank(held, module)) for module, parts in _modules(held).items()})


def _modules(held: Held) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of an adapter that has no whole modules."""
    return without_whole_modules(held, "Flux").by_module


def _pair_of_loha(parts: dict[str, torch.Tensor], alpha: float, rank: int) -> Pair:
    """(A1 B1) * (A2 B2) as one product, of rank r^2."""
    up, down = face_splitting(*(parts[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")))
    return Pair(down, up, alpha / rank * len(down))


def _pair_of_lokr(parts: dict[str, torch.Tensor], alpha: float, rank: int) -> Pair:
    """W1 (x) (A B) = (W1 (x) A) (1 (x) B), of the rank of W2 for each input of W1."""
    first = lokr_factor(parts.get("lokr_w1"), parts.get("lokr_w1_a"), parts.get("lokr_w1_b"))
    if "lokr_w2" in parts:
        a, b = parts["lokr_w2"], torch.eye(parts["lokr_w2"].shape[1], dtype=first.dtype)
    else:
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
    down = torch.kron(torch.eye(first.shape[1], dtype=first.dtype), b)
    return Pair(down, torch.kron(first, a), alpha / rank * len(down))


def _loha_to_diffusers(held: Held) -> Held:
    made: dict[str, dict[str, torch.Tensor]] = {}
    scales = {}
    for module, found in _modules(held).items():
        parts, out, inner = _split(module), len(found["hada_w1_a"]), found["hada_w1_b"].shape[1]
        order = torch.arange(out).roll(out // 2) if module == _SWAPPED else torch.arange(out)
        for part, at in zip(parts, order.split(_sizes(parts, out, inner))):
            made[part] = {name: t[at] if name.endswith("_a") else t for name, t in found.items()}
            scales[part] = alpha_and_rank(held, module)
    return on_modules(held, made, scales)


def _sizes(parts: tuple[str, ...], out: int, inner: int) -> list[int]:
    if len(parts) == 4:
        return [inner, inner, inner, out - 3 * inner]  # q, k and v are square; the rest is the MLP's
    return [out // len(parts)] * len(parts)


def _rows(pair: Pair, at: torch.Tensor) -> Pair:
    """The LoRA of some outputs."""
    bias, magnitude = (None if t is None else t[at] for t in (pair.bias, pair.magnitude))
    return Pair(pair.down, pair.up[at].contiguous(), pair.alpha, magnitude, bias)


def _swapped(pair: Pair) -> Pair:
    return _rows(pair, torch.arange(len(pair.up)).roll(len(pair.up) // 2))


# --- to the authors' names ----------------------------------------------------------------------------------------


def to_original(held: Held) -> Held:
    """An adapter on diffusers' modules as one on the authors'; parts that are not adapted get zeros.

    A LoHa whose parts have the factors of their inputs in common stays one; others, and a LoKr, become LoRAs.

    Raises:
        ConfigError: a module is none of Flux's, a DoRA is on some of the parts only, or it is of another method.
    """
    if held.method == "LOHA" and (kept := _loha_to_original(held)) is not None:
        return kept
    found = _pairs(held)
    groups = _grouped(
        {module: Pair(pair.down, pair.up, found.scale(module) * pair.rank, pair.magnitude, pair.bias)
         for module, pair in found.pairs.items()}
    )  # fmt: skip
    made = {}
    for module, parts in groups.items():
        pair = _fused(module, parts)
        made[module] = _swapped(pair) if module == _SWAPPED else pair
    return held_of(Pairs(made, found.others))


def _grouped(modules: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """What belongs to each of the authors' modules, by the number of the part."""
    groups: dict[str, dict[int, Any]] = {}
    for module, value in modules.items():
        place = _whole_of(module)
        if place is None:
            raise ConfigError(f"{module} is no module of Flux with a counterpart among its authors' names.")
        groups.setdefault(place[0], {})[place[1]] = value
    return groups


def _loha_to_original(held: Held) -> Held | None:
    """A LoHa whose parts differ in their outputs alone; None if they do not."""
    made, scales = {}, {}
    for module, parts in _grouped({m: (p, alpha_and_rank(held, m)) for m, p in _modules(held).items()}).items():
        (one, scale), names = next(iter(parts.values())), _parts_of(module) or ()
        shared = {name: t for name, t in one.items() if name.endswith("_b")}
        if any(own != scale or any(not torch.equal(p[n], t) for n, t in shared.items()) for p, own in parts.values()):
            return None
        inner = one["hada_w1_b"].shape[1]
        made[module] = dict(shared)
        for name in one.keys() - shared.keys():
            rows = [parts[i][0][name] if i in parts else one[name].new_zeros(size, one[name].shape[1])
                    for i, size in enumerate(_outs(names, inner))] if len(names) > 1 else [one[name]]  # fmt: skip
            whole = torch.cat(rows)
            made[module][name] = whole.roll(len(whole) // 2, 0) if module == _SWAPPED else whole
        scales[module] = scale
    return on_modules(held, made, scales)


def _outs(names: tuple[str, ...], inner: int) -> list[int]:
    """Rows of the parts of a fused matrix."""
    return [inner * (_MLP_RATIO if name.endswith("proj_mlp") else 1) for name in names]


def _fused(module: str, parts: dict[int, Pair]) -> Pair:
    """One LoRA of several modules with the same input."""
    names, one = _parts_of(module) or (), next(iter(parts.values()))
    if len(names) == 1:
        return one
    inner = one.down.shape[1]
    outs = [len(parts[i].up) if i in parts else size for i, size in enumerate(_outs(names, inner))]
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

"""kohya-ss and LyCORIS: ``lora_unet_down_blocks_0_....lora_down.weight`` with an ``alpha`` for each module.

Names have no dots, components a prefix. LoCon's Tucker core (``lora_mid``) is folded into A; LoHa and LoKr keep
theirs. What else LyCORIS has is read by what it does to a weight, see :mod:`peft.convert.formats.lycoris`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from peft.convert.formats.flux import is_diffusers, is_original, to_original
from peft.convert.formats.lycoris import (
    CHANGES,
    NORMS,
    Parts,
    alpha_of,
    change_of,
    ia3_held,
    ia3_parts,
    is_change,
    lokr_factors,
    norm_parts,
    whole_of,
    whole_pair,
    with_norms,
)
from peft.convert.held import Held, Pair, Pairs, as_saved, held_of, magnitude_of, modules_of, pairs_of
from peft.convert.names import TRANSFORMERS, component_of, dotted, flat, is_t5
from peft.convert.source import Bundle, Files, Format, Job, Source
from peft.core.files.io import PREFIX, separate
from peft.errors import ConfigError
from peft.tuners.loha import LoHaConfig
from peft.tuners.lokr import LoKrConfig, factorization
from peft.tuners.lora.config import rank_fields


# Prefix of names in files -> component. The first that fits is taken; what is written is the first of a component.
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_transformer_": "transformer",
    "lycoris_": "",
}
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_LORA = ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale", "diff_b", *CHANGES)
_IA3 = ("weight", "on_input")
_FORMS = {"norm": tuple(NORMS), "lora": _LORA, "loha": (*_LOHA, "dora_scale"), "lokr": (*_LOKR, "dora_scale"),
          "ia3": _IA3}  # fmt: skip
ALGORITHMS = {part for parts in (NORMS, CHANGES, _LOHA, _LOKR) for part in parts} - {"rescale"}
"""Names of tensors that tell another algorithm of LyCORIS than LoRA."""
_NORM_HINT = " (norms are written as changes where the base model's weights are given, base=...)"
_SHARED = {"dora_scale", "diff_b", "rescale"}  # which say nothing of the form


def _matches(source: Source) -> bool:
    tails = {name.partition(".")[2] for name in source.tensors if name.startswith(tuple(PREFIXES))}
    return bool(tails) and all("." not in name.partition(".")[0] for name in source.tensors if "." in name)


def _read(source: Source, job: Job) -> Bundle:
    modules: dict[str, dict[str, Parts]] = {}
    prefixes = dict(PREFIXES)
    if any(name.startswith(tuple(f"lora_unet_{block}" for block in TRANSFORMERS)) for name in source.tensors):
        prefixes["lora_unet_"] = "transformer"  # as files call it all the same
    for name, tensor in source.tensors.items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            job.lost[name] = "it belongs to no component that is known"
            continue
        module, _, part = name.removeprefix(prefix).partition(".")
        modules.setdefault(prefixes[prefix], {}).setdefault(module, {})[part] = tensor
    bundle: Bundle = {}
    for component, found in modules.items():
        bundle.update(by_method(component, {_dotted(name, found, job): parts for name, parts in found.items()}, job))
    if not bundle:
        raise ConfigError(f"nothing in {source.path} can be converted: {'; '.join(job.lost.values())}.")
    return bundle


def _dotted(name: str, found: Iterable[str], job: Job) -> str:
    """The module that a name means: of the base model, where these names are of it; else by the names' parts."""
    known = job.base.names if job.base else []
    flux = is_original(other.replace("_blocks_", "_blocks.") for other in found) and not is_original(known)
    return dotted(name, None if flux or {flat(module) for module in known}.isdisjoint(found) else known)


def by_method(component: str, found: dict[str, Parts], job: Job) -> Bundle:
    """The adapters of one model, by method: the tensors of its modules as kohya-ss and LyCORIS call them."""
    groups: dict[str, dict[str, Parts]] = {}
    for module, parts in found.items():
        form = next((form for form, names in _FORMS.items() if parts.keys() & set(names) - _SHARED), None)
        left = parts.keys() - {*_FORMS.get(form or "", ()), "alpha", *(["scalar"] if form else [])}
        job.lost.update({f"{module}.{part}": "it has no counterpart here" for part in left})
        if form is not None:
            groups.setdefault("lora" if is_change(parts) else form, {})[module] = parts
    norms, products = groups.pop("norm", {}), groups.get("lokr")
    if products and _factor(products) is None:  # one config has one rule by which all modules are cut
        groups.setdefault("lora", {}).update(groups.pop("lokr"))
    makers: dict[str, Callable[[dict[str, Parts], Job], Held]]
    makers = {"lora": _lora, "loha": _loha, "lokr": _lokr, "ia3": ia3_held}
    made = {method: makers[method](modules, job) for method, modules in groups.items()}
    if norms and (alone := with_norms(norms, made.values(), job)) is not None:
        made["norms"] = alone
    if len(made) > 1:
        methods = " and ".join(made)
        job.notes.append(f"the file has {methods}: adapters of their own, to be active together (mixed=True)")
        return {"-".join(filter(None, (component, method))): held for method, held in made.items()}
    return dict(zip((component,), made.values()))


def _lora(modules: dict[str, Parts], job: Job) -> Held:
    pairs = {module: _pair(module, parts, job) for module, parts in modules.items()}
    if any(pair.bias is not None for pair in pairs.values()):  # all modules of a LoRA have one then
        for pair in pairs.values():
            pair.bias = pair.up.new_zeros(len(pair.up)) if pair.bias is None else pair.bias
    return held_of(Pairs(pairs))


def _pair(module: str, parts: Parts, job: Job) -> Pair:
    if is_change(parts) or not any(name.startswith("lora_") for name in parts):
        pair = whole_pair(change_of(module, parts, job))
        if "diff" not in parts:
            job.notes.append(f"{module}: what it does to the weight is a LoRA of full rank; resize_adapter cuts it")
    else:
        pair = _low_rank(module, parts, job)
    if "diff_b" in parts:
        pair.bias = parts["diff_b"] / (pair.alpha / pair.rank)
    return pair


def _low_rank(module: str, parts: Parts, job: Job) -> Pair:
    try:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
    except KeyError as error:
        raise ConfigError(f"{module} lacks {error}: the file is incomplete.") from error
    if (mid := parts.get("lora_mid.weight")) is not None:
        core = torch.promote_types(mid.dtype, torch.float32)
        down = torch.einsum("ij...,jn->in...", mid.to(core), down.flatten(1).to(core)).to(down.dtype)
        job.notes.append(f"{module}: its core (lora_mid) is multiplied into A")
    if (scale := parts.get("dora_scale")) is not None:
        scale = magnitude_of(scale, down)
    return Pair(down, up, alpha_of(parts, len(down)), scale)


def _loha(modules: dict[str, Parts], job: Job) -> Held:
    ranks = {module: len(parts["hada_w1_b"]) for module, parts in modules.items()}
    effective = any("hada_t1" in parts for parts in modules.values())
    config = LoHaConfig(**_fields(modules, ranks), use_effective_conv2d=effective)
    return Held(config, _renamed(modules, _LOHA))


def _factor(modules: dict[str, Parts]) -> int | None:
    """The ``decompose_factor`` that cuts all modules as they are cut, if there is one."""
    return max(set.intersection(*(_factors(_sizes(parts)) for parts in modules.values())), default=None)


def _lokr(modules: dict[str, Parts], job: Job) -> Held:
    ranks = {}
    for module, parts in modules.items():
        second, sizes = next((parts[n] for n in ("lokr_w2_b", "lokr_w1_b") if n in parts), None), _sizes(parts)
        ranks[module] = max(sizes[1], sizes[3]) if second is None else len(second)
        if second is None:
            modules[module] = {**parts, "alpha": torch.tensor(float(ranks[module]))}  # both whole: scale 1
    both = any("lokr_w1_a" in parts for parts in modules.values())
    effective = any("lokr_t2" in parts for parts in modules.values())
    fields: Any = {**_fields(modules, ranks), "decompose_factor": _factor(modules)}
    config = LoKrConfig(**fields, decompose_both=both, use_effective_conv2d=effective)
    return Held(config, _renamed(modules, _LOKR))


def _sizes(parts: Parts) -> tuple[int, int, int, int]:
    """o1, o2, i1, i2 of W1 ``[o1, i1]`` and W2 ``[o2, i2, *kernel]``."""
    first, second = lokr_factors(parts)
    return len(first), len(second), first.shape[1], second.shape[1]


def _factors(sizes: tuple[int, int, int, int]) -> set[int]:
    """The values of ``decompose_factor`` that cut a module like this."""
    o1, o2, i1, i2 = sizes
    tried = {-1, *range(1, max(o1, i1) + 1)}
    return {f for f in tried if factorization(o1 * o2, f) == (o1, o2) and factorization(i1 * i2, f)[0] == i1}


def _fields(modules: dict[str, Parts], ranks: dict[str, int]) -> dict[str, Any]:
    alphas = {module: alpha_of(parts, ranks[module]) for module, parts in modules.items()}
    return {**rank_fields(ranks, alphas, "alpha"), "target_modules": sorted(modules), "inference_mode": True}


def _renamed(modules: dict[str, Parts], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return as_saved({m: {name: parts[name] for name in names if name in parts} for m, parts in modules.items()})


# --- writing ------------------------------------------------------------------------------------------------------


def _write(bundle: Bundle, job: Job) -> Files:
    tensors: dict[str, torch.Tensor] = {}
    for component, held in bundle.items():
        prefix = _prefix(component, held, bundle)
        if is_diffusers(modules_of(held)):
            held = to_original(held)
            job.notes.append("the modules have the names of Flux's authors, whose query, key and value are one matrix")
        tensors.update(_flattened(held, prefix, job))
    return {"lora.safetensors": saver(tensors, {"format": "pt"})}


def saver(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Callable[[str], None]:
    """What writes tensors as safetensors to a path."""
    from safetensors.torch import save_file

    return lambda path: save_file(separate(tensors), path, metadata=metadata)


def _prefix(component: str, held: Held, bundle: Bundle) -> str:
    modules, name = modules_of(held), component.partition("-")[0]
    name = component_of(modules) if name in (*_FORMS, "norms", "") else name
    if name in ("unet", "transformer", "diffusion_model"):
        return "lora_unet_"
    if name.startswith("text_encoder") and is_t5(modules):
        return "lora_te3_"
    if name == "text_encoder":
        return "lora_te1_" if bundle.keys() & {"text_encoder_2", "text_encoder_3", "transformer"} else "lora_te_"
    found = next((prefix for prefix, known in PREFIXES.items() if known == name), None)
    if found is None:
        raise ConfigError(f"kohya's files have no component {name!r}.")
    return found


def _flattened(held: Held, prefix: str, job: Job) -> dict[str, torch.Tensor]:
    kind = held.method
    held = Held(held.config, {**held.tensors})
    norms = norm_parts(held, job)
    result = {f"{prefix}{flat(module)}.{part}": t for module, parts in norms.items() for part, t in parts.items()}
    if kind == "LORA":
        return result | _flat_lora(pairs_of(held), prefix, job)
    if kind == "IA3":
        return result | _flat_ia3(held, prefix, job)
    if kind not in ("LOHA", "LOKR", "LN_TUNING"):
        raise ConfigError(
            f"kohya's files hold LoRA, LoHa, LoKr, IA3 and norms, and this adapter is {kind}; use save_as_lora."
        )
    names = {"LOHA": _LOHA, "LOKR": _LOKR}.get(kind, ())
    for module, parts in held.by_module.items():
        own = {part: tensor for part, tensor in parts.items() if part in names}
        others = as_saved({module: {part: tensor for part, tensor in parts.items() if part not in names}})
        job.lost.update(dict.fromkeys(others, f"it is no tensor of {kind}{_NORM_HINT}"))
        key = f"{prefix}{flat(module)}"
        result.update({f"{key}.{part}": tensor for part, tensor in own.items()})
        if own:
            result[f"{key}.alpha"] = number(_effective_alpha(held, module, own), next(iter(own.values())).dtype)
    return result


def _effective_alpha(held: Held, module: str, parts: Parts) -> float:
    """alpha that gives the scale with the rank that LyCORIS reads from the shapes."""
    alpha, rank = held.config.alpha_at(module), held.config.rank_at(module)
    whole_pair = "lokr_w1" in parts and "lokr_w2" in parts
    if whole_pair and alpha != rank:
        raise ConfigError(
            f"{module}: both factors are whole, and LyCORIS gives such a LoKr no scale; it has {alpha / rank}."
        )
    return alpha


def _flat_lora(found: Pairs, prefix: str, job: Job) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for module, pair in found.pairs.items():
        key = f"{prefix}{flat(module)}"
        if pair.table:
            job.lost[module] = "kohya's files have no LoRAs of embeddings"
            continue
        change = whole_of(pair, found.scale(module))
        if change is not None:
            result[f"{key}.diff"] = change
            if pair.bias is not None:
                result[f"{key}.diff_b"] = pair.bias
            continue
        if pair.bias is not None and pair.bias.any():
            job.lost[f"{module}.lora_B.bias"] = "kohya's LoRAs have no biases"
        result[f"{key}.lora_down.weight"], result[f"{key}.lora_up.weight"] = pair.down, pair.up
        alpha = pair.alpha if not found.rslora else found.scale(module) * pair.rank
        result[f"{key}.alpha"] = number(alpha, pair.down.dtype)
        if pair.magnitude is not None:
            result[f"{key}.dora_scale"] = pair.magnitude.reshape(-1, *[1] * (pair.down.dim() - 1))
    job.lost.update(dict.fromkeys(found.others, f"kohya's files hold LoRAs alone{_NORM_HINT}"))
    return result


def _flat_ia3(held: Held, prefix: str, job: Job) -> dict[str, torch.Tensor]:
    result = {}
    for name, tensor in held.tensors.items():
        module = name.removeprefix(PREFIX).removesuffix(".ia3_l")
        if not name.endswith(".ia3_l"):
            job.lost[name] = f"it is no vector of IA3{_NORM_HINT}"
            continue
        for part, value in ia3_parts(held, module, tensor).items():
            result[f"{prefix}{flat(module)}.{part}"] = value
    return result


def number(value: float, dtype: torch.dtype) -> torch.Tensor:
    """A number as a tensor, in the first dtype that holds it: that of the weights, float32, float64."""
    for kind in (dtype, torch.float32):  # 16 bits round some alphas
        tensor = torch.tensor(value, dtype=kind)
        if float(tensor) == value:
            return tensor
    return torch.tensor(value, dtype=torch.float64)


KOHYA = Format("kohya", _matches, _read, _write, ".safetensors")

"""Adapters of mixture-of-experts models whose experts became one parameter.

Since version 5, transformers keeps the experts of a layer in stacked parameters (``experts.gate_up_proj``
[experts, 2 * width, in]) where earlier versions had a module each (``experts.0.w1``, ``experts.0.w3``). Its weight
conversions say which modules went where; from them follows what a LoRA made for the modules is for the parameter:

- the pairs of all experts are stacked, and those of modules that were concatenated become one pair of the summed
  rank, A = [A1; A3], B = diag(B1, B3), so that B A = [B1 A1; B3 A3];
- the scale must stay what it was, so alpha grows with the rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft.config import resolve_pattern
from peft.core.base.kinds import kind_of
from peft.core.files.entries import Entry, anatomy, entries
from peft.core.files.renaming import transforms_of, update_names
from peft.core.model.targeting import all_linear, matches, selected
from peft.core.model.walk import join, walk
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.peft_types import PEFT_TYPE_TO_TUNER_MAPPING, RENAMED_METHODS, PeftType


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
    "FlattenDims",
    "PeftConcatenate",
    "PermuteDims",
    "build_peft_weight_mapping",
    "convert_config_for",
    "convert_peft_adapter_state_dict_for_transformers",
    "convert_peft_config_for_transformers",
]


# --- operations on tensors, as transformers' loader chains them ---------------------------------------------------


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


# --- which modules went into which parameter ----------------------------------------------------------------------


@dataclass
class Fused:
    """A stacked parameter. ``sources``: for each module in it, its possible names, with ``*`` for the expert."""

    path: str
    tail: str
    sources: list[tuple[str, ...]]
    experts: int

    def names(self, source: int, expert: int) -> list[str]:
        return [name.replace("*", str(expert)) for name in self.sources[source]]


def _understood(conversion: Any) -> bool:
    """Whether a conversion stacks modules of experts, and concatenates their outputs if there are several."""
    if WeightConverter is None or not isinstance(conversion, WeightConverter):
        return False
    operations = [(type(op), getattr(op, "dim", None)) for op in conversion.operations]
    several = len(conversion.source_patterns) > 1
    wanted = [(MergeModulelist, 0)] + ([(Concatenate, 1)] if several else [])
    names = [*conversion.source_patterns, *conversion.target_patterns]
    return (
        operations == wanted
        and len(conversion.target_patterns) == 1
        and all(re.fullmatch(r"[\w.*]+", name) for name in names)
        and all(name.count("*.") == 1 and name.endswith(".weight") for name in conversion.source_patterns)
    )


def _aliases(name: str, conversions: list[Any]) -> tuple[str, ...]:
    """A name, and what it was called before transformers renamed it."""
    found = [name]
    for conversion in conversions:
        if WeightRenaming is None or not isinstance(conversion, WeightRenaming):
            continue
        for old, new in zip(conversion.source_patterns, conversion.target_patterns):
            if new.strip(".") and re.fullmatch(r"[\w.]+", old + new) and new in name:
                found.append(name.replace(new, old))
    return tuple(found)


def _fused(model: nn.Module, conversions: list[Any]) -> list[Fused]:
    """The stacked parameters of a model that conversions make from modules."""
    understood = [conversion for conversion in conversions if _understood(conversion)]
    found = []
    for site in walk(model) if understood else ():
        for attribute, p in site.module._parameters.items():
            path = join(site.key, attribute)
            for conversion in understood if p is not None and p.dim() == 3 else ():
                target = conversion.target_patterns[0]
                if not f".{path}".endswith(target if target.startswith(".") else f".{target}"):
                    continue
                start = f".{path}"[: -len(target)]
                names = [(start + source.removesuffix(".weight")).lstrip(".") for source in conversion.source_patterns]
                sources = [_aliases(name, conversions) for name in names]
                found.append(Fused(path, target.lstrip("."), sources, p.shape[0]))
                break
    return found


def _conversions_of(model: nn.Module) -> list[Any]:
    """transformers' weight conversions for a model, where it has stacked experts; else none."""
    held = (p for site in walk(model) for p in site.module._parameters.values())
    if not any(p is not None and p.dim() == 3 for p in held):
        return []
    return transforms_of(model)


# --- configs ------------------------------------------------------------------------------------------------------


def convert_config_for(model: nn.Module, peft_config: Any) -> None:
    """Let a config that targets modules of experts target the stacked parameters of this model, in place.

    Does nothing for models without such parameters, and for configs that do not mean experts; doing it twice is the
    same as doing it once.

    Raises:
        ValueError: if the config means only a part of what was stacked, or what no adapter of the stack can be.
    """
    for config in peft_config.members:
        update_names(model, config)
        convert_peft_config_for_transformers(config, model, _conversions_of(model))


def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: list[Any] | None) -> None:
    """As :func:`convert_config_for`, with conversions that are already at hand."""
    targets = getattr(peft_config, "target_modules", None)
    fused = _fused(model, list(conversions or ())) if targets else []
    if not fused:
        return
    is_lora = peft_config.peft_type == PeftType.LORA
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        if not is_lora:
            return
        peft_config.target_modules = _were_linear(model, fused) | all_linear(model, peft_config.task_type)
    chosen = [f for f in fused if _is_chosen(peft_config, f)]
    routers = _routers(peft_config, model, list(conversions or ())) if is_lora else {}
    if not chosen and not routers:
        return
    if not is_lora:
        raise ValueError(
            f"target_modules name modules of the experts, which this version of transformers keeps in one parameter, "
            f"{chosen[0].tail!r}; only LoRA can adapt that. Leave them out of {type(peft_config).__name__}."
        )
    _check_options(peft_config, (*(f.path for f in chosen), *routers))
    parameters = set(peft_config.target_parameters or ()) | _router_parameters(model, routers)
    for tail in dict.fromkeys(f.tail for f in chosen):
        group = [f for f in chosen if f.tail == tail]
        whole = len(group) == sum(f.tail == tail for f in fused)
        parameters |= {tail} if whole else {f.path for f in group}
        _set_rank(peft_config, group, tail if whole else None)
    peft_config.target_parameters = sorted(parameters)
    _drop_targets(peft_config, model, chosen, {name for names in routers.values() for name in names})


def _were_linear(model: nn.Module, fused: list[Fused]) -> set[str]:
    """Ends of the names of the modules that were stacked, and of the routers beside them."""
    names = {f.names(i, 0)[0].rpartition(".")[2] for f in fused for i in range(len(f.sources))}
    blocks = {f.path.rsplit(".", 2)[0] for f in fused}
    for site in walk(model):
        parent, _, name = site.key.rpartition(".")
        weight = site.module._parameters.get("weight")
        if parent in blocks and weight is not None and weight.dim() == 2 and kind_of(site.module) is None:
            names.add(name)
    return names


def _check_options(config: Any, paths: tuple[str, ...]) -> None:
    """Raise ValueError for options that have no meaning for a parameter. Dropout is none where nothing trains."""
    if config.inference_mode:
        config.lora_dropout = 0.0
    if field := config.needs_a_layer():
        raise ValueError(
            f"target_modules mean what this version of transformers keeps in the parameter {paths[0]!r}, and "
            f"{field}={getattr(config, field)!r} does not work with parameters. Leave {field} out, or target "
            "neither experts nor their router."
        )


def _is_chosen(config: Any, fused: Fused) -> bool:
    """Whether the config means all modules that were stacked here, or none.

    Raises:
        ValueError: if it means some.
    """
    meant = [
        [any(selected(config, name) for name in fused.names(i, e)) for e in range(fused.experts)]
        for i in range(len(fused.sources))
    ]
    if all(all(row) for row in meant):
        return True
    if not any(any(row) for row in meant):
        return False
    names = [source[0].rpartition(".")[2] for source in fused.sources]
    some = [name for name, row in zip(names, meant, strict=True) if any(row)]
    missing = [name for name in names if name not in some]
    what = f"also {', '.join(missing)}" if missing else "the modules of all experts"
    raise ValueError(
        f"target_modules mean {', '.join(some)} of the experts, but this version of transformers keeps "
        f"{', '.join(names)} of all {fused.experts} experts in one parameter, {fused.path!r}. Target {what}, or none."
    )


def _set_rank(config: Any, group: list[Fused], tail: str | None) -> None:
    """Rank and alpha of the stacked parameters, such that the update is the one that the modules had."""
    found = {}
    for fused in group:
        ranks, scales = [], set()
        for source in fused.sources:
            values = {
                (_resolved(config, "rank_pattern", names, config.r), _resolved(config, "alpha_pattern", names, None))
                for e in range(fused.experts)
                if (names := [name.replace("*", str(e)) for name in source])
            }
            if len(values) > 1:
                raise ValueError(f"experts of {fused.path!r} have different ranks or alphas; they must be the same.")
            rank, alpha = values.pop()
            ranks.append(rank)
            alpha = config.lora_alpha if alpha is None else alpha
            scales.add(alpha / (rank**0.5 if config.use_rslora else rank))
        if max(scales) - min(scales) > 1e-9 * max(map(abs, scales)):
            raise ValueError(
                f"the modules in {fused.path!r} have different scales {sorted(scales)} (alpha_pattern, rank_pattern), "
                "but one parameter has one scale."
            )
        rank = sum(ranks)
        alpha = scales.pop() * (rank**0.5 if config.use_rslora else rank)
        found[fused.path] = rank, int(alpha) if float(alpha).is_integer() else alpha
    if tail is not None and len(set(found.values())) == 1:
        found = {rf".*\.{re.escape(tail)}": next(iter(found.values()))}
    else:
        found = {"^" + re.escape(path): values for path, values in found.items()}
    for key, (rank, alpha) in found.items():
        if rank != config.r:
            config.rank_pattern = {**config.rank_pattern, key: rank}
        if alpha != config.lora_alpha:
            config.alpha_pattern = {**config.alpha_pattern, key: alpha}


def _resolved(config: Any, field: str, names: list[str], default: Any) -> Any:
    for name in names:
        value = resolve_pattern(getattr(config, field), name, None)
        if value is not None:
            return value
    return default


def _routers(config: Any, model: nn.Module, conversions: list[Any]) -> dict[str, tuple[str, ...]]:
    """Modules that were linear and are routers now, which LoRA adapts through their weight: path -> all its names."""
    found = {}
    for site in walk(model):
        weight = site.module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and kind_of(site.module) is None:
            names = _aliases(site.key, conversions)
            if any(selected(config, name) for name in names):
                found[site.key] = names
    return found


def _router_parameters(model: nn.Module, routers: Iterable[str]) -> set[str]:
    """What ``target_parameters`` says for routers: the ends of their names, where these mean nothing else."""
    tails = {router.rpartition(".")[2] + ".weight" for router in routers}
    meant = {
        site.key
        for site in walk(model)
        if "weight" in site.module._parameters and matches(tails, join(site.key, "weight"))
    }
    return tails if meant == set(routers) else {f"{router}.weight" for router in routers}


def _drop_targets(config: Any, model: nn.Module, chosen: list[Fused], routers: set[str]) -> None:
    """Take out of the targets what is meant by ``target_parameters`` now; ``routers`` are all names of those."""
    targets = config.target_modules
    real = [site.key for site in walk(model) if kind_of(site.module) is not None]
    if isinstance(targets, str):
        rest = {key for key in real if matches(targets, key)}
        config.target_modules = targets if rest and not any(matches(targets, name) for name in routers) else rest
        return
    moved = {name for f in chosen for i in range(len(f.sources)) for e in range(f.experts) for name in f.names(i, e)}
    moved |= routers
    config.target_modules = {
        target
        for target in targets
        if any(matches([target], key) for key in real) or not any(matches([target], name) for name in moved)
    }


# --- files of adapters ----------------------------------------------------------------------------------------


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """How transformers' loader gets from the names and tensors in a file to those of an adapter in its model.

    Args:
        weight_conversions: those of the base model.
        adapter_name: under which the adapter is injected.
        peft_config: of the adapter, as it was saved.

    Returns:
        Renamings and converters, in the order in which the loader applies them.

    Raises:
        ValueError: if the config targets experts that are stacked in a way for which nothing is known here.
    """
    conversions = list(weight_conversions or ())
    renamings = [WeightRenaming(r"^base_model\.model\.", "")]
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(getattr(peft_config, "peft_type", PeftType.LORA))
    layer_cls = getattr(tuner, "layer_cls", None)
    renamings += [
        WeightRenaming(rf"\.{re.escape(old)}", f".{new}")
        for now, old, new in RENAMED_METHODS.values()
        if now == getattr(peft_config, "peft_type", None)
    ]
    if layer_cls is not None:
        renamings += _adapter_renamings(layer_cls, adapter_name)
    others = [c for c in conversions if isinstance(c, WeightRenaming)]
    joins = _joins(layer_cls, adapter_name) if layer_cls is not None else []
    return [*renamings, *others, *joins, *_expert_converters(conversions, adapter_name, peft_config)]


def _joins(layer_cls: Any, adapter_name: str) -> list[Any]:
    """Converters for tensors that a file holds in another form than the model."""
    if not layer_cls.adapter_cls.split:
        return []
    return [
        WeightConverter(
            [rf"\.{name}" + (suffix or rf"\.{adapter_name}") for suffix in layer_cls.adapter_cls.split],
            [f".{name}.{adapter_name}"],
            operations=[JoinParts(adapter_name)],
        )
        for part in layer_cls.adapter_cls.parts.values()
        for name in part.names
    ]


def _adapter_renamings(layer_cls: Any, adapter_name: str) -> list[Any]:
    """``X.lora_A.weight`` in the file is ``X.lora_A.<adapter>.weight`` in the model."""
    renamings = []
    for name in layer_cls.adapter_cls.common:
        renamings.append(WeightRenaming(f"base_model.{name}", f"{name}.{adapter_name}"))
    parts = [(name, part) for part in layer_cls.adapter_cls.parts.values() for name in part.names]
    for name, part in sorted(parts, key=lambda item: not item[1].bare):
        if part.bare:  # saved without the name of the one tensor that it holds
            renamings.append(WeightRenaming(f".{name}.weight", f".{name}"))
            renamings.append(WeightRenaming(f".{name}", f".{name}.{adapter_name}.weight"))
        else:
            renamings.append(WeightRenaming(f".{name}", f".{name}.{adapter_name}"))
    return renamings


def _expert_converters(conversions: list[Any], adapter_name: str, peft_config: Any) -> list[Any]:
    """Converters from the LoRA pairs of the modules of experts to those of the stacked parameters."""
    if getattr(peft_config, "peft_type", None) != PeftType.LORA:
        return []
    stacks = [c for c in conversions if isinstance(c, WeightConverter) and any("*." in s for s in c.source_patterns)]
    meant = [c for c in stacks if _may_mean(peft_config, c, conversions)]
    for conversion in meant:
        if not _understood(conversion):
            raise ValueError(
                f"this adapter targets {conversion.source_patterns} of the experts. transformers makes "
                f"{conversion.target_patterns} of them in a way ({conversion.operations}) for which no conversion of "
                "adapters is known; load it with a version of transformers that keeps the experts as modules."
            )
    found = []
    for i, conversion in enumerate(meant):
        target = conversion.target_patterns[0]
        holder = target.rpartition(".")[0]
        outer = [c for c in meant[i + 1 :] if c.target_patterns[0].rpartition(".")[0] == holder]
        place = holder + ".base_layer" * len(outer)
        several = len(conversion.source_patterns) > 1
        stacked = {
            "lora_A": [MergeModulelist(dim=0)] + [Concatenate(dim=1)] * several + [FlattenDims((0, 1))],
            "lora_B": [MergeModulelist(dim=0)]
            + [PeftConcatenate(dim=1)] * several
            + [PermuteDims((2, 0, 1)), FlattenDims((0, 1)), PermuteDims((1, 0))],
        }
        for name, operations in stacked.items():
            end = f"{name}.{adapter_name}.weight"
            sources = [f"{source.removesuffix('weight')}{end}" for source in conversion.source_patterns]
            found.append(conversion.copy(sources, [f"{place}.{end}"], operations=operations))
    return found


def _may_mean(config: Any, conversion: Any, conversions: list[Any]) -> bool:
    """Whether the config targets what is stacked here, judged by names alone: the model is not at hand."""
    targets, parameters = config.target_modules, config.target_parameters or ()
    target = conversion.target_patterns[0].lstrip(".")
    if any(f".{target}".endswith(f".{p}") or f".{p}".endswith(f".{target}") for p in parameters):
        return True
    names: list[str] = []
    for source in conversion.source_patterns:
        inside = source.removesuffix(".weight").lstrip(".").replace("*", "0")
        block = f"model.layers.0.{inside}" if inside.startswith("mlp.") else f"model.layers.0.mlp.{inside}"
        names += _aliases(block, conversions)
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return True
    return any(matches(targets, name) for name in names)


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, torch.Tensor], adapter_name: str = "default"
) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file as this model needs them: those of modules of experts stacked, all others as given.

    Args:
        model: the base model, or one with adapters around it.
        peft_config: of the adapter; its ``target_parameters`` say which other parameters are wrapped.

    Returns:
        name in the file -> tensor; the very dict that was given, if there is nothing to convert.

    Raises:
        ValueError: if the file has tensors for a part of what was stacked.
    """
    root = anatomy(model)[0]
    conversions = _conversions_of(root)
    fused = _fused(root, conversions)
    configs = getattr(peft_config, "members", [peft_config])
    peft_config = next((config for config in configs if config.peft_type == PeftType.LORA), None)
    if not fused or peft_config is None:
        return adapter_state_dict
    place = {
        name: (f.path, i, e)
        for f in fused
        for i in range(len(f.sources))
        for e in range(f.experts)
        for name in f.names(i, e)
    }
    known = {site.key for site in walk(root)}
    result: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[tuple[int, int, str], torch.Tensor]] = {}
    for key, tensor in adapter_state_dict.items():
        split = re.fullmatch(r"(base_model\.model\.|)(.+)\.(lora_A|lora_B)\.weight", key)
        if split and split[2] in place:
            path, i, e = place[split[2]]
            parts.setdefault(split[1] + path, {})[i, e, split[3]] = tensor
        elif split and split[2] not in known:
            names = [new for new in _renamed(split[2], conversions) if new in known]
            result[f"{split[1]}{names[0]}.{split[3]}.weight" if names else key] = tensor
        else:
            result[key] = tensor
    if not parts:
        return result if result.keys() != adapter_state_dict.keys() else adapter_state_dict
    for f in fused:
        for prefix in ("base_model.model.", ""):
            if prefix + f.path in parts:
                name = prefix + _wrapper_path(root, f.path, fused, parts, prefix, peft_config)
                a, b = _stack(f, parts[prefix + f.path])
                result[f"{name}.lora_A.weight"], result[f"{name}.lora_B.weight"] = a, b
    return result


def _renamed(name: str, conversions: list[Any]) -> list[str]:
    """What transformers calls a module now."""
    found = []
    for conversion in conversions:
        if isinstance(conversion, WeightRenaming):
            new, matched = conversion.rename_source_key(f".{name}.")
            if matched is not None:
                found.append(new.strip("."))
    return found


def _wrapper_path(
    root: nn.Module, path: str, fused: list[Fused], parts: dict[str, Any], prefix: str, config: Any
) -> str:
    """Where a file has the adapter of a parameter: wrappers nest, that of the parameter registered first innermost."""
    holder, _, attribute = path.rpartition(".")
    module = next(site.module for site in walk(root) if site.key == holder)
    others = [join(holder, name) for name in module._parameters]
    later = others[others.index(join(holder, attribute)) + 1 :]
    around = [p for p in later if prefix + p in parts or matches(config.target_parameters, p)]
    return holder + ".base_layer" * len(around)


def _stack(fused: Fused, tensors: dict[tuple[int, int, str], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A [experts * r, in] and B [out, r * experts] of a stacked parameter."""
    wanted = [(i, e) for i in range(len(fused.sources)) for e in range(fused.experts)]
    missing = [fused.names(i, e)[0] for i, e in wanted for ab in ("lora_A", "lora_B") if (i, e, ab) not in tensors]
    if missing:
        raise ValueError(
            f"the file has tensors for a part of {fused.path!r} only: those for {missing[0]!r} are missing. "
            "transformers keeps all experts in one parameter, which is adapted whole."
        )

    def stacked(name: str) -> list[torch.Tensor]:
        return [torch.stack([tensors[i, e, name] for e in range(fused.experts)]) for i in range(len(fused.sources))]

    a = torch.cat(stacked("lora_A"), dim=1).flatten(0, 1)
    b = block_diagonal(stacked("lora_B")).permute(2, 0, 1).flatten(0, 1).T.contiguous()
    return a, b

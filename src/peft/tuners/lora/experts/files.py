"""Files whose tensors are those of modules of experts, for models that keep those in one parameter."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from peft.core.files.entries import anatomy
from peft.core.files.io import PREFIX
from peft.core.model.targeting import matches, means_all_linear
from peft.core.model.walk import join, walk
from peft.peft_types import PEFT_TYPE_TO_TUNER_MAPPING, RENAMED_METHODS, PeftType
from peft.tuners.lora.experts.fused import Fused, aliases, conversions_of, fused_in, understood
from peft.tuners.lora.experts.operations import (
    Concatenate,
    FlattenDims,
    JoinParts,
    MergeModulelist,
    PeftConcatenate,
    PermuteDims,
    WeightConverter,
    WeightRenaming,
    block_diagonal,
)


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
        if not understood(conversion):
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
        names += aliases(block, conversions)
    return means_all_linear(targets) or any(matches(targets, name) for name in names)


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
    conversions = conversions_of(root)
    fused = fused_in(root, conversions)
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
        for prefix in (PREFIX, ""):
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

"""Which modules of experts went into which stacked parameter, by transformers' weight conversions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from peft.core.files.renaming import transforms_of
from peft.core.model.walk import join, walk
from peft.tuners.lora.experts.operations import Concatenate, MergeModulelist, WeightConverter, WeightRenaming


@dataclass
class Fused:
    """A stacked parameter. ``sources``: for each module in it, its possible names, with ``*`` for the expert."""

    path: str
    tail: str
    sources: list[tuple[str, ...]]
    experts: int

    def names(self, source: int, expert: int) -> list[str]:
        return [name.replace("*", str(expert)) for name in self.sources[source]]


def understood(conversion: Any) -> bool:
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


def aliases(name: str, conversions: list[Any]) -> tuple[str, ...]:
    """A name, and what it was called before transformers renamed it."""
    found = [name]
    for conversion in conversions:
        if WeightRenaming is None or not isinstance(conversion, WeightRenaming):
            continue
        for old, new in zip(conversion.source_patterns, conversion.target_patterns):
            if new.strip(".") and re.fullmatch(r"[\w.]+", old + new) and new in name:
                found.append(name.replace(new, old))
    return tuple(found)


def fused_in(model: nn.Module, conversions: list[Any]) -> list[Fused]:
    """The stacked parameters of a model that conversions make from modules."""
    known = [conversion for conversion in conversions if understood(conversion)]
    found = []
    for site in walk(model) if known else ():
        for attribute, p in site.module._parameters.items():
            path = join(site.key, attribute)
            for conversion in known if p is not None and p.dim() == 3 else ():
                target = conversion.target_patterns[0]
                if not f".{path}".endswith(target if target.startswith(".") else f".{target}"):
                    continue
                start = f".{path}"[: -len(target)]
                names = [(start + source.removesuffix(".weight")).lstrip(".") for source in conversion.source_patterns]
                sources = [aliases(name, conversions) for name in names]
                found.append(Fused(path, target.lstrip("."), sources, p.shape[0]))
                break
    return found


def conversions_of(model: nn.Module) -> list[Any]:
    """transformers' weight conversions for a model, where it has stacked experts; else none."""
    held = (p for site in walk(model) for p in site.module._parameters.values())
    if not any(p is not None and p.dim() == 3 for p in held):
        return []
    return transforms_of(model)

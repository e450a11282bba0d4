"""Configs that target modules of experts, for models that keep those in one parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from peft.config import resolve_pattern
from peft.core.base.kinds import kind_of
from peft.core.files.renaming import update_names
from peft.core.model.targeting import all_linear, matches, means_all_linear, selected
from peft.core.model.walk import join, walk
from peft.peft_types import PeftType
from peft.tuners.lora.config import divisor, whole
from peft.tuners.lora.experts.fused import Fused, aliases, conversions_of, fused_in


def convert_config_for(model: nn.Module, peft_config: Any) -> None:
    """Let a config that targets modules of experts target the stacked parameters of this model, in place.

    Does nothing for models without such parameters, and for configs that do not mean experts; doing it twice is the
    same as doing it once.

    Raises:
        ValueError: if the config means only a part of what was stacked, or what no adapter of the stack can be.
    """
    for config in peft_config.members:
        update_names(model, config)
        convert_peft_config_for_transformers(config, model, conversions_of(model))


def _convert_peft_config_moe(peft_config: Any, model: nn.Module) -> None:
    """:func:`convert_config_for`, as third parties know it (unsloth)."""
    convert_config_for(model, peft_config)


def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, conversions: list[Any] | None) -> None:
    """As :func:`convert_config_for`, with conversions that are already at hand."""
    targets = getattr(peft_config, "target_modules", None)
    fused = fused_in(model, list(conversions or ())) if targets else []
    if not fused:
        return
    is_lora = peft_config.peft_type == PeftType.LORA
    if means_all_linear(targets):
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
        every = len(group) == sum(f.tail == tail for f in fused)
        parameters |= {tail} if every else {f.path for f in group}
        _set_rank(peft_config, group, tail if every else None)
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
        config.lora_dropout = 0.0  # inference has none, and a parameter cannot
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
            scales.add(alpha / divisor(rank, config.use_rslora))
        if max(scales) - min(scales) > 1e-9 * max(map(abs, scales)):
            raise ValueError(
                f"the modules in {fused.path!r} have different scales {sorted(scales)} (alpha_pattern, rank_pattern), "
                "but one parameter has one scale."
            )
        rank = sum(ranks)
        found[fused.path] = rank, whole(scales.pop() * divisor(rank, config.use_rslora))
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
    found = (resolve_pattern(getattr(config, field), name, None) for name in names)
    return next((value for value in found if value is not None), default)


def _routers(config: Any, model: nn.Module, conversions: list[Any]) -> dict[str, tuple[str, ...]]:
    """Modules that were linear and are routers now, which LoRA adapts through their weight: path -> all its names."""
    found = {}
    for site in walk(model):
        weight = site.module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and kind_of(site.module) is None:
            names = aliases(site.key, conversions)
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

"""What a config trains beside the adapted layers is put into a model: whole modules, tokens, biases."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft.core.base.storage import untrainable
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.auxiliary import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    TrainedBiases,
    bias_sites,
    biases_of,
    tied_sites,
)
from peft.core.model.record import context_of, record_of
from peft.core.model.targeting import ends_with, matches, tell_untied
from peft.core.model.walk import (
    Holders,
    Site,
    embeddings_of,
    holders_of,
    join,
    locate,
    names_in,
    names_of_modules,
    replace_module,
    walk,
)
from peft.errors import some
from peft.usage import counts, near, recording


# Heads that task classes add to modules_to_save by themselves; that a model lacks some of them is no mistake.
TASK_HEADS = ("classifier", "score", "qa_outputs")


def add_auxiliary(model: nn.Module, name: str, config: Any) -> None:
    """What the config trains beside the adapted layers: whole modules, tokens, and biases."""
    if modules := getattr(config, "modules_to_save", None):
        with recording(config, lambda: names_in(model), TASK_HEADS):
            _wrap_modules_to_save(model, name, modules, config)
    if indices := getattr(config, "trainable_token_indices", None):
        _wrap_tokens(model, name, indices, config)
    mode = getattr(config, "bias", "none")
    if mode != "none":
        record = record_of(model).biases = biases_of(model) or TrainedBiases()
        sites = list(bias_sites(model, mode, name))
        record.add(name, sites)
        if sites:
            counts("bias")


def _wrap_modules_to_save(model: nn.Module, name: str, modules: list[str], config: Any) -> None:
    names, holders = names_of_modules(model), holders_of(model)
    chosen: dict[str, nn.Module] = {}
    for site in walk(model):
        inside = site.key.startswith(tuple(f"{key}." for key in chosen))  # copied along with it
        meant = [key for key in names.get(id(site.module), [site.key]) if ends_with(modules, key)]
        if site.key and meant and not inside:
            chosen[site.key] = site.module
    for key, module in chosen.items():
        _check_whole(key, module)
        ties = tied_sites(model, module)
        if not getattr(config, "ensure_weight_tying", False):
            tell_untied(config, key, [site.key for site in ties if not site.wrappers and site.key not in chosen])
            ties = []
        wrapper = wrapper_of(model, key, ModulesToSaveWrapper, holders)
        if name not in wrapper:
            wrapper.update(name)
        for other in ties:
            counts("ensure_weight_tying")
            tied = wrapper_of(model, other.key, ModulesToSaveWrapper, holders)
            if name not in tied:
                tied.update(name, tied_module=wrapper)


def _check_whole(key: str, module: nn.Module) -> None:
    """Refuse what no trained copy can take the place of.

    Raises:
        TypeError: for a container: what is called is in it.
        ValueError: for weights that are kept as codes, which have no gradient.
    """
    if reason := untrainable(module):
        raise ValueError(f"modules_to_save cannot be applied to {key!r} ({type(module).__name__}): {reason}.")
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        entries = [join(key, child) for child in module._modules]
        way_out = f"Name its entries: {some(entries)}." if entries else "Its parameters stay as they are."
        raise TypeError(
            f"modules_to_save cannot be applied to {key!r}, a {type(module).__name__}: what is in it is called by "
            f"others, not itself. {way_out}"
        )


def _wrap_tokens(model: nn.Module, name: str, indices: list[int] | dict[str, list[int]], config: Any) -> None:
    if not isinstance(indices, dict):
        embedding = embeddings_of(model)[0]
        if embedding is None:
            raise ValueError(
                f"{type(model).__name__} does not say what its input embedding is; give trainable_token_indices "
                "as a dict of module name -> indices."
            )
        indices = {next(site.key for site in walk(model) if site.module is embedding): indices}
    chosen, holders = {}, holders_of(model)
    for target, rows in indices.items():
        sites = [site for site in walk(model) if matches([target], site.key)]
        if not sites:
            close = near(target, names_in(model))
            hint = f" Closest names: {', '.join(close)}." if close else ""
            raise ValueError(
                f"trainable_token_indices names the module {target!r}, which the model does not have.{hint}"
            )
        chosen.update({site.key: rows for site in sites})
        if whole := [site.key for site in sites if _has_copy(site, name)]:
            raise ValueError(
                f"{whole[0]!r} is named in modules_to_save, which trains all of its rows, and in "
                "trainable_token_indices, which trains some. Leave it out of one of them."
            )
    for key, rows in chosen.items():
        ties = [
            site.key
            for site in tied_sites(model, locate(model, key).module)
            if chosen.get(site.key, rows) == rows and not _has_copy(site, name)
        ]
        wrapper = wrapper_of(model, key, TrainableTokensWrapper, holders)
        if name in wrapper:
            continue
        wrapper.update(name, token_indices=rows)
        for other in ties:
            counts("ensure_weight_tying")
            wrapper_of(model, other, TrainableTokensWrapper, holders).update(
                name, token_indices=rows, tied_adapter=wrapper.token_adapter
            )


def _has_copy(site: Site, name: str) -> bool:
    """Whether the adapter trains the whole module already."""
    return any(isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper for _, wrapper in site.wrappers)


def wrapper_of(model: nn.Module, key: str, cls: type[AuxiliaryTrainingWrapper], holders: Holders) -> Any:
    """The auxiliary wrapper of a module: the one that is there, or a new one around all that acts on its weight."""
    site = locate(model, key)
    for _, wrapper in site.wrappers:
        if isinstance(wrapper, cls):
            return wrapper
    # What adapts a whole module acts on what this gives: the copy takes its place inside of that.
    inside = (at for at in site.wrappers if not (isinstance(at[1], BaseTunerLayer) and at[1].kind.whole))
    path, module = next(inside, (site.path, site.module))
    wrapper = cls(module)
    wrapper.context = context_of(model)
    replace_module(model, path, wrapper, holders)
    return wrapper

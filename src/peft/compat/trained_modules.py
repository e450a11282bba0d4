"""What adapters train beside their layers, by the functions with which others ask for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from peft.config import match_pattern
from peft.core.model import operations
from peft.core.model.auxiliary import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.core.model.beside import wrapper_of
from peft.core.model.targeting import matches
from peft.core.model.tuner import add_auxiliary
from peft.core.model.walk import holders_of, walk, wrappers_of
from peft.core.prompts.sizes import settle_sizes
from peft.errors import NoMatchingPeftModuleError


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first of these patterns (as in ``rank_pattern``) that means a module, or the module's name if none does."""
    found = match_pattern(pattern_keys, key_to_match)
    return key_to_match if found is None else found


def set_additional_trainable_modules(
    model: nn.Module, peft_config: Any, model_config: Any, adapter_name: str, activate_adapter: bool = True
) -> None:
    """Give a model what a config trains beside its layers: ``modules_to_save``, single tokens, biases.

    Args:
        model_config: not needed; the model is asked.
        activate_adapter: also make the adapter the active one of these modules.
    """
    before = {id(wrapper): wrapper.active_adapters for wrapper in auxiliary_of(model)}
    add_auxiliary(model, adapter_name, peft_config)
    for wrapper in auxiliary_of(model):
        wrapper.set_requires_grad(adapter_name, False)
        names = [adapter_name] if activate_adapter else before.get(id(wrapper), [])
        wrapper.set_adapter([name for name in names if name in wrapper], inference_mode=peft_config.inference_mode)


def auxiliary_of(model: nn.Module) -> Iterable[AuxiliaryTrainingWrapper]:
    """The wrappers in a model that are no tuner layers."""
    return [wrapper for _, wrapper in wrappers_of(model) if isinstance(wrapper, AuxiliaryTrainingWrapper)]


def _set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Sequence[str],
    inference_mode: bool,
    strict_module_check: bool = False,
    wrapper_cls: type[AuxiliaryTrainingWrapper] | None = None,
    activate_adapter: bool = True,
    **wrapper_kwargs: Any,
) -> None:
    """Wrap the modules of these names (or ends of names), so that the adapter has its own version of each.

    Raises:
        NoMatchingPeftModuleError: if ``strict_module_check`` and none is found.
    """
    keys = [site.key for site in walk(model) if site.key and matches(list(module_names), site.key)]
    if strict_module_check and not keys:
        raise NoMatchingPeftModuleError(f"no module of this {type(model).__name__} is called {list(module_names)}.")
    for key in keys:
        wrapper = wrapper_of(model, key, wrapper_cls or ModulesToSaveWrapper, holders_of(model))
        if adapter_name not in wrapper:
            wrapper.update(adapter_name, **wrapper_kwargs)
        if activate_adapter:
            wrapper.set_adapter(adapter_name, inference_mode=inference_mode)


def _set_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make an adapter the active one of the wrapped modules; those without it show the original."""
    for wrapper in auxiliary_of(model):
        names = [name for name in operations.names_of(adapter_name) if name in wrapper]
        wrapper.set_adapter(names, inference_mode=inference_mode)


def _freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Let an adapter train no more."""
    operations.set_requires_grad(model, adapter_name, False)


def _prepare_prompt_learning_config(peft_config: Any, model_config: Any) -> Any:
    """Fill in the sizes that a prompt's config leaves open, from the config of the base model (a dict, or its own)."""
    as_prefix = getattr(peft_config.METHOD, "value", None) in ("PREFIX_TUNING", "CARTRIDGE")
    settle_sizes(peft_config, _Described(model_config), as_prefix)
    return peft_config


class _Described(nn.Module):
    """A model of which there is only the config."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if isinstance(config, dict):
            from transformers import PretrainedConfig

            config = PretrainedConfig(**config)
        self.config = config

    def get_input_embeddings(self) -> nn.Module:
        text = self.config.get_text_config()
        return nn.Embedding(1, text.hidden_size, device="meta")

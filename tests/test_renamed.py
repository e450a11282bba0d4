"""Files and configs with the names that modules had in older versions of transformers, by transformers' own tables.

Every model type whose modules were renamed is built without memory. A few of them are in each run;
``PEFT_ALL_RENAMED=1 pytest tests/test_renamed.py`` tries all.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming

from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.core.files.renaming import update_names
from peft.core.files.state_dict import match
from peft.core.model.targeting import matches


AUTOS = ("ImageTextToText", "CausalLM", "Seq2SeqLM")


def renamed() -> list[str]:
    """The model types and classes for which transformers keeps renamings."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    table: dict[str, Any] = conversion_mapping._checkpoint_conversion_mapping_cache
    return sorted(k for k, transforms in table.items() if any(isinstance(t, WeightRenaming) for t in transforms))


def smaller(config: Any) -> Any:
    """The config with two layers and two experts, and the same for those inside it."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            smaller(value)
        elif name == "layer_types" and isinstance(value, list):
            setattr(config, name, value[:2])
        elif name.endswith(("num_hidden_layers", "num_layers", "_experts", "depth")) and type(value) is int:
            setattr(config, name, min(value, 2))
    return config


def build(key: str) -> nn.Module:
    """A model of this type or class on the meta device; skips what cannot be made of its default config."""
    try:
        with torch.device("meta"):
            if key not in transformers.CONFIG_MAPPING:
                cls = getattr(transformers, key)
                return cls(smaller(cls.config_class()))
            config = smaller(transformers.CONFIG_MAPPING[key]())
            autos = [getattr(transformers, f"AutoModelFor{name}") for name in AUTOS]
            autos = [auto for auto in autos if type(config) in auto._model_mapping]
            return (autos or [transformers.AutoModel])[0].from_config(config)
    except Exception as error:
        pytest.skip(f"{key} cannot be built: {type(error).__name__}: {error}")


def moved_modules(model: nn.Module) -> dict[str, str]:
    """Linear modules -> their names before, where transformers' tables lead from these to today's."""
    transforms = [t for t in conversion_mapping.get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    found = {}
    for key in [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]:
        old = f"{key}.weight"
        for transform in reversed(transforms):
            old = transform.reverse_transform().rename_source_key(old)[0]
        new = old
        for transform in transforms:
            new = transform.rename_source_key(new)[0]
        if new == f"{key}.weight" != old:
            found[key] = old.removesuffix(".weight")
    return found


@pytest.mark.parametrize("key", renamed() if os.environ.get("PEFT_ALL_RENAMED") else renamed()[::20])
def test_old_names_mean_the_modules_of_today(key: str) -> None:
    model = build(key)
    moved = moved_modules(model)
    if not moved:
        pytest.skip(f"no linear module of {key} was renamed")
    place, old = sorted(moved.items())[0]
    config = LoraConfig(target_modules=[old], r=2)
    update_names(model, config)
    meant = [name for name, _ in model.named_modules() if matches(config.target_modules, name)]
    assert place in meant
    assert all(moved.get(name, name).endswith(old) for name in meant)

    inject_adapter_in_model(LoraConfig(target_modules=[place], r=2), model)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = match(model, "default", {name.replace(place, old): tensor for name, tensor in state.items()})
    assert not found.unexpected and not found.missing and len(found.fits) == len(state)

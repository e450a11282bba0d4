"""The front door: a model and a config give a model with an adapter."""

from __future__ import annotations

import warnings

from torch import nn

from peft._lazy import also_known
from peft.config import PeftConfig
from peft.errors import nearest
from peft.mapping import check_config
from peft.mixed_model import PeftMixedModel
from peft.model_files import plain_model
from peft.options import value_of
from peft.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel | PeftMixedModel:
    """Give a model its first adapter: the model is changed in place, frozen, and wrapped in a :class:`PeftModel`.

    Args:
        model: the base model, usually one of transformers; any ``nn.Module`` will do.
        peft_config: the method and its options. It keeps what is settled here: the targets, and the base model's name.
        mixed: allow adapters of different methods beside each other.
        autocast_adapter_dtype: hold the adapter in float32 where the model is in a 16-bit dtype.
        revision: revision of the base model, kept in the config for loading.
        low_cpu_mem_usage: leave the adapter on the meta device until a checkpoint is loaded.

    Returns:
        The :class:`PeftModel` of the config's ``task_type``; the general one if it has none.

    Raises:
        TypeError: if ``peft_config`` is no config.
        ValueError: if the config does not fit the model, which is then unchanged, or names an unknown task.

    Examples:
        >>> config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config)
        >>> model.print_trainable_parameters()
        trainable params: 512 || all params: 5,904 || trainable%: 8.6721
    """
    check_config(peft_config)
    model = plain_model(model, adapter_name)
    cls = PeftMixedModel if mixed else _class_for_task(peft_config)
    _record_origin(model, peft_config, revision)
    return cls(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


def _class_for_task(peft_config: PeftConfig) -> type[PeftModel]:
    task = peft_config.task_type
    if task is None:
        return PeftModel
    if task not in MODEL_TYPE_TO_PEFT_MODEL_MAPPING:
        known = [str(value_of(name)) for name in MODEL_TYPE_TO_PEFT_MODEL_MAPPING]
        raise ValueError(
            f"unknown task_type {task!r}.{nearest(task, known)} There are {', '.join(known)}; None gives a model "
            "without a task."
        )
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]


def _record_origin(model: nn.Module, peft_config: PeftConfig, revision: str | None) -> None:
    """Note in the config which base model it is used with."""
    before, now = peft_config.base_model_name_or_path, vars(model).get("name_or_path") or None
    if before and now and before != now:
        warnings.warn(
            f"the config's base_model_name_or_path was {before!r} and is {now!r} now, which is what this model was "
            "loaded from. If that is not what you mean, load the model named in the config.",
            stacklevel=3,
        )
    if now or not before:
        peft_config.base_model_name_or_path = now
    if revision is not None:
        if peft_config.revision is not None and peft_config.revision != revision:
            warnings.warn(
                f"the config's revision was {peft_config.revision!r} and is {revision!r} now.",
                stacklevel=3,
            )
        peft_config.revision = revision


also_known(__name__)

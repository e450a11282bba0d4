"""How a method enters the library: one call that makes its tuner, its layer classes and its place in the registry."""

from __future__ import annotations

import sys
from dataclasses import Field
from typing import Any

from peft import default_targets
from peft.compat import alias_submodules
from peft.compat.readable import make_readable
from peft.core.adapter import Adapter
from peft.core.layer.classes import layer_class, prefix_of
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.tuner import BaseTuner
from peft.errors import ConfigError
from peft.options import value_of
from peft.peft_types import register_peft_method


def define_tuner(
    adapter_cls: type[Adapter],
    config_cls: Any,
    *,
    base: type[BaseTuner] = BaseTuner,
    layer: type[BaseTunerLayer] | None = None,
    prefix: str | None = None,
    mixed: bool = True,
    **attributes: Any,
) -> Any:
    """Make a method's tuner class and register the method.

    The rest is derived: ``HiraConfig`` gives ``HiraModel`` and ``HiraLayer``, which the method's file then holds, the
    prefix is what the names of its parts start with, and the default targets are the table named after its METHOD.

    Args:
        adapter_cls: the method's adapters.
        base: a tuner class with operations of the method's own.
        layer: a layer class with attributes of the method's own.
        prefix: what the names of the method's tensors start with, where they do not tell.
        mixed: whether it can be active together with other methods (``PeftMixedModel``); not where its tuner runs the
            model in a way of its own.
        attributes: more attributes of the tuner class.

    Raises:
        TypeError: if a part or a setting has the name of an attribute of every layer.
        ConfigError: if the config is no dataclass, or its METHOD is missing or not in capital letters.
    """
    module = sys.modules[adapter_cls.__module__]
    stem, method = config_cls.__name__.removesuffix("Config"), str(value_of(config_cls.METHOD))
    if method != method.upper() or any(isinstance(value, Field) for value in vars(config_cls).values()):
        raise ConfigError(
            f"{config_cls.__name__} must be a dataclass that names its method in capital letters: @dataclass above "
            f'the class, and METHOD: ClassVar[str] = "{stem.upper()}" in it.'
        )
    layer_cls = layer_class(adapter_cls, layer, f"{stem}Layer")
    vars(module).setdefault(layer_cls.__name__, layer_cls)  # where pickles and clients look for it
    for name, cls in layer_cls.by_name.items():
        if vars(module).setdefault(name, cls) is cls:  # where scripts that print or compare class names expect it
            cls.__qualname__ = name
    make_readable(method.lower(), layer_cls)
    table = getattr(default_targets, f"TRANSFORMERS_MODELS_TO_{method.replace('_', '')}_TARGET_MODULES_MAPPING", {})
    members = {
        "layer_cls": layer_cls,
        "tuner_layer_cls": layer_cls,
        "prefix": prefix or prefix_of(adapter_cls),
        "target_module_mapping": table,
        "__module__": module.__name__,
        "__doc__": f"Applies {config_cls.__name__} to a model; see :class:`BaseTuner` for the arguments.",
    }
    tuner: Any = type(f"{stem}Model", (base,), {**members, **attributes})
    register_peft_method(
        name=method.lower(),
        config_cls=config_cls,
        model_cls=tuner,
        prefix=tuner.prefix,
        is_mixed_compatible=mixed,
    )
    alias_submodules(module)
    return tuner

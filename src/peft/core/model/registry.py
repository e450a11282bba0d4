"""How a method enters the library: one call that makes its tuner, its layer classes and its place in the registry."""

from __future__ import annotations

import sys
from typing import Any

from peft.compat import alias_submodules
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.tuner import BaseTuner
from peft.utils.peft_types import register_peft_method


# Names of adapted layers: one class for each, over the method's one layer, for isinstance tests and printed models.
LAYER_NAMES = (
    "Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention", "ParamWrapper", "Linear4bit",
    "Linear8bitLt",
)  # fmt: skip


def define_tuner(
    tuner_name: str,
    layer_cls: type[BaseTunerLayer],
    config_cls: Any,
    *,
    prefix: str,
    targets: dict[str, Any] | None = None,
    mixed: bool = True,
    base: type[BaseTuner] = BaseTuner,
    **attributes: Any,
) -> type:
    """Make a method's tuner class and register the method.

    Args:
        tuner_name: name of the tuner class, ``"LoraModel"``.
        layer_cls: the method's layer. It gets a subclass for each layer kind, in ``layer_cls.by_name``.
        prefix: what the names of the method's tensors start with.
        targets: default target modules by ``model_type``.
        mixed: whether it can be active together with other methods (``PeftMixedModel``); not where its tuner runs the
            model in a way of its own.
        base: a tuner class with operations of the method's own.
    """
    module = sys.modules[layer_cls.__module__]
    layer_cls.by_name = {
        name: type(name, (layer_cls,), {"__module__": module.__name__, "__doc__": layer_cls.__doc__})
        for name in LAYER_NAMES
    }
    for name, cls in layer_cls.by_name.items():
        vars(module).setdefault(name, cls)
    members = {"layer_cls": layer_cls, "tuner_layer_cls": layer_cls, "prefix": prefix, "__module__": module.__name__}
    doc = f"Applies {config_cls.__name__} to a model; see :class:`BaseTuner` for the arguments."
    tuner = type(
        tuner_name, (base,), {**members, "target_module_mapping": targets or {}, "__doc__": doc, **attributes}
    )
    method = str(getattr(config_cls.METHOD, "value", config_cls.METHOD)).lower()
    register_peft_method(name=method, config_cls=config_cls, model_cls=tuner, prefix=prefix, is_mixed_compatible=mixed)
    alias_submodules(module)
    return tuner

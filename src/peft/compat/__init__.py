"""Names by which the ecosystem knows what stands elsewhere, or is done otherwise, in this package.

Import paths: ``peft.tuners.<method>.{layer,config,model,bnb}`` is the method's file. Layer classes keep their old
names. Methods of tuners and layers that others call, or override, are mixins in the files beside this one.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import nn

from peft._lazy import HOMES, lazy_module
from peft.core.base.kinds import innermost, kind_of
from peft.core.base.storage import storage_of
from peft.core.base.storage.quantized import is_from


PARTS = ("config", "layer", "model", "bnb")

# Further parts that others import, by method.
MORE_PARTS = {
    "adaption_prompt": ("utils",),
    "adalora": ("gptq",),
    "adamss": ("asa_callback",),
    "cartridge": ("utils",),
    "lora": ("aqlm", "awq", "eetq", "gptq", "hqq", "inc", "te", "torchao", "tp_layer"),
    "osf": ("utils",),
    "poly": ("router",),
    "shadow": ("layers",),
    "shira": ("mask_functions",),
    "xlora": ("classifier",),
}

# Layer classes by the names that they had: name here -> names there, by method.
OLD_LAYER_NAMES: dict[str, dict[str, str]] = {
    "adalora": {
        "SVDLinear": "Linear",
        "SVDConv2d": "Conv2d",
        "SVDLinear4bit": "Linear4bit",
        "SVDLinear8bitLt": "Linear8bitLt",
    },
    "c3a": {"C3ALinear": "Linear"},
    "deft": {"DeftLinear": "Linear"},
    "delora": {"DeloraLinear": "Linear"},
    "fourierft": {"FourierFTLinear": "Linear"},
    "glora": {"GloraLinear": "Linear"},
    "hra": {"HRALinear": "Linear", "HRAConv2d": "Conv2d"},
    "miss": {"MissLinear": "Linear"},
    "waveft": {"WaveFTLinear": "Linear"},
}

# Linear layers over a base of one library, which had a class of their own: name -> the library, by method.
OF_LIBRARY: dict[str, dict[str, str]] = {
    "adalora": {"SVDQuantLinear": "gptq"},
    "lora": {
        "AqlmLoraLinear": "aqlm",
        "AwqLoraLinear": "awq",
        "EetqLoraLinear": "eetq",
        "GPTQLoraLinear": "gptq",
        "HqqLoraLinear": "hqq",
        "IncLoraLinear": "neural_compressor",
        "LoraParallelLinear": "megatron",
        "TeLinear": "transformer_engine",
        "TorchaoLoraLinear": "torchao",
    },
}

# What others import from a method's module and what stands elsewhere, resolved on first use.
ELSEWHERE: dict[str, dict[str, tuple[str, ...]]] = {
    "adamss": {"peft.compat.callbacks": ("AdamssAsaCallback",)},
    "adaption_prompt": {
        "peft.compat.attention": (
            "ModelTypeConfig",
            "TRANSFORMERS_MODEL_CONFIG",
            "compute_query_states",
            "gpt2_compute_query_states",
            "is_adaption_prompt_trainable",
            "llama_compute_query_states",
            "llama_apply_rotary_pos_emb",
            "llama_rotate_half",
        )
    },
    "lora": {
        "peft.compat.lora_variant": ("LoraVariant",),
        "peft.compat.parameters": ("_LoraParameterProxy",),
        "peft.core.layer.layer": ("check_adapters_to_merge",),
    },
    "osf": {"peft.compat.helpers": ("decompose_weight_matrix", "project_gradient_to_orthogonal_space")},
    "shadow": {"peft.compat.shadow": ("DetachedShadowModel", "ShadowCache", "ShadowCarrier")},
}

# What decided which class of layer a module gets, as ``dispatch_gptq(target, name, config)``.
DISPATCHERS = {
    "dispatch_aqlm": "aqlm",
    "dispatch_awq": "awq",
    "dispatch_bnb_4bit": "Linear4bit",
    "dispatch_bnb_8bit": "Linear8bitLt",
    "dispatch_default": None,
    "dispatch_eetq": "eetq",
    "dispatch_gptq": "gptq",
    "dispatch_hqq": "hqq",
    "dispatch_inc": "neural_compressor",
    "dispatch_megatron": "megatron",
    "dispatch_torchao": "torchao",
    "dispatch_transformer_engine": "transformer_engine",
}


def alias_submodules(module: ModuleType) -> None:
    """Answer for the parts of a method that are no files of their own with ``module``, which holds its layer.

    The import system looks into ``sys.modules`` again after it has imported the parent, so this is all it takes.
    """
    parent, _, name = module.__name__.rpartition(".")
    package = parent if name in PARTS else module.__name__  # a method may be a package, with a file for its layer
    method = package.rpartition(".")[2]
    for part in (*PARTS, *MORE_PARTS.get(method, ())):
        if sys.modules.setdefault(f"{package}.{part}", module) is module:
            vars(sys.modules[package]).setdefault(part, module)
    for old, cls in _old_classes(method, module).items():
        if old in OLD_LAYER_NAMES.get(method, ()):
            cls.__name__ = cls.__qualname__ = old  # what a printed model and a status report show
        for holder in (module, sys.modules[package]):
            vars(holder).setdefault(old, cls)
    for holder in {sys.modules[name] for name in (package, *(f"{package}.{part}" for part in PARTS))}:
        vars(holder)["__getattr__"] = lazy_module(holder.__name__, ELSEWHERE.get(method, {}), homes=HOMES)[0]


def _old_classes(method: str, module: ModuleType) -> dict[str, Any]:
    names = vars(module)
    found: dict[str, Any] = {old: names[now] for old, now in OLD_LAYER_NAMES.get(method, {}).items()}
    for old, library in OF_LIBRARY.get(method, {}).items():
        found[old] = OfLibrary(old, names["Linear"], library)
    if method == "lora":
        found |= {name: _dispatcher(names["Linear"].__mro__[1], library) for name, library in DISPATCHERS.items()}
    return found


def is_of_library(base: nn.Module, library: str | None) -> bool:
    """Whether a base layer is kept by, or comes from, a library; None: whether it is plain."""
    kind = kind_of(base)
    storage = None if kind is None else storage_of(base, kind.weight)
    if library is None:
        return storage is not None and storage.name is None
    return (storage is not None and library in (storage.name, storage.layer_name)) or is_from(base, library)


class OfLibrary(type):
    """A class of adapted layers that is told by the base layer: ``isinstance(layer, GPTQLoraLinear)``.

    Calling it makes the method's ordinary layer.
    """

    layer_cls: type
    library: str

    def __new__(mcs, name: str, layer_cls: type, library: str) -> OfLibrary:
        doc = f"``{layer_cls.__name__}`` over a base layer of {library}."
        return super().__new__(mcs, name, (layer_cls,), {"__module__": layer_cls.__module__, "__doc__": doc})

    def __init__(cls, name: str, layer_cls: type, library: str) -> None:
        super().__init__(name, (layer_cls,), {})
        cls.layer_cls, cls.library = layer_cls, library

    def __instancecheck__(cls, instance: Any) -> bool:
        method = cls.layer_cls.__mro__[1]
        return issubclass(type(instance), method) and is_of_library(instance.get_base_layer(), cls.library)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.layer_cls(*args, **kwargs)


def _dispatcher(layer_cls: Any, library: str | None) -> Any:
    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        theirs = is_of_library(innermost(target), library)
        return new_layer(layer_cls, target, adapter_name, config) if theirs else None

    dispatch.__doc__ = f"An adapted layer around ``target`` if it is {library or 'plain'}, else None."
    return dispatch


def new_layer(
    layer_cls: Any, target: nn.Module, adapter_name: str, config: Any, current_key: str = "", **given: Any
) -> nn.Module:
    """A method's layer around a module, of the class for its kind and storage, with one adapter that is active.

    Args:
        given: fields of the config as they are for this module, whatever its patterns say.

    Raises:
        ValueError: if the method cannot adapt such a module.
    """
    base = innermost(target)
    kind = kind_of(base)
    if kind is None:
        raise ValueError(f"Target module {type(base).__name__} is no kind of layer that {layer_cls.__name__} adapts.")
    name = storage_of(base, kind.weight).layer_name or kind.name
    cls = layer_cls.by_name[name if name in layer_cls.by_name else kind.name]
    return cls(target, adapter_name, config, current_key=current_key, **given)

"""How modules keep their weights. A storage is registered once and serves every method, kind and operation."""

import torch
from torch import nn

from peft.core.base.storage.bitsandbytes import BitsAndBytes4bit, BitsAndBytes8bit
from peft.core.base.storage.forward_only import AQLM, AWQ, EETQ, GPTQ, ForwardOnly
from peft.core.base.storage.hqq import HQQ
from peft.core.base.storage.offloaded import (
    Offloaded,
    copied,
    hooks_of,
    offloading_hook,
    onloaded,
    without_hooks,
)
from peft.core.base.storage.parametrized import HookedNorm, Parametrized, weight_names
from peft.core.base.storage.plain import Plain, Storage, plain_tensors
from peft.core.base.storage.quantized import Quantized, is_from
from peft.core.base.storage.quanto import Quanto
from peft.core.base.storage.sharded import FSDP1, Distributed, ZeRO3
from peft.core.base.storage.torchao import TorchAO


_STORAGES: list[Storage] = [
    BitsAndBytes4bit(),
    BitsAndBytes8bit(),
    HQQ(),
    Quanto(),
    TorchAO(),
    GPTQ(),
    AWQ(),
    EETQ(),
    AQLM(),
    Parametrized(),
    HookedNorm(),
    FSDP1(),
    Distributed(),
    ZeRO3(),
    Plain(),  # takes whatever is left
]


_PLAIN = _STORAGES[-1]
_OFFLOADED: dict[Storage, Offloaded] = {}
_LINEARS: dict[type, Storage | None] = {}


def register_storage(storage: Storage) -> None:
    """Add a storage; it is asked before those registered earlier. Open to third parties."""
    _STORAGES.insert(0, storage)
    _LINEARS.clear()


def storage_of(m: nn.Module, attribute: str) -> Storage:
    """The storage that keeps ``m.<attribute>``."""
    found = _inside(m, attribute)
    if "_hf_hook" in m.__dict__ and attribute in m._parameters and offloading_hook(m) is not None:
        return _OFFLOADED.setdefault(found, Offloaded(found))
    return found


def device_of(m: nn.Module) -> torch.device:
    """Where a module computes with its weight, which may be kept elsewhere meanwhile."""
    device, _ = storage_of(m, "weight").device_and_dtype(m, "weight")
    return m.weight.device if device is None else device


def _inside(m: nn.Module, attribute: str) -> Storage:
    own = type(m).__module__.startswith("torch.nn.") and type(m._parameters.get(attribute)) is nn.Parameter
    for storage in _STORAGES:
        if not (own and storage.own_classes) and storage.matches(m, attribute):
            return storage
    return _PLAIN


def keep_differentiable(model: nn.Module) -> None:
    """Let gradients through every weight of a model, see :meth:`Storage.keep_differentiable`."""
    for m in model.modules():
        if "weight" in m._parameters:
            _inside(m, "weight").keep_differentiable(m)


def storage_key(m: nn.Module, attribute: str) -> tuple:
    """What :func:`storage_of` depends on: as long as this stays equal, a module's storage is the same.

    Asked in each forward, so it computes no weight and looks at no values.
    """
    own = m.__dict__
    weight = own["_parameters"].get(attribute)
    hook = own.get("_hf_hook")
    # DeepSpeed marks a parameter in place; weight norms and pruning come as hooks before the forward.
    return type(m), type(weight), hook, hasattr(weight, "ds_id"), len(own["_forward_pre_hooks"])


def untrainable(module: nn.Module) -> str | None:
    """Why a copy of a module cannot be trained, or None: codes of a quantised weight have no gradient."""
    for path, m in module.named_modules():
        for name in ("weight", *weight_names(m)):
            storage = storage_of(m, name)
            if storage.name is not None:
                where = f" of its {path!r}" if path else ""
                return (
                    f"the {name}{where} is quantised ({storage.name}), and such a weight cannot be trained. Leave the "
                    "module out, or keep it dense when the model is loaded (llm_int8_skip_modules of "
                    "BitsAndBytesConfig, modules_to_not_convert of others)"
                )
    return None


def foreign_linear(m: nn.Module) -> Storage | None:
    """The storage of a library whose class is a linear layer but no ``nn.Linear``; None for other modules."""
    cls = type(m)
    if cls not in _LINEARS:
        found = (s for s in _STORAGES if any(is_from(m, package, name) for package, name in s.linears))
        _LINEARS[cls] = next(found, None)
    return _LINEARS[cls]


__all__ = [
    "ForwardOnly",
    "Plain",
    "Quantized",
    "Storage",
    "copied",
    "keep_differentiable",
    "foreign_linear",
    "hooks_of",
    "onloaded",
    "plain_tensors",
    "register_storage",
    "storage_key",
    "storage_of",
    "untrainable",
    "weight_names",
    "without_hooks",
]

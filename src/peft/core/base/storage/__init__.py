"""How modules keep their weights. A storage is registered once and serves every method, kind and operation."""

from torch import nn

from peft.core.base.storage.aqlm import AQLM
from peft.core.base.storage.awq import AWQ
from peft.core.base.storage.bitsandbytes import BitsAndBytes4bit, BitsAndBytes8bit
from peft.core.base.storage.eetq import EETQ
from peft.core.base.storage.gptq import GPTQ
from peft.core.base.storage.hqq import HQQ
from peft.core.base.storage.plain import Plain, Storage
from peft.core.base.storage.quantized import ForwardOnly, Quantized, is_from
from peft.core.base.storage.quanto import Quanto
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
    Plain(),
]


_PLAIN = _STORAGES[-1]
_LINEARS: dict[type, Storage | None] = {}


def register_storage(storage: Storage) -> None:
    """Add a storage; it is asked before those registered earlier. Open to third parties."""
    _STORAGES.insert(0, storage)
    _LINEARS.clear()


def storage_of(m: nn.Module, attribute: str) -> Storage:
    """The storage that keeps ``m.<attribute>``."""
    own = type(m).__module__.startswith("torch.nn.") and type(m._parameters.get(attribute)) is nn.Parameter
    for storage in _STORAGES:
        if not (own and storage.own_classes) and storage.matches(m, attribute):
            return storage
    return _PLAIN


def foreign_linear(m: nn.Module) -> Storage | None:
    """The storage of a library whose class is a linear layer but no ``nn.Linear``; None for other modules."""
    cls = type(m)
    if cls not in _LINEARS:
        found = (s for s in _STORAGES if any(is_from(m, package, name) for package, name in s.linears))
        _LINEARS[cls] = next(found, None)
    return _LINEARS[cls]


__all__ = ["ForwardOnly", "Plain", "Quantized", "Storage", "foreign_linear", "register_storage", "storage_of"]

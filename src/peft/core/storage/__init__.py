"""How modules keep their weights. A storage is registered once and serves every method, kind and operation."""

from torch import nn

from peft.core.storage.plain import Plain, Storage


_STORAGES: list[Storage] = [Plain()]


def register_storage(storage: Storage) -> None:
    """Add a storage; it is asked before those registered earlier. Open to third parties."""
    _STORAGES.insert(0, storage)


def storage_of(m: nn.Module, attribute: str) -> Storage:
    """The storage that keeps ``m.<attribute>``."""
    return next(storage for storage in _STORAGES if storage.matches(m, attribute))


__all__ = ["Plain", "Storage", "register_storage", "storage_of"]

"""Weights that accelerate's hooks keep elsewhere between two calls, on the CPU or on disk, and ``meta`` in the module.

Works around any other storage: the tensors are brought in, the inner storage does its part, and what it has changed
goes back to where the hook takes it from. accelerate is not imported: its hooks are known by what they have.
"""

from __future__ import annotations

import copy
import os
import tempfile
import types
import weakref
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from peft.core.base.storage.plain import Storage
from peft.core.base.storage.sharded import is_dtensor, whole
from peft.kernels.autocast import is_autocast


def offloading_hook(m: nn.Module) -> Any:
    """accelerate's hook that keeps the tensors of a module elsewhere, also within a ``SequentialHook``; else None."""
    hooks = [m.__dict__.get("_hf_hook")]
    for hook in hooks:  # it grows: some hold others
        if getattr(hook, "offload", False) and hasattr(hook, "weights_map"):
            return hook
        hooks += getattr(hook, "hooks", ())
    return None


@contextmanager
def onloaded(m: nn.Module) -> Iterator[None]:
    """A context in which the tensors of a module are where it computes; nothing is done where they are there."""
    hook = offloading_hook(m)
    if hook is None or not any(t.is_meta for t in (*m._parameters.values(), *m._buffers.values()) if t is not None):
        yield
        return
    hook.pre_forward(m)
    try:
        yield
    finally:
        hook.post_forward(m, None)


def copied(module: nn.Module) -> nn.Module:
    """A deep copy of a module with its tensors where it computes, without accelerate's hooks."""
    memo = hooks_of(module)
    parts = {  # neither kind of part is one that deepcopy can copy
        id(p): nn.Parameter(whole(p) if hasattr(p, "ds_id") else p.detach().clone(), p.requires_grad)
        for p in module.parameters()
        if is_dtensor(p) or hasattr(p, "ds_id")
    }
    with ExitStack() as stack:
        for m in module.modules() if memo else ():
            stack.enter_context(onloaded(m))
        duplicate = without_hooks(copy.deepcopy(module, {**memo, **parts})) if memo else copy.deepcopy(module, parts)
    for old, new in zip(module.modules(), duplicate.modules()):
        if isinstance(forward := new.__dict__.get("forward"), types.FunctionType) and forward.__closure__:
            new.__dict__["forward"] = _for_copy(forward, old, new)
    return duplicate


def _for_copy(forward: types.FunctionType, old: nn.Module, new: nn.Module) -> types.FunctionType:
    """A function around a module's forward, as transformers' tensor parallelism puts one, for the module's copy."""

    def moved(value: Any) -> Any:
        if getattr(value, "__self__", None) is old:
            return types.MethodType(value.__func__, new)
        return new if value is old else value

    cells = tuple(types.CellType(moved(cell.cell_contents)) for cell in forward.__closure__ or ())
    return types.FunctionType(forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, cells)


def hooks_of(module: nn.Module) -> dict[int, Any]:
    """A memo for ``deepcopy`` that spares accelerate's hooks: they hold the weights of the whole model."""
    return {id(hook): hook for m in module.modules() if (hook := m.__dict__.get("_hf_hook")) is not None}


def without_hooks(duplicate: nn.Module) -> nn.Module:
    """Take accelerate's hooks off a copy, which leaves the tensors and the hooks as they are."""
    for m in duplicate.modules():
        if m.__dict__.pop("_hf_hook", None) is not None:
            forward = m.__dict__.pop("_old_forward")
            del m.__dict__["forward"]
            if getattr(forward, "__func__", None) is not type(m).forward:
                m.__dict__["forward"] = forward
    return duplicate


class Offloaded(Storage):
    """A weight of another storage, kept by a hook of accelerate."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.name, self.layer_name, self.slots = inner.name, inner.layer_name, inner.slots  # type: ignore[misc]
        self.can_read, self.can_write, self.lossless = inner.can_read, inner.can_write, inner.lossless
        self.linears = inner.linears  # type: ignore[misc]

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        with onloaded(m):
            return self.inner.read(m, attribute)

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        with onloaded(m):
            before = _tensors(m)
            self.inner.write(m, attribute, value, shared=True)  # what the hook brings may be another module's as well
            for name, tensor in _tensors(m).items():
                if tensor is not before.get(name):
                    _store(offloading_hook(m), name, tensor)

    def keep(self, m: nn.Module, attribute: str) -> Any:
        hook = offloading_hook(m)
        entries = {name: _entry(hook, name) for name in _tensors(m)}
        return self.inner.keep(m, attribute), {name: entry for name, entry in entries.items() if entry is not None}

    def put_back(self, m: nn.Module, attribute: str, kept: Any) -> None:
        inside, entries = kept
        self.inner.put_back(m, attribute, inside)
        for name, entry in entries.items():
            _put_entry(offloading_hook(m), name, entry)

    def call(self, m: nn.Module, tensors: Mapping[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        hook, wrapped = m._hf_hook, m.__dict__["forward"]  # the hook would put its own tensors over the given ones
        args, kwargs = hook.pre_forward(m, *args, **kwargs)
        m.__dict__["forward"] = m.__dict__["_old_forward"]
        try:
            with torch.no_grad() if hook.no_grad else nullcontext():
                output = self.inner.call(m, tensors, args, kwargs)
        # What the hook brought has to go on an error too; otherwise it is given the output, hence no `finally`.
        except BaseException:
            hook.post_forward(m, None)
            raise
        finally:
            m.__dict__["forward"] = wrapped
        return hook.post_forward(m, output)

    def unwritable(self, m: nn.Module, attribute: str) -> str | None:
        with onloaded(m):
            return self.inner.unwritable(m, attribute)

    def compute_dtype(self, m: nn.Module, attribute: str) -> torch.dtype | None:
        return self.inner.compute_dtype(m, attribute)

    def holds_updates_exactly(self, m: nn.Module, attribute: str) -> bool:
        device = self.device_and_dtype(m, attribute)[0]
        return self.inner.holds_updates_exactly(m, attribute) and not (device and is_autocast(device.type))

    def tensors(self, m: nn.Module, attribute: str) -> list[torch.Tensor]:
        return self.inner.tensors(m, attribute)

    def device_and_dtype(self, m: nn.Module, attribute: str) -> tuple[torch.device | None, torch.dtype | None]:
        device = offloading_hook(m).execution_device
        return None if device is None else torch.device(device), self.inner.device_and_dtype(m, attribute)[1]

    def linear_shape(self, m: nn.Module) -> tuple[int, int]:
        return self.inner.linear_shape(m)


def _tensors(m: nn.Module) -> dict[str, torch.Tensor]:
    """The module's own tensors, by attribute."""
    return {name: t for name, t in (*m._parameters.items(), *m._buffers.items()) if t is not None}


# --- the map from which a hook takes its tensors --------------------------------------------------------------


class _File(dict):
    """An entry of accelerate's index for a tensor in a file of its own, which goes when no one has the entry."""


def _place(hook: Any, name: str) -> tuple[Any, str]:
    """The innermost map, and the name there: ``PrefixedDataset`` puts a prefix before it."""
    mapping = hook.weights_map
    while hasattr(mapping, "dataset") and hasattr(mapping, "prefix"):
        mapping, name = mapping.dataset, mapping.prefix + name
    return mapping, name


def _is_loader(mapping: Any) -> bool:
    """Whether the map is an ``OffloadedWeightsLoader``: tensors in memory, which win, and an index of files."""
    return all(isinstance(getattr(mapping, part, None), MutableMapping) for part in ("state_dict", "index"))


def _entry(hook: Any, name: str) -> list[Any] | None:
    """What the map holds under a name, as it holds it; None for what the hook does not keep."""
    mapping, key = _place(hook, name)
    parts = (mapping.state_dict, mapping.index) if _is_loader(mapping) else (mapping,)
    return [part.get(key) for part in parts] if any(key in part for part in parts) else None


def _put_entry(hook: Any, name: str, entry: list[Any]) -> None:
    """Put what :func:`_entry` gave, or a new entry of that form, where the hook finds it at the next call."""
    mapping, key = _place(hook, name)
    # A map that cannot be written: what changes goes into one of the hook's own, in front of it.
    if not _is_loader(mapping) and not isinstance(mapping, MutableMapping):
        mapping, key = ChainMap({}, hook.weights_map), name
        hook.weights_map = mapping
    for part, value in zip((mapping.state_dict, mapping.index) if _is_loader(mapping) else (mapping,), entry):
        if value is not None:
            part[key] = value
        else:
            part.pop(key, None)


def _store(hook: Any, name: str, tensor: torch.Tensor) -> None:
    """A new tensor in the map: in memory, or in a new file where the map reads files from a folder of its own.

    The files that are there stay as they are: they may be the model's, or be read again in another session.
    """
    mapping, key = _place(hook, name)
    tensor = tensor.detach().cpu()
    if not _is_loader(mapping):
        return _put_entry(hook, name, [tensor])
    old, folder = mapping.index.get(key), mapping.save_folder
    if old is None or type(tensor) is not torch.Tensor or not (folder and os.access(folder, os.W_OK)):
        return _put_entry(hook, name, [tensor, old])
    handle, path = tempfile.mkstemp(".safetensors", "merged-", folder)
    os.close(handle)
    save_file({key: tensor.contiguous()}, path)
    entry = _File(safetensors_file=path, weight_name=key)
    weakref.finalize(entry, _remove, path)
    return _put_entry(hook, name, [None, entry])


def _remove(path: str) -> None:
    with suppress(OSError):  # the folder may be gone already
        os.remove(path)

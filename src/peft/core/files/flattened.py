"""Parameters that FSDP 1 has put into flat ones, as state dicts know them: whole, and where the module has them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peft.core.base.storage.sharded import is_fsdp1
from peft.core.model.walk import passed_through, plain


Places = dict[tuple[nn.Module, str], nn.Parameter]


@contextmanager
def standing_in(model: nn.Module, places: Places) -> Iterator[None]:
    """Within this context modules have these parameters for those they have else, and not the flat ones."""
    if not _is_spread():
        yield
        return
    flat = [(m, p) for m in model.modules() if (p := m._parameters.pop("_flat_param", None)) is not None]
    before = [(module, name, module._parameters.get(name), module.__dict__.pop(name, None)) for module, name in places]
    for (module, name), parameter in places.items():
        module._parameters[name] = parameter
    try:
        yield
    finally:
        for module, name, parameter, view in before:
            if parameter is None:
                del module._parameters[name]
            else:
                module._parameters[name] = parameter
            if view is not None:
                module.__dict__[name] = view
        for module, parameter in flat:
            module._parameters["_flat_param"] = parameter


def taken_out(model: nn.Module, state_dict: Mapping[str, Any]) -> Places:
    """Empty parameters for those of a state dict that modules lack: ``use_orig_params=False`` takes them out."""
    # torch's own mark for its compiler; the unit may be further out than the model that is given
    marked = [
        (plain(path), module)
        for path, module in (model.named_modules() if _is_spread() else ())
        if module.__dict__.get("_fsdp_use_orig_params") is False and not passed_through(module)
    ]
    given: dict[str, dict[str, Any]] = {}
    for key, value in state_dict.items() if marked else ():
        path, _, name = plain(key).rpartition(".")
        given.setdefault(path, {})[name] = value
    return {
        (module, name): nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
        for path, module in marked
        for name, value in given.get(path, {}).items()
        if name not in module._parameters and name not in module._buffers
    }


@contextmanager
def filling_units(model: nn.Module) -> Iterator[None]:
    """Within this context parameters in units of FSDP 1 are whole and on the meta device.

    What is put in their place is written into the units on leaving, one gathered at a time. All processes have to put
    the same there.
    """
    wrappers = [module for module in model.modules() if is_fsdp1(module)] if _is_spread() else []
    units = {wrapper: _parameters_of(wrapper) for wrapper in wrappers}
    places = {place: parameter for own in units.values() for place, parameter in own.items()}
    with standing_in(model, places):
        yield
        put = {place: place[0]._parameters[place[1]] for place in places}
    for wrapper, own in units.items():
        changed = [place for place in own if not put[place].is_meta]
        if changed or wrapper is wrappers[0]:  # the outermost first: an inner one would take itself for it
            whole = sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel.summon_full_params
            with whole(wrapper, recurse=False, writeback=bool(changed)), torch.no_grad():
                for module, name in changed:
                    getattr(module, name).copy_(put[module, name])


def _is_spread() -> bool:
    """Whether there can be any unit: a look at each module of a large model costs more than a small adapter."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _parameters_of(wrapper: Any) -> Places:
    """An empty parameter for each that a wrapper holds itself; one that several modules share is one."""
    found: Places = {}
    if wrapper._handle is None:
        return found
    flat = wrapper._handle.flat_param
    for (name, module, _), shape in zip(flat._param_infos, flat._shapes):
        own = module._parameters.get(name, flat)  # in the module, if with use_orig_params
        empty = torch.empty(shape, dtype=flat.dtype, device="meta")
        found[module, name] = nn.Parameter(empty, requires_grad=own.requires_grad)
    for name, module, _, first, holder, _ in flat._shared_param_infos:
        found[module, name] = found[holder, first]
    return found

"""The state dict of the base model under an adapted one, with the names that it had before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from peft.core.files.entries import anatomy
from peft.core.layer.weight import taken_out
from peft.core.model.auxiliary import biases_of
from peft.core.model.walk import join, layers_of, walk
from peft.errors import CheckpointError, nearest, some


class IncompatibleKeys(NamedTuple):
    """Names that the model has and the state dict lacks, and the other way round."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Place(NamedTuple):
    """A tensor of the base model: its name there, and where it is."""

    name: str
    module: nn.Module
    attribute: str
    tensor: torch.Tensor


def _places(root: nn.Module) -> Iterator[_Place]:
    """The parameters and persistent buffers of the base model; a tied tensor once for each of its names."""
    shared = {id(getattr(layer, name, None)) for _, layer in layers_of(root) for name in layer.adapter_cls.common}
    for site in walk(root, repeated=True):
        # What layers share hangs on the model, and is none of its own.
        if id(site.module) in shared:
            continue
        module = site.module
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and attribute not in module._non_persistent_buffers_set:
                yield _Place(join(site.key, attribute), module, attribute, tensor)


@contextmanager
def _bare(root: nn.Module) -> Iterator[bool]:
    """The base model without what is merged into it, and without trained biases; says whether anything was merged."""
    record = biases_of(root)
    with taken_out(layer for _, layer in layers_of(root)) as merged, record.set_aside() if record else nullcontext():
        yield merged


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's tensors under the names of the unadapted model, as its own ``state_dict`` would give them.

    What adapters have changed (merged weights, trained biases) is given as it was before.

    Args:
        model: a :class:`PeftModel`, or any module with adapters.

    Returns:
        name -> detached tensor; it shares the model's memory unless adapters are merged.

    Examples:
        >>> sorted(get_base_model_state_dict(model))[0]
        'lm_head.weight'
    """
    root = anatomy(model)[0]
    with torch.no_grad(), _bare(root) as copied:
        return {p.name: p.tensor.detach().clone() if copied else p.tensor.detach() for p in _places(root)}


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> IncompatibleKeys:
    """Fill the base model, under its adapters, from a state dict with the names of the unadapted model.

    Args:
        strict: insist that names agree. A tied tensor may be given under one of its names.

    Returns:
        The names that the state dict lacks, and those that the model does not know.

    Raises:
        RuntimeError: if names (with ``strict``) or shapes do not agree; the model is then unchanged.

    Examples:
        >>> state = get_base_model_state_dict(model)
        >>> set_base_model_state_dict(model, state)
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
    """
    root = anatomy(model)[0]
    with torch.no_grad(), _bare(root):
        places = list(_places(root))
        given = {id(place.tensor) for place in places if place.name in state_dict}
        known = {place.name for place in places}
        missing = [place.name for place in places if id(place.tensor) not in given]
        unexpected = [name for name in state_dict if name not in known]
        wrong = [
            f"{place.name}: {list(state_dict[place.name].shape)} given, {list(place.tensor.shape)} in the model"
            for place in places
            if place.name in state_dict and state_dict[place.name].shape != place.tensor.shape
        ]
        if wrong:
            raise CheckpointError(f"size mismatch for {'; '.join(wrong[:5])}. Nothing was loaded.")
        if strict and (missing or unexpected):
            raise CheckpointError(_disagreement(root, missing, unexpected, known))
        for place in places:
            if place.name in state_dict:
                _fill(place, state_dict[place.name])
    return IncompatibleKeys(missing, unexpected)


def _disagreement(root: nn.Module, missing: list[str], unexpected: list[str], known: set[str]) -> str:
    parts = [f"the state dict does not fit the base model {type(root).__name__}; nothing was loaded."]
    if missing:
        parts.append(f"It lacks {some(missing)}.")
    if unexpected:
        parts.append(f"Not in the model: {some(unexpected)}.{nearest(unexpected[0], known)}")
    return " ".join([*parts, "Names are those of the model before adapters; strict=False loads what fits."])


def _fill(place: _Place, value: torch.Tensor) -> None:
    if not place.tensor.is_meta:
        place.tensor.copy_(value)
    elif place.attribute in place.module._parameters:
        parameter = nn.Parameter(value, requires_grad=place.tensor.requires_grad)
        place.module._parameters[place.attribute] = parameter
    else:
        place.module._buffers[place.attribute] = value

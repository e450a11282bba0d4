"""A guard against calls of a model whose active adapters have no values yet.

On the CPU some products with tensors on the meta device do not fail: they return what happens to be in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peft.core.model.walk import layers_of
from peft.errors import CheckpointError, ConfigError


@contextmanager
def values_needed(config: Any) -> Iterator[None]:
    """A context in which an adapter that is made of weights without values raises an error that says so."""
    try:
        yield
    except NotImplementedError as error:
        if "meta tensor" not in str(error):  # torch's words for reading a tensor without values
            raise
        raise ConfigError(
            f"{type(config).__name__} makes the adapter of the base weights, which have no values yet (they are on "
            "the meta device). Load them first."
        ) from error


def refuse_unfilled(model: nn.Module) -> None:
    """From now on, and until all adapters are filled, calling the model with an active one that is not raises."""
    if "_peft_unfilled" not in model.__dict__:
        model.__dict__["_peft_unfilled"] = model.register_forward_pre_hook(_check)


def _check(model: nn.Module, args: Any) -> None:
    left = False
    for path, layer in layers_of(model):
        if all(p.is_meta for p in layer.get_base_layer().parameters()):
            continue  # a model on the meta device computes shapes, with adapters as without
        for name, adapter in layer.adapters.items():
            if any(tensor.is_meta for _, tensor in adapter.tensors()):  # the frozen ones too
                left = True
                if name in layer.active_adapters and not layer.disable_adapters:
                    raise CheckpointError(
                        f"adapter {name!r} has no values in {path!r} (low_cpu_mem_usage): load all its tensors with "
                        "set_peft_model_state_dict, whose result names those that are missing, before calling the "
                        "model; or disable or delete the adapter."
                    )
    if not left:
        model.__dict__.pop("_peft_unfilled").remove()

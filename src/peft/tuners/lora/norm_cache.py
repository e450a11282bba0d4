"""The norms of DoRA's weights, kept between calls of a model that does not train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn


class DoraCaching:
    """A context in which evaluation keeps ``|W + dW|`` of each DoRA layer instead of computing it in each call.

    The norm takes a product of W and A, most of what DoRA costs beyond LoRA in a short step, and one number for each
    output feature. It is computed anew after any of its tensors has changed, and never kept in training.

    Examples:
        >>> with DoraCaching():
        ...     model.generate(**inputs)
        >>> caching = DoraCaching()
        >>> caching(enabled=True)  # from here on, until caching(enabled=False)
    """

    active: ClassVar[bool] = False

    def __init__(self, enabled: bool = True) -> None:
        self.enabled, self.before = enabled, False

    def __call__(self, enabled: bool = True) -> None:
        """Switch it on or off for good."""
        DoraCaching.active = self.enabled = enabled

    def __enter__(self) -> DoraCaching:
        self.before, DoraCaching.active = DoraCaching.active, self.enabled
        return self

    def __exit__(self, *error: Any) -> None:
        DoraCaching.active = self.before


def stamp_of(tensors: Iterable[torch.Tensor]) -> tuple:
    """What changes when one of the tensors does."""
    # Inference tensors have no version.
    return tuple((t.data_ptr(), t.dtype, None if t.is_inference() else t._version) for t in tensors)


def remembered(
    holder: nn.Module, tensors: Sequence[torch.Tensor], scaling: Any, make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What ``make`` computes from these tensors and the scaling; what it gave last, if nothing has changed since.

    Args:
        holder: the module that keeps it, and says by ``training`` whether it may.
    """
    state = holder.__dict__
    if holder.training or not DoraCaching.active:
        state.pop("_remembered", None)
        return make()
    stamp = float(scaling), *stamp_of(tensors)
    if "_remembered" not in state or state["_remembered"][0] != stamp:
        state["_remembered"] = stamp, make().detach()
    return state["_remembered"][1]

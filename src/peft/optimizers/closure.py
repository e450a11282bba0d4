"""What a step of an optimizer does with a closure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """The loss that a closure computes along with its gradients, None where a step is given no closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()

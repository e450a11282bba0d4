"""Whether mixed precision is switched on for a device, asked in a way that every device answers."""

from __future__ import annotations

import torch


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on; the meta device, on which shapes are computed and nothing else, knows none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)

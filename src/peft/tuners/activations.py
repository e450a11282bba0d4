"""The activations that a config can name: those of transformers."""

from __future__ import annotations

from torch import nn

from peft.errors import ConfigError, nearest


def activation(name: str, field: str) -> nn.Module:
    """A non-linearity by its name in transformers.

    Args:
        field: what the error calls it, such as ``"PeanutConfig: act_fn"``.

    Raises:
        ConfigError: there is none of that name.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(f"{field}={name!r} is no activation of transformers.{nearest(name, ACT2FN)}")
    return ACT2FN[name]

"""Backends of quantised weights, at the path at which others import it."""

from peft._lazy import also_known
from peft.compat.quantization import *  # noqa: F403


also_known(__name__)

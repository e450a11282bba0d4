"""The exceptions of the package, at the path at which others import them."""

from peft.errors import *  # noqa: F403

"""The names of methods and tasks, at the path at which others import them."""

from peft.peft_types import *  # noqa: F403

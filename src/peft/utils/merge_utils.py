"""Merging of task tensors, at the path at which others import it."""

from peft._lazy import also_known
from peft.kernels.task_tensors import *  # noqa: F403


also_known(__name__)

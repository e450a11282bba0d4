"""What others read on a :class:`PeftModel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.compat.asked import Asked
from peft.model_mixin import ModelMixin


class ModelCompat(ModelMixin):
    """A mixin of ``PeftModel``."""

    @Asked
    def base_model_prepare_inputs_for_generation(self) -> Callable[..., Any] | None:
        """The base model's own preparation of a step of generation. Subclasses of others set it, and call it."""
        return None if isinstance(self, type) else self.get_base_model().prepare_inputs_for_generation

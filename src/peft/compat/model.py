"""What others read on a :class:`PeftModel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ModelCompat:
    """A mixin of ``PeftModel``."""

    get_base_model: Any

    @property
    def base_model_prepare_inputs_for_generation(self) -> Callable[..., Any]:
        """The base model's own preparation of a step of generation."""
        return self.get_base_model().prepare_inputs_for_generation

    @property
    def _is_prompt_learning(self) -> bool:
        """Whether the active adapter is a prompt."""
        return self.is_prompt_learning  # type: ignore[attr-defined]

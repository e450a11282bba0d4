"""The config of a composition: an adapter that is made of others, with a name and a folder of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft.composition.expressions import from_dict
from peft.config import ModulesToSave, option
from peft.core.composition import Composition
from peft.errors import ConfigError
from peft.peft_types import CONFIGS_OF_NO_METHOD


@dataclass
class CompositionConfig(ModulesToSave):
    """Config of an adapter that is made of others of the model: of what, as an expression.

    It is saved beside the adapters that it is made of, which have folders of their own. ``model.add_composition`` and
    ``model.set_adapter`` make it.
    """

    METHOD: ClassVar[str] = "COMPOSITION"

    expression: Any = option(None, "What it is made of: Stack('a', 'b') and the like, or the dict that a file has.")
    passing: bool = option(
        False, "It was made for one set_adapter, and goes with the next one; not saved.", transient=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.expression, Composition):
            try:
                self.expression = from_dict(self.expression)
            except TypeError as error:
                raise ConfigError(f"CompositionConfig: expression={self.expression!r} ({error}).") from error

    @property
    def members(self) -> list[Any]:
        """None: it is of no method itself."""
        return []

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "expression": self.expression.to_dict()}


CONFIGS_OF_NO_METHOD[CompositionConfig.METHOD] = CompositionConfig

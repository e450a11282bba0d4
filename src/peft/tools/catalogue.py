"""The registered methods, described by their modules and configs: what the docs' page and `peft methods` say."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """A registered method: its name in small letters, the class of its config, that of its tuner."""

    key: str
    config: type
    tuner: type

    @property
    def words(self) -> list[str]:
        """Name, formula and paper: the first paragraph of the method's module, without the name."""
        module = sys.modules[self.tuner.__module__]
        package = sys.modules.get(module.__name__.rpartition(".")[0])
        inner = package is not None and package.__name__.count(".") > 1
        text = inspect.cleandoc((package if inner else module).__doc__ or "")
        name, _, formula = text.partition(": ")
        return [name, formula]

    def fields(self) -> tuple[list[Any], list[Any]]:
        """The config's own fields, and those it has from the classes that configs are composed of."""
        common = {name for cls in self.config.__mro__ if cls.__module__ == "peft.config" for name in _declared(cls)}
        fields = dataclasses.fields(self.config)
        return [f for f in fields if f.name not in common], [f for f in fields if f.name in common]


def methods() -> list[Method]:
    """All registered methods by name, the most used one first."""
    import peft.tuners  # noqa: F401
    from peft.utils.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    found = [
        Method(str(getattr(key, "value", key)).lower(), config, PEFT_TYPE_TO_TUNER_MAPPING[key])
        for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    ]
    return sorted(found, key=lambda entry: (entry.key != "lora", entry.words[0].lower().strip("(")))


def default_of(field: Any) -> Any:
    """What a field of a config is where nothing is said, as a plain value."""
    if field.default is not dataclasses.MISSING:
        return getattr(field.default, "value", field.default)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else ""


def _declared(cls: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.get_annotations(cls).items() if "ClassVar" not in str(value)}

"""The registered methods, described by their modules and configs: what the docs' page and `peft methods` say."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

from peft.options import value_of


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
    """All methods by name, those of other packages included, the most used one first."""
    import peft.tuners  # noqa: F401
    from peft.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, load_outside

    load_outside()
    found = [
        Method(str(value_of(key)).lower(), config, PEFT_TYPE_TO_TUNER_MAPPING[key])
        for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    ]
    # LoRA first, the others by name, (IA)3 among those with I.
    return sorted(found, key=lambda entry: (entry.key != "lora", entry.words[0].lower().strip("(")))


def page(method: Method, example: list[str] | None = None, shared: str = "") -> list[str]:
    """A method's page in Markdown, as lines: what it computes, what it is for, an example, its fields.

    Args:
        example: lines of code. shared: what to say of fields that many methods have, behind their names.
    """
    first, _, rest = inspect.cleandoc(method.config.__doc__ or "").partition("\n\n")
    first = re.sub(r"^Config of [^:.]*[:.] *", "", first.replace("\n", " "))
    name, formula = method.words
    lines = [f"# {name}", "", sentence(formula.replace("*", r"\*")), ""]
    lines += [sentence(first), ""] if first else []
    lines += [rest.replace("``", "`"), ""] if rest else []
    lines += ["```python", *example, "```", ""] if example else []
    own, common = method.fields()
    lines += ["## Fields", ""]
    if own:
        lines += ["| field | default | |", "|---|---|---|", *map(row, own), ""]
    if common:
        lines += [f"Also: {', '.join(f'`{field.name}`' for field in common)}{shared}.", ""]
    return lines


def row(field: Any) -> str:
    """A field of a config as a row of a table."""
    text = field.metadata.get("help", "").replace("|", r"\|").replace("\n", " ")
    return f"| `{field.name}` | `{default_of(field)!r}` | {text} |"


def sentence(text: str) -> str:
    """With a capital letter, where it starts with a word and not with a formula."""
    word = text.partition(" ")[0]
    return text[0].upper() + text[1:] if word.isalpha() and word.islower() else text


def default_of(field: Any) -> Any:
    """What a field of a config is where nothing is said, as a plain value."""
    if field.default is not dataclasses.MISSING:
        return value_of(field.default)
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else ""


def _declared(cls: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.get_annotations(cls).items() if "ClassVar" not in str(value)}

"""Unions: one adapter that is of several methods at once, each with the mathematics of its own.

Ready ones are MAMConfig (arXiv 2110.04366) and UniPELTConfig (arXiv 2110.07577).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.config import ORIGIN, ModulesToSave, PeftConfig, option
from peft.core.model.mixed import MixedModel
from peft.errors import ConfigError, ConfigTypeError, nearest
from peft.peft_types import PEFT_TYPE_TO_MIXED_MODEL_MAPPING, register_peft_method


@dataclass(init=False)
class UnionConfig(ModulesToSave):
    """Config of a union: one name for parts of different methods, which train, act and are saved together.

    For what one method alone cannot do: a prefix for the attention, a bottleneck for the feed-forward network, a LoRA
    for both. It is merged as far as its parts are weights. Parts are given as a list, or each by a name of its own:
    ``UnionConfig(low_rank=LoraConfig(), prefix=PrefixTuningConfig(num_virtual_tokens=10))``. One of them may train
    virtual tokens; two of one method are one config of that method.
    """

    METHOD: ClassVar[str] = "UNION"

    parts: Any = option(dict, "The configs of the parts: a list, or a dict of name -> config.")

    def __init__(self, parts: Any = (), **given: Any) -> None:
        """Take the parts, and the fields of the union.

        Args:
            parts: configs, or name -> config; in a list each has the name of its method. Where several adapt one layer
                the first is the innermost.
            given: fields, and parts by name.

        Raises:
            ValueError: if parts exclude each other, or differ in what is the union's, such as ``task_type``.

        Examples:
            >>> config = UnionConfig([LoraConfig(r=4), BottleneckConfig()], task_type="CAUSAL_LM")
            >>> list(config.parts)
            ['lora', 'bottleneck']
        """
        fields = {field.name: field for field in dataclasses.fields(self)}
        named = {name: value for name, value in given.items() if name not in fields}
        for name, value in named.items():
            if not isinstance(value, PeftConfig):
                hint = nearest(name, list(fields))
                raise TypeError(f"{type(self).__name__} has no field {name!r}.{hint} A part is given as its config.")
        for name, field in fields.items():
            setattr(self, name, given.get(name, field.default))
        self.parts = {**_named(parts), **named}
        self.__post_init__()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, part in self.parts.items():
            self._check(name, part)
        methods = [part.method_name for part in self.parts.values()]
        if twice := [method for method in dict.fromkeys(methods) if methods.count(method) > 1]:
            raise ConfigError(
                f"{type(self).__name__}: two parts are {twice[0]}. One config of a method says what all its layers "
                "get (a LoRA's rank_pattern, for instance); for two adapters of it, add them one by one."
            )
        prompts = [name for name, part in self.parts.items() if part.is_prompt_learning]
        if len(prompts) > 1:
            raise ConfigError(f"{type(self).__name__}: {', '.join(prompts)} train virtual tokens; one part can.")
        self._share_fields()

    def _check(self, name: str, part: Any) -> None:
        if not isinstance(part, PeftConfig) or isinstance(part, UnionConfig):
            what = "a union itself: give its parts" if isinstance(part, UnionConfig) else f"a {type(part).__name__}"
            raise ConfigTypeError(f"{type(self).__name__}: the part {name!r} should be a config, and is {what}.")
        if not part.is_prompt_learning and part.peft_type not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
            raise ConfigError(
                f"{type(self).__name__}: the part {name!r} is {part.method_name}, which runs the model in a way of "
                "its own, and cannot be beside others."
            )

    def _share_fields(self) -> None:
        """What the union says of its task and base model, each part says; what one part says, the union does."""
        for field in ("task_type", "base_model_name_or_path", "revision"):
            said = {name: value for name, part in self.parts.items() if (value := getattr(part, field)) is not None}
            values = {value for value in (getattr(self, field), *said.values()) if value is not None}
            if len(values) > 1:
                raise ConfigError(f"{type(self).__name__}: {field} differs: {getattr(self, field)!r}, parts {said}.")
            for config in (self, *self.parts.values()):
                setattr(config, field, next(iter(values), None))

    @property
    def members(self) -> list[Any]:
        """The configs of the parts, in their order."""
        return list(self.parts.values())

    def to_dict(self) -> dict:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        parts = [
            {"name": name, **{k: v for k, v in part.to_dict().items() if k not in ORIGIN}}
            for name, part in self.parts.items()
        ]
        return {**own, "parts": parts}

    @classmethod
    def check_kwargs(cls, /, **kwargs: Any) -> dict:
        shared = {name: kwargs[name] for name in ORIGIN if name in kwargs}
        parts = kwargs.get("parts")
        if isinstance(parts, list) and all(isinstance(part, dict) for part in parts):
            made = {}
            for part in parts:
                method, name = part.get("peft_type"), part.get("name", part.get("peft_type"))
                if not isinstance(method, str) or not isinstance(name, str) or method.upper() == cls.METHOD:
                    raise ConfigError(f"{cls.__name__}: {part!r:.80} is no part: its peft_type names a method.")
                held = {field: value for field, value in part.items() if field != "name"}
                # Without a name it has its method's.
                made[name.lower() if name == method else name] = PeftConfig.of_file({**shared, **held})
            kwargs["parts"] = made
        return kwargs


def _named(parts: Any) -> dict[str, Any]:
    """Parts with their names."""
    if isinstance(parts, Mapping):
        return dict(parts)
    if not isinstance(parts, list | tuple):
        raise ConfigTypeError(f"the parts of a union are a list of configs, or a dict of them, not {parts!r}.")
    found: dict[str, Any] = {}
    for part in parts:
        name = getattr(part, "method_name", type(part).__name__).lower()
        found[f"{name}_{len(found)}" if name in found else name] = part
    return found


class UnionModel(MixedModel):
    """Applies UnionConfig to a model; see :class:`MixedModel`."""


register_peft_method(
    name="union", config_cls=UnionConfig, model_cls=UnionModel, prefix="union_", is_mixed_compatible=True
)

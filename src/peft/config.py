"""Configs of adapters: their fields, what values are valid, and how they become `adapter_config.json` and back.

A config is a dataclass whose fields are declared with `option(default, help, ...)`. The same declaration documents the
field and validates it, so a method's config is a list of fields and little else. Fields that many methods have are
mixins below (`TargetModules`, `LayerSelection`, ...); a config is composed of those:

    @dataclass
    class MyConfig(TargetModules, ExcludeModules, ModulesToSave):
        METHOD: ClassVar = PeftType.LORA
        r: int = option(8, "Rank.", minimum=1)

Nothing here imports torch, transformers or huggingface_hub until it is needed.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import json
import numbers
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft._lazy import also_known
from peft._version import __version__
from peft.core.files.io import CONFIG_NAME, hub_options, locate, replacing
from peft.errors import (
    ConfigError,
    ConfigFileError,
    ConfigTypeError,
    MissingFileError,
    NotSupportedYetError,
    PeftWarning,
    UnknownMethodError,
    nearest,
    some,
)
from peft.options import Options, check_choice, check_regexes, compiled, option, value_of
from peft.peft_types import (
    CONFIGS_OF_NO_METHOD,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    OwnMethod,
    PeftType,
    TaskType,
    listed,
    parse_peft_type,
)
from peft.usage import note


# ------------------------------------------------------------------------------------------------------ files and hub


def _load_methods() -> None:
    """Import the tuners, which enter themselves in the registry."""
    import peft.tuners  # noqa: F401


def _to_json(value: Any) -> Any:
    """What the json encoder cannot write by itself: sets become sorted lists, enums their value."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__} cannot be written to json: {value!r}")


def read_json(path: str) -> dict[str, Any]:
    """What an ``adapter_config.json`` holds.

    Raises:
        ConfigFileError: it cannot be read, is damaged, or holds no object of fields.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        kind = MissingFileError if isinstance(error, FileNotFoundError) else ConfigFileError
        raise kind(f"Cannot read the adapter config {path!r}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # malformed json, bytes that are no text, or lists in lists in lists
        raise ConfigFileError(
            f"The adapter config {path!r} is damaged or truncated ({error}). Save the adapter again, or fetch the "
            f"file again."
        ) from error
    if not isinstance(content, dict):
        raise ConfigFileError(
            f"The adapter config {path!r} must hold an object of fields, not a {type(content).__name__}."
        )
    return content


def _split_unknown(cls: type, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Divide what a file holds into what `cls` knows and the names of what it does not, nested options included."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    known, unknown = {}, []
    for name, value in values.items():
        if name not in fields:
            unknown.append(name)
            continue
        nested = fields[name].metadata.get("nested")
        if nested is not None and isinstance(value, dict):
            value, inner = _split_unknown(nested, value)
            unknown += [f"{name}.{i}" for i in inner]
        known[name] = value
    return known, unknown


# ------------------------------------------------------------------------------------------------------------- configs


def _known_type(name: Any) -> PeftType | str:
    """The method called `name`, in any case; ValueError if there is none."""
    upper = name.upper() if isinstance(name, str) else name
    if not isinstance(name, str) or (upper not in PeftType.__members__ and upper not in PEFT_TYPE_TO_CONFIG_MAPPING):
        _load_methods()
    return parse_peft_type(upper if isinstance(upper, str) else str(name))


# Other tools that write an `adapter_config.json`, by fields that only they have, and what to do with it.
_OTHER_TOOLS = {
    (
        "fine_tune_type",
        "lora_parameters",
    ): "mlx-lm has written it: convert the adapter, or fuse it there with mlx_lm.fuse",
    ("model_class", "model_name", "hidden_size"): "the library `adapters` has written it: load it there",
    ("architectures", "model_type", "hidden_size"): "it is the config of a model: load that with its own library",
    ("_class_name", "_diffusers_version"): "diffusers has written it: load it there",
}


def _told_by(values: dict[str, Any]) -> str:
    """Which tool has written a config that is none of ours, if its fields tell."""
    for fields, what in _OTHER_TOOLS.items():
        if sum(field in values for field in fields) >= min(2, len(fields)):
            return f" As {', '.join(f for f in fields if f in values)} tell, {what}."
    return f" It has the fields {some(map(repr, values))}." if values else " It is empty."


def _hints_of(cls: type) -> dict[str, Any]:
    """The types of a config's fields. Python 3.10 tells none beside a bare ``ClassVar``."""
    names = {field.name for field in dataclasses.fields(cls)}
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        own = {name: hint for name, hint in inspect.get_annotations(base).items() if name in names}
        hints |= typing.get_type_hints(
            type(base.__name__, (), {"__annotations__": own, "__module__": base.__module__})
        )
    return hints


_hints: Callable[[type], dict[str, Any]] = functools.cache(_hints_of)  # needed for each file


def _transient(cls: type) -> set[str]:
    """The fields that no file holds."""
    return {field.name for field in dataclasses.fields(cls) if field.metadata.get("transient")}


def _of_no_process(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The content of a file without what belongs to the process that wrote it; what that asks for is named."""
    left_out = _transient(cls) & values.keys()
    if asked := sorted(n for n in left_out if any(values[n].values() if isinstance(values[n], dict) else [values[n]])):
        warnings.warn(
            f"{cls.__name__}: {', '.join(asked)} of a file does nothing: say so where you load it.", PeftWarning
        )
    return {name: value for name, value in values.items() if name not in left_out}


def _of_files(cls: type[PeftConfigMixin], values: dict[str, Any]) -> dict[str, Any]:
    """What of a file counts: not what belongs to a process.

    Raises:
        ConfigTypeError: a value is of a type that its field cannot have; both are named.
    """
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, _hints(cls)
    kept = {}
    for name, value in _of_no_process(cls, values).items():
        field = fields.get(name)
        if field is not None:
            if value is not None or field.default is not None:
                check_type(f"{cls.__name__}: {name}", value, hints[name], field.metadata.get("nested"))
        kept[name] = bool(value) if hints.get(name) is bool else value
    return kept


def check_type(where: str, value: Any, hint: Any, nested: type | None = None) -> None:
    """Make sure that a value of a json file can be what an annotation says. A number need not be whole for `int`.

    Raises:
        ConfigTypeError: it cannot; the message names the entry.
    """
    if _has_type(value, hint) or (nested is not None and isinstance(value, dict)):
        if nested is not None and isinstance(value, dict):
            hints = _hints(nested)
            for name in value.keys() & hints.keys():
                check_type(f"{where}.{name}", value[name], hints[name])
        return
    wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
    raise ConfigTypeError(f"{where}={shown} is not valid: it must be {wanted}.")


def _has_type(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, one) for one in inner)
    if origin is typing.Literal:
        return isinstance(value, (str, bool, int))  # which ones is the field's own matter
    if origin in (list, set, frozenset, tuple, Iterable, Sequence):
        each = inner[:1] if origin is not tuple or inner[-1:] == (...,) else ()
        return isinstance(value, list) and all(_has_type(item, one) for item in value for one in each)
    if origin is dict:
        return isinstance(value, dict) and all(_has_type(item, inner[1]) for item in value.values())
    if hint in (float, int):  # which numbers is the field's own matter; files in use have a fraction as alpha
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is bool:  # as Python takes them
        return value in (None, 0, 1)
    if hint in (str, type(None)):
        return isinstance(value, hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, (str, int))
    return not isinstance(hint, type) or not issubclass(hint, (dict, list)) or isinstance(value, hint)


@dataclass
class PeftConfigMixin(Options):
    """What every config can do: validate itself, become a file, and be read from one.

    `peft_version` is the version that wrote the file for a config that was loaded (None for files older than that
    field), and the version of this package otherwise. Saving writes the version of this package.
    """

    METHOD: ClassVar[PeftType | str | None] = None  # the method this class configures; None for shared base classes

    task_type: str | TaskType | None = option(
        None, "What the model is for, e.g. 'CAUSAL_LM'; it selects the PeftModelFor... class."
    )
    peft_type: str | PeftType | None = option(None, "The method. Each config class fills it in by itself.")
    auto_mapping: dict | None = option(
        None, "Class and library of the base model, kept where no task type tells how to load it."
    )
    peft_version: str | None = option(None, "Version of this package that wrote the config.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ConfigError(
                f"{type(self).__name__}: task_type: invalid task type {value_of(self.task_type)!r}."
                f"{nearest(self.task_type, TaskType.__members__, cutoff=0.3)} "
                f"Allowed: {', '.join(TaskType.__members__)}."
            )
        self._set_peft_type()
        if self.peft_version is None:
            self.peft_version = __version__

    def _set_peft_type(self) -> None:
        given = self.peft_type
        if self.METHOD is not None:
            self.peft_type = self.METHOD if isinstance(self.METHOD, PeftType) else OwnMethod(self.METHOD)
            known = map(value_of, PEFT_TYPE_TO_CONFIG_MAPPING)
            if given is not None and str(value_of(given)).upper() != value_of(self.METHOD):
                warnings.warn(
                    f"{type(self).__name__} configures {value_of(self.METHOD)}, so peft_type={value_of(given)!r} is "
                    f"left out.{nearest(value_of(given), known, cutoff=0.9)}",
                    PeftWarning,
                    stacklevel=4,
                )
        elif given is not None:
            try:
                self.peft_type = _known_type(given)
            except ValueError as error:
                raise ConfigError(f"{type(self).__name__}: {error}") from None

    # -- reading and writing

    def to_dict(self) -> dict:
        """The fields that belong to the adapter, as plain values (sets and enum members stay what they are).

        Fields that other releases do not know are there where they are set: programs write what they get here into
        files of their own, and make configs of it.
        """
        own = (f for f in dataclasses.fields(self) if f.metadata.get("own"))
        left_out = _transient(type(self)) | {f.name for f in own if getattr(self, f.name) == f.default}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` into a folder, which is made if needed.

        The file is replaced as a whole: if anything fails, the previous one stays as it was.

        Args:
            save_directory: the folder.
            kwargs: `auto_mapping_dict`, what to write as `auto_mapping` instead of the field; others are ignored.

        Raises:
            ConfigFileError: `save_directory` is a file.
            ConfigError: a field holds what json cannot; it is named.
        """
        values = {**self.to_dict(), "peft_version": __version__}
        if kwargs.get("auto_mapping_dict"):
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        for name, value in values.items():
            try:
                json.dumps(value, default=_to_json)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{type(self).__name__}: {name} cannot be saved, since {error}") from error
        text = json.dumps(values, indent=2, sort_keys=True, default=_to_json)
        with replacing(save_directory) as path, open(path(CONFIG_NAME), "w", encoding="utf-8") as file:
            file.write(text)

    @classmethod
    def from_peft_type(cls, /, **kwargs: Any):
        """Make the config of the method that the keyword `peft_type` names, from fields as a file has them.

        Fields that the config does not know are left out, and named in one warning. Without `peft_type` the config is
        one of this class.

        Raises:
            ConfigError: the method is unknown, or a value is not valid.
            NotSupportedYetError: the method or the variant exists in the file format, but not here yet.
        """
        config_cls = cls._class_of(kwargs.get("peft_type"), kwargs.get("peft_version"))
        known, unknown = _split_unknown(config_cls, config_cls.check_kwargs(**kwargs))
        if unknown:
            warnings.warn(
                f"{config_cls.__name__} does not know {sorted(unknown)}, which are left out. They were probably "
                f"written by another version (peft_version {kwargs.get('peft_version') or 'not recorded'}; this is "
                f"{__version__}), so the adapter may behave differently from what was saved.",
                PeftWarning,
                stacklevel=3,
            )
        if config_cls.METHOD is not None:
            known.pop("peft_type", None)  # which may be an older name of it
        return config_cls(**known)

    @classmethod
    def _class_of(cls, peft_type: str | PeftType | None, written_by: str | None) -> type[PeftConfigMixin]:
        if peft_type is None or peft_type == cls.METHOD:
            return cls
        version = f" (written by peft {written_by}; this is {__version__})" if written_by else ""
        try:
            key = _known_type(peft_type)
        except ValueError as error:
            raise UnknownMethodError(f"{error}{version}") from None
        if key in CONFIGS_OF_NO_METHOD:
            return CONFIGS_OF_NO_METHOD[key]
        if key not in PEFT_TYPE_TO_CONFIG_MAPPING:
            _load_methods()  # this may be the first that is asked of the library
        if key not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise NotSupportedYetError(
                f"The method {value_of(key)} is not supported yet{version}. Available: "
                f"{listed(PEFT_TYPE_TO_CONFIG_MAPPING)}."
            )
        return PEFT_TYPE_TO_CONFIG_MAPPING[key]

    @classmethod
    def _get_peft_type(cls, model_id: str, subfolder: str | None = None, **kwargs: Any) -> str:
        """The method of a saved adapter. Forks of ``PeftModel.from_pretrained`` choose the config's class by it."""
        path = locate(model_id, CONFIG_NAME, subfolder=subfolder, **hub_options(kwargs))
        return cls.from_json_file(path)["peft_type"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ):
        """Read the config of a saved adapter; the result is of the class its `peft_type` names.

        Args:
            pretrained_model_name_or_path: local folder, or repository of the model hub.
            subfolder: folder within that.
            kwargs: options of the download (`revision`, `token`, `cache_dir`, ...), and fields to use where the file
                has none; others are ignored.

        Raises:
            ConfigFileError: there is no such file, or it is damaged; the message names it.
            ConfigError: the file holds an unknown method or a value that is not valid.
            NotSupportedYetError: the file needs a method or variant that does not exist here yet.

        Examples:
            >>> model.save_pretrained("adapter")
            >>> PeftConfig.from_pretrained("adapter").peft_type.value
            'LORA'
        """
        hub = hub_options(kwargs)
        path = locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
        values = cls.from_json_file(path)
        written_by = values.get("peft_version")
        try:
            if values and "peft_type" not in values and cls.METHOD and not _split_unknown(cls, values)[1]:
                values["peft_type"] = cls.METHOD  # whoever asks the class of a method says what the file leaves out
            if values.get("peft_type") is None:
                _load_methods()
                raise UnknownMethodError(
                    f"it names no peft_type, so it is no config of an adapter.{_told_by(values)} If it is one, add "
                    f"its peft_type: one of {listed(PEFT_TYPE_TO_CONFIG_MAPPING)}."
                )
            config = cls.of_file(values, **kwargs)
        except ConfigError as error:
            raise type(error)(f"{path}: {error}") from error
        config.peft_version = written_by
        return config

    @classmethod
    def of_file(cls, values: dict[str, Any], **kwargs: Any):
        """The config that the content of a file describes, of the class that its ``peft_type`` names.

        Args:
            kwargs: fields to use where the file has none; others are ignored.

        Raises:
            ConfigError: it holds an unknown method or a value that is not valid.
        """
        config_cls = cls._class_of(values["peft_type"], values.get("peft_version"))
        values = _of_files(config_cls, values)
        extra = {f.name: kwargs[f.name] for f in dataclasses.fields(config_cls) if f.name in kwargs}
        return config_cls.from_peft_type(**{**extra, **values})

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict:
        """The content of a config file as a dict, without what belongs to the process that wrote it.

        Raises:
            ConfigFileError: the file is missing, damaged, or holds no object; the message names it.
        """
        values = read_json(os.fspath(path_json_file))
        return _of_no_process(cls, values)

    @classmethod
    def check_kwargs(cls, /, **kwargs: Any) -> dict:
        """Hook for configs whose fields were spelt differently in older files: returns the fields to use."""
        return kwargs

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """Upload `adapter_config.json` to a repository of the model hub, as configs of transformers are uploaded.

        Args:
            args, kwargs: `repo_id`, which is made if needed, and by keyword `commit_message`, `commit_description`,
                `private`, `token`, `revision`, `create_pr`, `tags`: see `transformers.utils.PushToHubMixin`.

        Returns:
            The address of the commit.
        """
        from transformers.utils import PushToHubMixin

        saves = {"save_pretrained": lambda _, folder, **unused: self.save_pretrained(folder)}
        return type(type(self).__name__, (PushToHubMixin,), saves)().push_to_hub(*args, **kwargs)

    @property
    def method_name(self) -> str:
        """Its method as files name it, such as "LORA"."""
        return str(value_of(self.peft_type))

    @property
    def members(self) -> list[Any]:
        """One config for each method that the adapter is of: this one, unless it stands for several."""
        return [self]

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens or prefixes instead of weights."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is LLaMA-Adapter, which places prompts inside attention layers."""
        return self.peft_type == PeftType.ADAPTION_PROMPT


ORIGIN = ("task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
"""Fields of every config that say where an adapter is from and what for, and nothing of what it computes."""


@dataclass
class PeftConfig(PeftConfigMixin):
    """Base of all configs: the method, the task, and the base model that an adapter belongs to."""

    base_model_name_or_path: str | None = option(None, "Name or path of the model that the adapter was trained on.")
    revision: str | None = option(None, "Revision of the base model.")
    inference_mode: bool = option(False, "Whether the adapter is loaded for inference, with its tensors frozen.")


@dataclass
class PromptLearningConfig(PeftConfig):
    """Base of the configs of methods that train virtual tokens or key-value prefixes.

    The sizes are taken from the base model when left out.
    """

    num_virtual_tokens: int = option(None, "How many virtual tokens are trained.", minimum=1)
    token_dim: int = option(None, "Width of a token embedding of the base model.", minimum=1)
    num_transformer_submodules: int | None = option(
        None, "How many transformer stacks get virtual tokens: 1, or 2 for an encoder and a decoder.", minimum=1
    )
    num_attention_heads: int | None = option(None, "Attention heads of the base model.", minimum=1)
    num_layers: int | None = option(None, "Transformer layers of the base model.", minimum=1)
    modules_to_save: list[str] | None = option(
        None,
        "Modules besides the adapter that are trained and saved whole, e.g. a classification head.",
        names=str,
    )

    @property
    def is_prompt_learning(self) -> bool:
        """True."""
        return True


# --------------------------------------------------------------------------------------- fields that methods share


@dataclass
class TargetModules(PeftConfig):
    """Which modules are adapted."""

    target_modules: list[str] | str | None = option(
        None,
        "Modules to adapt. A list has names, or ends of names ('q_proj', 'layers.0.mlp.up_proj'); a text is a regular "
        "expression for whole names, or 'all-linear' for every linear layer but the head. Left out, it is looked up "
        "by the type of the model.",
        names=set,
    )


@dataclass
class ExcludeModules(PeftConfig):
    """Which of the targeted modules stay as they are."""

    exclude_modules: list[str] | str | None = option(
        None,
        "Modules to leave out of the targets: a list of names or ends of names, or a regular expression.",
        names=set,
    )


@dataclass
class LayerSelection(PeftConfig):
    """Restriction of the targets to some of the numbered layers of a model."""

    layers_to_transform: list[int] | int | None = option(
        None, "Numbers of the layers to adapt; all if left out. Needs `target_modules` as a list."
    )
    layers_pattern: list[str] | str | None = option(
        None,
        "Name of the list that holds the layers, such as 'layers' or 'h', where it is not one of the usual. Needs "
        "`layers_to_transform`.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if isinstance(self.layers_to_transform, list) and not self.layers_to_transform:
            self.layers_to_transform = None  # an empty list restricts nothing
        patterns = self.layers_pattern
        check_regexes(
            f"{name}: layers_pattern", [patterns] if isinstance(patterns, str) else patterns or (), re.compile
        )
        for field in ("layers_to_transform", "layers_pattern"):
            if getattr(self, field) is not None and isinstance(getattr(self, "target_modules", None), str):
                raise ConfigError(
                    f"{name}: `{field}` cannot be used when `target_modules` is a str. Give the targets as a list, or "
                    f"write the layer numbers into the regular expression."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"{name}: When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )
        layers = self.layers_to_transform
        if layers is None:
            return
        if not _are_indices([layers] if isinstance(layers, int) else layers):
            raise ConfigError(f"{name}: layers_to_transform={layers!r} must be layer numbers, counted from 0.")
        self.layers_to_transform = layers if isinstance(layers, int) else [int(i) for i in layers]


def _are_indices(values: Any) -> bool:
    return isinstance(values, (list, tuple, set, range)) and all(
        isinstance(i, numbers.Integral) and not isinstance(i, bool) and int(i) >= 0 for i in values
    )


@dataclass
class ModulesToSave(PeftConfig):
    """Modules that are trained whole."""

    modules_to_save: list[str] | None = option(
        None,
        "Modules besides the adapted ones that are trained whole and saved with the adapter, e.g. a new "
        "classification head.",
        names=str,
    )


@dataclass
class FanInFanOut(PeftConfig):
    """How the targeted layers keep their weight."""

    fan_in_fan_out: bool = option(
        False,
        "Whether the weight is kept as [in, out], as GPT-2's Conv1D does. Corrected where the layer type tells.",
        lacks="no adapted layer keeps its weight as [in, out]",
    )


@dataclass
class TrainedBias(PeftConfig):
    """Which biases of the base model are trained. A method sets `OWN_BIAS` to its third choice, e.g. 'lora_only'."""

    OWN_BIAS: ClassVar[str | None] = None

    bias: str = option(
        "none",
        "Which biases are trained: 'none', 'all' of the model, or '<method>_only' for those of adapted layers. "
        "They belong to the adapter: while it is switched off or unloaded, the base model has its own biases.",
        lacks="there are no biases",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = ("none", "all", *([self.OWN_BIAS] if self.OWN_BIAS else []))
        check_choice(f"{type(self).__name__}: bias", self.bias, {"choices": choices})


@dataclass
class RankPattern(PeftConfig):
    """Ranks that differ from the config's `r`."""

    rank_pattern: dict[str, int] | None = option(
        dict,
        "Ranks of particular modules: a module name, an end of one, or a regular expression -> rank. Names that start "
        "with '^' are matched from the beginning. The first that matches counts.",
        names=dict,
        minimum=1,
    )

    def rank_at(self, key: str) -> int:
        """The rank of the module called `key`."""
        return resolve_pattern(self.rank_pattern, key, self.r)  # type: ignore[attr-defined]


@dataclass
class RankPatterns(RankPattern):
    """Ranks and scales that differ from the config's `r` and alpha, whose field is called `ALPHA`."""

    ALPHA: ClassVar[str] = "alpha"

    alpha_pattern: dict[str, float] | None = option(
        dict, "Alphas of particular modules, with keys like those of `rank_pattern`.", names=dict
    )

    def alpha_at(self, key: str) -> float:
        """The alpha of the module called `key`."""
        return resolve_pattern(self.alpha_pattern, key, getattr(self, self.ALPHA))


def match_pattern(keys: Iterable[str], name: str) -> str | None:
    """The first of `keys` that stands for the module `name`, or None.

    A key is a regular expression for the whole name or for its end after a dot; one that starts with "^" has to match
    from the beginning.
    """
    return next((key for key in keys if compiled(key).fullmatch(name)), None)


def resolve_pattern(pattern: dict[str, Any] | None, key: str, default: Any) -> Any:
    """The value that a `*_pattern` field has for the module called `key`, or `default` if nothing matches."""
    if not pattern:
        return default
    matched = match_pattern(pattern, key)
    note(pattern, () if matched is None else (matched,))
    return default if matched is None else pattern[matched]


def patterned(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The other way: the most frequent of the values of modules, and a pattern for each module that has another.

    Raises:
        ValueError: there are no modules.
    """
    if not values:
        raise ValueError("there is no module with a LoRA here.")
    given = list(values.values())
    common = max(dict.fromkeys(given), key=given.count)
    return common, {re.escape(module): value for module, value in named_apart(values, common).items()}


def named_apart(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """The values of modules by their names, without the common one unless a name means another module as well.

    A pattern means all modules whose names end like it, and the first that matches counts: then longer names come
    first, and all are said.
    """
    tails = (name[dot + 1 :] for name in values for dot, letter in enumerate(name) if letter == ".")
    if any(tail in values for tail in tails):
        return dict(sorted(values.items(), key=lambda item: -len(item[0])))
    return {name: value for name, value in values.items() if value != common}


also_known(__name__)

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
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from peft._version import __version__
from peft.utils.error import ConfigError, ConfigFileError, NotSupportedYetError, nearest
from peft.utils.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, TaskType, parse_peft_type
from peft.utils.warning import PeftWarning


CONFIG_NAME = "adapter_config.json"

# Keywords of `from_pretrained` that concern the download and never the config.
# fmt: off
_HUB_KEYWORDS = frozenset((
    "cache_dir", "endpoint", "etag_timeout", "force_download", "headers", "library_name", "library_version",
    "local_dir", "local_files_only", "proxies", "repo_type", "revision", "token", "user_agent",
))
# fmt: on


# Annotations of fields that hold whole numbers, as dataclasses record them.
_WHOLE = (int, int | None, "int", "int | None", "Optional[int]")


# ---------------------------------------------------------------------------------------------- fields and their rules


def option(
    default: Any = None,
    help: str = "",
    *,
    choices: Iterable[Any] | None = None,
    pattern: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    nested: type | None = None,
    transient: bool = False,
) -> Any:
    """Declare a config field: its default, what it is for, and which values it may take.

    Args:
        default: the default, or a class or function without arguments that makes it (`dict`, `list`).
        help: one or two sentences for the user.
        choices: the values allowed, apart from None.
        pattern: a regular expression; strings that match it whole are allowed besides `choices`.
        minimum, maximum, below: bounds of a number; `below` is exclusive. A field annotated `int` that has a bound
            takes whole numbers only.
        nested: dataclass of a field that holds further options; a dict given for it becomes an instance.
        transient: the field belongs to the process and not to the adapter: it is not saved.
    """
    rules = {
        "choices": None if choices is None else tuple(choices),
        "pattern": pattern,
        "minimum": minimum,
        "maximum": maximum,
        "below": below,
        "nested": nested,
        "transient": transient,
    }
    metadata = {"help": help, **{k: v for k, v in rules.items() if v is not None and v is not False}}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _is_choice(value: Any, choices: Iterable[Any]) -> bool:
    # `1 == True` holds in Python, but 1 is not what a field for True or "gaussian" asks for
    return any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in choices)


def _check_choice(where: str, value: Any, rules: Any) -> None:
    choices, pattern = rules.get("choices"), rules.get("pattern")
    if choices is None or _is_choice(value, choices):
        return
    if pattern and isinstance(value, str) and re.fullmatch(pattern, value):
        return
    allowed = [repr(_plain(c)) for c in choices] + ([f"text of the form {pattern!r}"] if pattern else [])
    hint = nearest(_plain(value), [_plain(c) for c in choices])
    raise ConfigError(f"{where}={_plain(value)!r} is not valid.{hint} Allowed: {', '.join(allowed)}.")


def _check_bounds(where: str, value: Any, rules: Any, whole: bool) -> None:
    low, high, below = rules.get("minimum"), rules.get("maximum"), rules.get("below")
    if low is None and high is None and below is None:
        return
    kind = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"{where}={value!r} is not valid: it must be a {'whole number' if whole else 'number'}.")
    bounds = [(low, "at least", low is None or value >= low), (high, "at most", high is None or value <= high),
              (below, "below", below is None or value < below)]  # fmt: skip
    if not all(holds for _, _, holds in bounds):
        asked = " and ".join(f"{word} {bound}" for bound, word, _ in bounds if bound is not None)
        raise ConfigError(f"{where}={value!r} is not valid: it must be {asked}.")


@dataclass
class Options:
    """A group of fields declared with `option`, validated when an instance is made."""

    def __new__(cls, *args: Any, **kwargs: Any):
        known = cls._known_keywords()
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            hint = nearest(unknown[0], known)
            raise TypeError(f"{cls.__name__} has no field {unknown[0]!r}.{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            nested = field.metadata.get("nested")
            if nested is not None and isinstance(value, dict) and (value or field.default_factory is not dict):
                value = nested(**value)
                setattr(self, field.name, value)
            if value is None:
                continue
            where = f"{type(self).__name__}: {field.name}"
            _check_choice(where, value, field.metadata)
            _check_bounds(where, value, field.metadata, whole=field.type in _WHOLE)

    @classmethod
    def _known_keywords(cls) -> Any:
        parameters = inspect.signature(cls.__init__).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return _Everything()
        return [name for name in parameters if name != "self"]


class _Everything:
    def __contains__(self, item: object) -> bool:
        return True


@dataclass(frozen=True)
class NotYet:
    """A declared refusal: values of a field that this version knows but cannot honour.

    Attributes:
        instead: what the user can do now.
        applies: whether a value is one of those; by default any that is not None, False or empty.
    """

    instead: str
    applies: Callable[[Any], bool] = lambda value: bool(value)


# ------------------------------------------------------------------------------------------------------ files and hub


def _load_methods() -> None:
    """Import the tuners, which enter themselves in the registry."""
    import peft.tuners  # noqa: F401


def _write_atomically(path: str, text: str) -> None:
    """Write a text file so that a failure at any moment leaves either the old file or the new one, whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def _to_json(value: Any) -> Any:
    """What the json encoder cannot write by itself: sets become sorted lists, enums their value."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__} cannot be written to json: {value!r}")


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise ConfigFileError(f"Cannot read the adapter config {path!r}: {error.strerror or error}.") from error
    except ValueError as error:  # malformed json, or bytes that are no text
        raise ConfigFileError(
            f"The adapter config {path!r} is damaged or truncated ({error}). Save the adapter again, or fetch the "
            f"file again."
        ) from error
    if not isinstance(content, dict):
        raise ConfigFileError(
            f"The adapter config {path!r} must hold an object of fields, not a {type(content).__name__}."
        )
    return content


def _missing_local(folder: str) -> ConfigFileError:
    inside = sorted(n for n in os.listdir(folder) if os.path.isfile(os.path.join(folder, n, CONFIG_NAME)))
    hint = f" Adapters are in its sub-folders {inside}: name one as `subfolder`." if inside else ""
    return ConfigFileError(f"Can't find {CONFIG_NAME!r} in the folder {folder!r}.{hint}")


def _download(repo_id: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> str:
    from huggingface_hub import errors, hf_hub_download

    accepted = inspect.signature(hf_hub_download).parameters
    kwargs = {name: value for name, value in hub_kwargs.items() if name in accepted}
    wanted = f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME
    start = f"Can't find the adapter {repo_id!r}: it is no local folder, and "
    try:
        return hf_hub_download(repo_id, CONFIG_NAME, subfolder=subfolder, **kwargs)
    except errors.HFValidationError as error:
        raise ConfigFileError(f"{start}it is no valid repository id ('user/name') of the model hub.") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConfigFileError(f"{start}the hub was not reached and {wanted!r} is not in the local cache.") from error
    except errors.EntryNotFoundError as error:
        raise ConfigFileError(
            f"{start}the hub repository has no {wanted!r}. It may hold a full model, or need a `subfolder`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigFileError(f"{start}the hub repository has no revision {kwargs.get('revision')!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigFileError(
            f"{start}the hub has no such repository, or it is private and needs a `token`."
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ConfigFileError(f"{start}{wanted!r} could not be downloaded from the hub: {error}") from error


def locate_config(name_or_path: str | os.PathLike, subfolder: str | None = None, **hub_kwargs: Any) -> str:
    """Path of the `adapter_config.json` of a local folder or, where there is no such folder, of a hub repository.

    Raises:
        ConfigFileError: neither exists, or it has no such file; the message says what was looked for and where.
    """
    name_or_path = os.fspath(name_or_path)
    folder = os.path.join(name_or_path, subfolder) if subfolder else name_or_path
    path = os.path.join(folder, CONFIG_NAME)
    if os.path.isfile(path):
        return path
    if os.path.isdir(name_or_path):
        if not os.path.isdir(folder):
            raise ConfigFileError(
                f"The folder {name_or_path!r} has no sub-folder {subfolder!r} with a {CONFIG_NAME!r}."
            )
        raise _missing_local(folder)
    return _download(name_or_path, subfolder, hub_kwargs)


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


@dataclass
class PeftConfigMixin(Options):
    """What every config can do: validate itself, become a file, and be read from one.

    `peft_version` is the version that wrote the file for a config that was loaded (None for files older than that
    field), and the version of this package otherwise. Saving writes the version of this package.
    """

    METHOD: ClassVar[PeftType | str | None] = None  # the method this class configures; None for shared base classes
    NOT_YET: ClassVar[dict[str, NotYet]] = {}  # field -> values that are refused for now

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
                f"{type(self).__name__}: invalid task type {_plain(self.task_type)!r}."
                f"{nearest(self.task_type, TaskType.__members__, cutoff=0.3)} "
                f"Allowed: {', '.join(TaskType.__members__)}."
            )
        self._set_peft_type()
        if self.peft_version is None:
            self.peft_version = __version__
        for name, refusal in self.NOT_YET.items():
            value = getattr(self, name)
            if refusal.applies(value):
                raise NotSupportedYetError(
                    f"{type(self).__name__}: {name}={value!r} is not supported yet. {refusal.instead}"
                )

    def _set_peft_type(self) -> None:
        given = self.peft_type
        if given is not None:
            if given not in PeftType.__members__ and given not in PEFT_TYPE_TO_CONFIG_MAPPING:
                _load_methods()
            try:
                given = parse_peft_type(given)
            except ValueError as error:
                raise ConfigError(f"{type(self).__name__}: {error}") from None
        if self.METHOD is None:
            self.peft_type = given
        elif given in (None, self.METHOD):
            self.peft_type = self.METHOD
        else:
            raise ConfigError(f"{type(self).__name__} configures {_plain(self.METHOD)}, not {_plain(given)}.")

    # -- reading and writing

    def to_dict(self) -> dict:
        """The fields that belong to the adapter, as plain values (sets and enum members stay what they are)."""
        values = dataclasses.asdict(self)
        transient = {f.name for f in dataclasses.fields(self) if f.metadata.get("transient")}
        return {name: value for name, value in values.items() if name not in transient}

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
        directory = os.fspath(save_directory)
        if os.path.isfile(directory):
            raise ConfigFileError(f"Cannot save to {directory!r}: it is a file, and a folder is needed.")
        values = {**self.to_dict(), "peft_version": __version__}
        if kwargs.get("auto_mapping_dict"):
            values["auto_mapping"] = kwargs["auto_mapping_dict"]
        for name, value in values.items():
            try:
                json.dumps(value, default=_to_json)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{type(self).__name__}: {name} cannot be saved, since {error}") from error
        text = json.dumps(values, indent=2, sort_keys=True, default=_to_json)
        os.makedirs(directory, exist_ok=True)
        _write_atomically(os.path.join(directory, CONFIG_NAME), text)

    @classmethod
    def from_peft_type(cls, **kwargs: Any):
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
        return config_cls(**known)

    @classmethod
    def _class_of(cls, peft_type: str | PeftType | None, written_by: str | None) -> type[PeftConfigMixin]:
        if peft_type is None or peft_type == cls.METHOD:
            return cls
        if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
            _load_methods()
        version = f" (written by peft {written_by}; this is {__version__})" if written_by else ""
        try:
            key = parse_peft_type(peft_type)
        except ValueError as error:
            raise ConfigError(f"{error}{version}") from None
        if key not in PEFT_TYPE_TO_CONFIG_MAPPING:
            available = ", ".join(sorted(_plain(k) for k in PEFT_TYPE_TO_CONFIG_MAPPING))
            raise NotSupportedYetError(
                f"The method {_plain(key)} is not supported yet{version}. Available: {available}."
            )
        return PEFT_TYPE_TO_CONFIG_MAPPING[key]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
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
        """
        hub_kwargs = {name: value for name, value in kwargs.items() if name in _HUB_KEYWORDS}
        path = locate_config(pretrained_model_name_or_path, subfolder, **hub_kwargs)
        values = cls.from_json_file(path)
        written_by = values.get("peft_version")
        try:
            config_cls = cls._class_of(values.get("peft_type"), written_by)
            extra = {f.name: kwargs[f.name] for f in dataclasses.fields(config_cls)
                     if f.name in kwargs and f.name not in hub_kwargs}  # fmt: skip
            config = config_cls.from_peft_type(**{**extra, **values})
        except ConfigError as error:
            raise type(error)(f"{path}: {error}") from error
        config.peft_version = written_by
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict:
        """The content of a config file as a dict.

        Raises:
            ConfigFileError: the file is missing, damaged, or holds no object; the message names it.
        """
        return _read_json(os.fspath(path_json_file))

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict:
        """Hook for configs whose fields were spelt differently in older files: returns the fields to use."""
        return kwargs

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """Upload `adapter_config.json` to a repository of the model hub, which is made if needed.

        `max_shard_size` is accepted for the sake of a common signature; a config is never split. Returns the address
        of the commit.
        """
        import tempfile

        from huggingface_hub import HfApi, metadata_update

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload adapter config",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        if tags:
            login = token if isinstance(token, str) else None
            metadata_update(repo_id, {"tags": tags}, token=login, revision=revision, create_pr=create_pr)
        return commit

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens or prefixes instead of weights."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether the method is LLaMA-Adapter, which places prompts inside attention layers."""
        return self.peft_type == PeftType.ADAPTION_PROMPT


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
        None, "Modules besides the adapter that are trained and saved whole, e.g. a classification head."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.modules_to_save = _name_list(self, "modules_to_save")

    @property
    def is_prompt_learning(self) -> bool:
        """True."""
        return True


# --------------------------------------------------------------------------------------- fields that methods share


def _names(config: PeftConfig, field: str) -> set[str] | str | None:
    """The value of a field of module names: None and text as they are, any other collection of texts as a set."""
    value = getattr(config, field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value):
        return set(value)
    raise ConfigError(f"{type(config).__name__}: {field} must be a list of module names, or a text; got {value!r}.")


def _name_list(config: PeftConfig, field: str) -> list[str] | None:
    value = getattr(config, field)
    if isinstance(value, list) and _names(config, field) is not None:
        return value
    names = _names(config, field)
    return None if names is None else [names] if isinstance(names, str) else sorted(names)


@dataclass
class TargetModules(PeftConfig):
    """Which modules are adapted."""

    target_modules: list[str] | str | None = option(
        None,
        "Modules to adapt. A list has names, or ends of names ('q_proj', 'layers.0.mlp.up_proj'); a text is a regular "
        "expression for whole names, or 'all-linear' for every linear layer but the head. Left out, it is looked up "
        "by the type of the model.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_modules = _names(self, "target_modules")  # type: ignore[assignment]


@dataclass
class ExcludeModules(PeftConfig):
    """Which of the targeted modules stay as they are."""

    exclude_modules: list[str] | str | None = option(
        None, "Modules to leave out of the targets: a list of names or ends of names, or a regular expression."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.exclude_modules = _names(self, "exclude_modules")  # type: ignore[assignment]


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
        isinstance(i, numbers.Integral) and not isinstance(i, bool) and i >= 0 for i in values
    )


@dataclass
class ModulesToSave(PeftConfig):
    """Modules that are trained whole."""

    modules_to_save: list[str] | None = option(
        None,
        "Modules besides the adapted ones that are trained whole and saved with the adapter, e.g. a new "
        "classification head.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.modules_to_save = _name_list(self, "modules_to_save")


@dataclass
class FanInFanOut(PeftConfig):
    """How the targeted layers keep their weight."""

    fan_in_fan_out: bool = option(
        False, "Whether the weight is kept as [in, out], as GPT-2's Conv1D does. Corrected where the layer type tells."
    )


@dataclass
class TrainedBias(PeftConfig):
    """Which biases of the base model are trained. A method sets `OWN_BIAS` to its third choice, e.g. 'lora_only'."""

    OWN_BIAS: ClassVar[str | None] = None

    bias: str = option(
        "none",
        "Which biases are trained: 'none', 'all' of the model, or '<method>_only' for those of adapted layers. With "
        "trained biases, the output of the disabled adapter is not that of the base model.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = ("none", "all", *([self.OWN_BIAS] if self.OWN_BIAS else []))
        _check_choice(f"{type(self).__name__}: bias", self.bias, {"choices": choices})


@dataclass
class RankPattern(PeftConfig):
    """Ranks that differ from the config's `r`."""

    rank_pattern: dict | None = option(
        dict,
        "Ranks of particular modules: a module name, an end of one, or a regular expression -> rank. Names that start "
        "with '^' are matched from the beginning. The first that matches counts.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank_pattern = check_pattern(self, "rank_pattern")
        for key, rank in self.rank_pattern.items():
            where = f"{type(self).__name__}: rank_pattern[{key!r}]"
            _check_bounds(where, rank, {"minimum": 1}, whole=True)


@dataclass
class RankPatterns(RankPattern):
    """Ranks and scales that differ from the config's `r` and alpha."""

    alpha_pattern: dict | None = option(dict, "Alphas of particular modules, with keys like those of `rank_pattern`.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alpha_pattern = check_pattern(self, "alpha_pattern")
        for key, alpha in self.alpha_pattern.items():
            if not isinstance(alpha, numbers.Real) or isinstance(alpha, bool):
                raise ConfigError(f"{type(self).__name__}: alpha_pattern[{key!r}]={alpha!r} is not a number.")


@functools.lru_cache(maxsize=4096)
def _compiled(key: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({key})")


def check_pattern(config: PeftConfig, field: str) -> dict[str, Any]:
    """The value of a pattern field as a dict, empty for None.

    Raises:
        ConfigError: it is no dict, or one of its keys is not a regular expression; the message names it.
    """
    pattern = getattr(config, field)
    if pattern is None:
        return {}
    if not isinstance(pattern, dict):
        raise ConfigError(f"{type(config).__name__}: {field} must be a dict of module name -> value, got {pattern!r}.")
    for key in pattern:
        try:
            _compiled(key)
        except (re.error, TypeError) as error:
            raise ConfigError(f"{type(config).__name__}: {field} has the bad key {key!r} ({error}).") from error
    return pattern


def match_pattern(keys: Iterable[str], name: str) -> str | None:
    """The first of `keys` that stands for the module `name`, or None.

    A key is a regular expression for the whole name or for its end after a dot; one that starts with "^" has to match
    from the beginning.
    """
    return next((key for key in keys if _compiled(key).fullmatch(name)), None)


def resolve_pattern(pattern: dict[str, Any] | None, key: str, default: Any) -> Any:
    """The value that a `*_pattern` field has for the module called `key`, or `default` if nothing matches."""
    matched = match_pattern(pattern or (), key)
    return default if matched is None or pattern is None else pattern[matched]

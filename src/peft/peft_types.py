"""The names of methods and tasks, and the registry in which each method enters itself.

`register_peft_method` is the one way in; the four mappings below are what the rest of the package reads. They are
filled by importing `peft.tuners`, and by third parties that register methods of their own. A package that has

    [project.entry-points."peft.methods"]
    my_method = "my_package.my_method"

brings the method `my_method`: importing that module registers it, and nobody has to import it. That happens when a
file, or a user, names the method, or somebody asks for all that there are; not before.
"""

from __future__ import annotations

import enum
import warnings
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from peft.errors import AdapterNameError, PeftWarning, nearest


class PeftType(str, enum.Enum):
    """The adapter methods that the file format names (`peft_type` in `adapter_config.json`)."""

    __module__ = "peft.utils.peft_types"  # in pickles

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


class OwnMethod(str):
    """The name of a method that :class:`PeftType` does not have, with what its members have and others ask for."""

    @property
    def value(self) -> str:
        return str(self)

    name = value


class TaskType(str, enum.Enum):
    """What the adapted model is for; it chooses the `PeftModelFor...` class."""

    __module__ = "peft.utils.peft_types"

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


# Keys are `PeftType` members or, for methods of third parties, plain upper-case strings. A member hashes and compares
# like its string, so both kinds are looked up alike.
PEFT_TYPE_TO_CONFIG_MAPPING: dict[str, Any] = {}
PEFT_TYPE_TO_TUNER_MAPPING: dict[Any, Any] = {}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[str, Any] = {}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[str, str] = {}

# Configs of adapters that are no method's, by the `peft_type` of their files: those that are made of other adapters.
CONFIGS_OF_NO_METHOD: dict[str, Any] = {}


# Methods that had another name in older files -> the one of today, and how tensors began then and begin now.
RENAMED_METHODS: dict[str, tuple[str, str, str]] = {"BONE": ("MISS", "bone_", "miss_")}


def parse_peft_type(name: str | PeftType) -> PeftType | OwnMethod:
    """The enum member called `name`, or `name` itself where a third party registered it, or has an entry point for it.

    Raises:
        ValueError: neither the enum nor the registry knows the name; the message has the nearest one.
    """
    if isinstance(name, PeftType):
        return name
    name = RENAMED_METHODS.get(name, (name,))[0]
    if name in PeftType.__members__:
        return PeftType[name]
    if name not in PEFT_TYPE_TO_CONFIG_MAPPING and name not in CONFIGS_OF_NO_METHOD:
        load_outside(name)
    if name in PEFT_TYPE_TO_CONFIG_MAPPING or name in CONFIGS_OF_NO_METHOD:
        return OwnMethod(name)
    known = [*PeftType.__members__, *(str(k) for k in PEFT_TYPE_TO_CONFIG_MAPPING if not isinstance(k, PeftType))]
    known += [point.name.upper() for point in entry_points(group=OUTSIDE) if (point.name, point.value) not in _tried]
    hint = nearest(name, known, cutoff=0.0)
    raise ValueError(f"Unknown peft_type {name!r}.{hint} Known: {', '.join(sorted(known))}.")


def listed(methods: Iterable[Any]) -> str:
    """Names of methods in order, as errors list them; such as those of a mapping above."""
    return ", ".join(sorted(str(getattr(method, "value", method)) for method in methods))


OUTSIDE = "peft.methods"
"""The group of entry points by which other packages bring methods."""

_tried: set[tuple[str, str]] = set()


def load_outside(name: str | None = None) -> None:
    """Import the methods of other packages that have an entry point, each once.

    One that cannot be imported, or is no method, is named in a warning; the others are imported all the same.

    Args:
        name: the method to import, in any case; all of them if None.
    """
    for point in entry_points(group=OUTSIDE):
        wanted = name is None or point.name.upper() == name.upper()
        if wanted and (point.name, point.value) not in _tried:
            _tried.add((point.name, point.value))
            _load(point)


def _load(point: EntryPoint) -> None:
    try:
        point.load()
        problem = "" if point.name.upper() in PEFT_TYPE_TO_CONFIG_MAPPING else "it registers no method of that name"
    except Exception as error:  # whatever the code of somebody else raises
        problem = f"{type(error).__name__}: {error}"
    if problem:
        package = f" of the package {point.dist.name!r}" if point.dist is not None else ""
        warnings.warn(
            f"the method {point.name!r}{package} is left out, since its entry point {point.value!r} ({OUTSIDE}) does "
            f"not work: {problem}. Update that package, or uninstall it.",
            PeftWarning,
        )


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"The name of a method must be an identifier such as 'my_method', got {name!r}.")
    if not name.islower():
        raise ValueError(f"The name of a method must be lower case: register {name!r} as {name.lower()!r}.")


def register_peft_method(
    *, name: str, config_cls: type, model_cls: type, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Make a method known to `get_peft_model`, `PeftConfig.from_pretrained` and the rest of the package.

    Args:
        name: lower-case name. Its upper case is the `peft_type`: a member of `PeftType` where there is one, and a
            plain string otherwise, so that third parties can add methods of their own.
        config_cls: config dataclass, a `PeftConfig`.
        model_cls: tuner class (or prompt encoder) that applies the method.
        prefix: how the names of the method's tensors start; `name + "_"` if not given.
        is_mixed_compatible: whether the method may be combined with others in a `PeftMixedModel`.

    Raises:
        ValueError: the name is not a lower-case identifier, is taken by another method, or its prefix belongs to
            another method. Nothing is registered then. Registering the same classes again is harmless.
        TypeError: `config_cls` or `model_cls` is not a class.
    """
    _check_name(name)
    for what, cls in (("config_cls", config_cls), ("model_cls", model_cls)):
        if not isinstance(cls, type):
            raise TypeError(f"{what} of method {name!r} must be a class, got {cls!r}.")
    key = PeftType.__members__.get(name.upper(), name.upper())
    prefix = f"{name}_" if prefix is None else prefix
    if not prefix:
        raise ValueError(f"The prefix of method {name!r} must not be empty.")
    entry = (config_cls, model_cls, prefix)
    taken: Any = (PEFT_TYPE_TO_CONFIG_MAPPING.get(key), PEFT_TYPE_TO_TUNER_MAPPING.get(key),
             PEFT_TYPE_TO_PREFIX_MAPPING.get(key))  # fmt: skip
    if taken[0] is not None and taken != entry:
        raise AdapterNameError(
            f"Method {name!r} is already registered with {taken[0].__name__} and {taken[1].__name__} "
            f"(prefix {taken[2]!r}); choose another name."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[key] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = prefix
    if is_mixed_compatible:
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING[key] = model_cls

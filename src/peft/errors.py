"""The exceptions and warnings of the package.

Errors that a user can act on are also the built-in kind they belong to (`ValueError`, `NotImplementedError`), so that
code which catches the built-in keeps working.
"""

import difflib
import re
from collections.abc import Iterable, Set


class PeftError(Exception):
    """Base of all exceptions that the package defines itself."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The targets of a config match no module of the model."""


class ConfigError(PeftError, ValueError):
    """A config, or the file it was read from, holds a value that has no meaning."""


class WrongTypeError(PeftError, ValueError, TypeError):
    """An argument is of a type that is not taken."""


class ConfigTypeError(ConfigError, WrongTypeError):
    """A field of a config holds something of a type that it does not take."""


class ConfigPatternError(ConfigError, re.error):
    """A field of a config holds a string that is no regular expression."""


class ConfigChoiceError(ConfigError, NotImplementedError):
    """A field of a config holds none of the values that it may have."""


class UnknownMethodError(ConfigError, KeyError, TypeError):
    """A config names no method, or one that nobody knows."""

    __str__ = BaseException.__str__  # a KeyError shows its message in quotation marks


class ConfigFileError(ConfigError, OSError):
    """An `adapter_config.json` is missing, unreadable or damaged."""


class NotAFolderError(ConfigFileError, NotADirectoryError, AssertionError):
    """What should be a folder to save to is a file."""


class MissingPackageError(ConfigError, ModuleNotFoundError):
    """What a config asks for needs a package that is not installed, or another version of it."""


class NoAdaptedLayersError(PeftError, ValueError, TypeError):
    """A model has no adapted layers, where an operation is about those."""


class MissingFileError(ConfigFileError, FileNotFoundError):
    """A file of an adapter is neither in a folder nor on the hub, or could not be fetched."""


class UnknownAdapterError(PeftError, ValueError, KeyError, RuntimeError):
    """A model has no adapter of this name."""

    __str__ = BaseException.__str__  # a KeyError shows its message in quotation marks


class AdapterNameError(PeftError, ValueError, KeyError):
    """A name that an adapter cannot have, or that another adapter or method has."""

    __str__ = BaseException.__str__


class OutOfRangeError(PeftError, ValueError, IndexError):
    """There are fewer tokens in the table, or layers in the model, than an index says."""


class NoEqualWeightError(PeftError, ValueError, NotImplementedError):
    """An adapter computes what no weight of the layer computes, so it cannot be merged."""


class UndeclaredBiasError(PeftError, ValueError, RuntimeError):
    """Merging would give layers a bias that the architecture does not declare."""


class MeaninglessError(PeftError, AttributeError, ValueError):
    """What means nothing for the model's method, or for a layer of its kind; to ``hasattr`` it does not exist."""


class NoSuchAttributeError(PeftError, AttributeError):
    """Neither a model with adapters nor its base model has an attribute; the nearest name is looked for when asked."""

    def __init__(self, name: str, owner: object, base: object) -> None:
        super().__init__(name=name, obj=owner)
        self.base = base

    def __str__(self) -> str:
        known = [n for n in (*dir(type(self.obj)), *dir(type(self.base))) if not n.startswith("_")]
        return (
            f"{type(self.obj).__name__!r} object has no attribute {self.name!r}, nor has its base model, "
            f"{type(self.base).__name__}.{nearest(self.name, known, cutoff=0.6)}"
        )


class CheckpointError(PeftError, ValueError, RuntimeError):
    """A file of adapter weights is damaged, or does not fit the model."""


class NotSupportedYetError(ConfigError, NotImplementedError):
    """A known method or option of the file format that this version recognises but cannot honour."""


class PeftWarning(UserWarning):
    """Something was accepted, but the outcome may not be what was meant."""


class UnusedEntryWarning(PeftWarning, RuntimeWarning):
    """A config asks for something that does not happen; the message names it, and the nearest that there is."""


def damaged(file: str, error: Exception) -> CheckpointError:
    """The error for a file that cannot be read; of the class that its reader raised as well, if that has its own."""
    own = type(error).__module__.startswith(("safetensors", "_pickle", "pickle"))
    kind = type("DamagedFileError", (CheckpointError, type(error)), {}) if own else CheckpointError
    return kind(f"{file} is damaged or no file of adapter weights ({type(error).__name__}: {error}).")


def nearest(value: object, known: Iterable[object], cutoff: float = 0.5) -> str:
    """A hint for error messages: " Did you mean 'x'?", or nothing if no known name resembles the value."""
    text = str(value).lower()

    def likeness(name: object) -> tuple[float, bool]:
        other = str(name).lower()
        # of equally close names, the one with the same letters: swapped letters are the usual slip
        return difflib.SequenceMatcher(None, text, other).ratio(), sorted(text) == sorted(other)

    best = max(known, key=likeness, default=None)
    return "" if best is None or likeness(best)[0] < cutoff else f" Did you mean {best!r}?"


def some(names: Iterable[object], most: int = 5) -> str:
    """Names in a message: the first of them, and how many more there are; those of a set in their order."""
    given = list(map(str, sorted(names) if isinstance(names, Set) else names))  # type: ignore[type-var]
    return ", ".join(given[:most]) + (f" and {len(given) - most} more" if len(given) > most else "")


CONVERSION = "convert_to_lora(model, rank, adapters, weights=weights) gives a LoRA that"
"""How errors begin to tell the way out where adapters of a method have no sum."""

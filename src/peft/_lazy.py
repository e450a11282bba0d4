"""Module attributes resolved on first use (PEP 562), so that importing a package imports none of its parts."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


Missing = Callable[[str], "str | None"]

# Where names are looked for that a module of 0.21 had imported from another one: third parties took them from there.
HOMES = (
    "peft.utils.peft_types",
    "peft.utils.constants",
    "peft.utils.other",
    "peft.utils.save_and_load",
    "peft.utils.integrations",
    "peft.utils.quantization_utils",
    "peft.utils.error",
    "peft.utils.warning",
    "peft.import_utils",
    "peft.tuners._buffer_dict",
    "peft.tuners.tuners_utils",
    "peft.mapping",
    "peft.tuners.lora",
    "peft",
)


def no_such_name(module_name: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that ``module_name`` does not have, with the closest of ``known`` if any is close."""
    message = f"module {module_name!r} has no attribute {name!r}"
    # Compared without case: `LoRaConfig` and `loraconfig` are as frequent as letters left out.
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.7)
    if close:
        message += f". Did you mean {' or '.join(repr(by_lower[match]) for match in close)}?"
    return message


def _asked_by_from_import() -> bool:
    """Whether ``__getattr__`` runs for ``from package import name``.

    Such a statement replaces the message of an ``AttributeError`` by "cannot import name", so ours has to travel in an
    ``ImportError``. For packages the import system first asks ``hasattr`` from this function of its own.
    """
    caller = sys._getframe(2)
    return caller.f_code.co_name == "_handle_fromlist" and caller.f_globals.get("__name__") == "importlib._bootstrap"


def lazy_module(
    module_name: str,
    table: Mapping[str, Iterable[str]],
    missing: Missing | None = None,
    homes: Iterable[str] = (),
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The ``__getattr__``, ``__dir__`` and ``__all__`` of a module whose names live in other modules.

    If the module is a package, its submodules are attributes too, imported when first asked for.

    Args:
        module_name: the module these are for, i.e. its ``__name__``.
        table: full name of a module -> the names it provides. The module is imported when one of them is asked for.
            A name found is kept in ``module_name``, so that the second access costs nothing.
        missing: called with a name that is not in the table; returns a message for the error, or None for the usual
            one, which names the closest match.
        homes: modules that are asked, in turn, for a name that is not in the table.

    Raises:
        ValueError: if two modules of the table claim the same name.

    The ``__getattr__`` raises ``AttributeError`` for an unknown name, and ``ImportError`` with the same message when
    the name is asked for by ``from module import name``.
    """
    origin: dict[str, str] = {}
    for source, names in table.items():
        for name in names:
            if name in origin:
                raise ValueError(f"{name!r} is listed for both {origin[name]!r} and {source!r} in {module_name!r}")
            origin[name] = source

    def __getattr__(name: str) -> Any:
        if name in origin:
            value = getattr(importlib.import_module(origin[name]), name)
            setattr(sys.modules[module_name], name, value)
            return value
        # Dunder names are asked for by tools (`__wrapped__`, `__file__`); they deserve no search.
        if name.startswith("__"):
            raise AttributeError(no_such_name(module_name, name, ()))
        if hasattr(sys.modules[module_name], "__path__") and importlib.util.find_spec(f"{module_name}.{name}"):
            return importlib.import_module(f"{module_name}.{name}")
        for home in homes:
            # By dir(), which no home answers with names that it would look for elsewhere itself.
            if home != module_name and name in dir(importlib.import_module(home)):
                return getattr(sys.modules[home], name)
        message = (missing(name) if missing else None) or no_such_name(module_name, name, origin)
        if _asked_by_from_import():
            raise ImportError(message, name=module_name, path=getattr(sys.modules[module_name], "__file__", None))
        raise AttributeError(message)

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[module_name]), *origin})

    return __getattr__, __dir__, sorted(origin)


def also_known(module_name: str) -> None:
    """Let a module answer for names that its namesake of 0.21 had imported, too: they are looked for in ``HOMES``.

    Such as ``from peft.peft_model import PeftType``. To checkers of types the module stays as it is written.
    """
    vars(sys.modules[module_name])["__getattr__"] = lazy_module(module_name, {}, homes=HOMES)[0]

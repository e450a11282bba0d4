"""What the storages of quantisation libraries have in common: W = dequantise(codes, scales), rounded when written."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from torch import nn

from peft.core.base.storage.plain import Storage


def is_from(thing: object, package: str, *names: str) -> bool:
    """Whether the class of an object, or a base of it, is one of these (any, if none is given) of a package.

    The package need not be there: an object of a library that was never imported cannot exist.
    """
    return package.partition(".")[0] in sys.modules and any(
        (cls.__module__ == package or cls.__module__.startswith(f"{package}."))
        and (not names or cls.__name__ in names)
        for cls in type(thing).__mro__
    )


class Quantized(Storage):
    """A weight kept as codes and scales. Subclasses say how they are read, and how written if they can be.

    Attributes:
        install: what to install, for messages.
    """

    lossless = False
    own_classes = True
    slots: ClassVar[tuple[str, ...]] = ("weight",)
    install = ""

    def matches(self, m: nn.Module, attribute: str) -> bool:
        return attribute == "weight" and any(is_from(m, package, name) for package, name in self.linears)

    def library(self, function: str | None = None) -> Any:
        """The library's module ``function``, by default the library.

        Raises:
            ImportError: if it is not there, or too old to have it.
        """
        package = str(self.linears[0][0]) if self.linears else str(self.name)
        path = function or package
        try:
            __import__(path)
        except ImportError as error:
            raise ImportError(
                f"a layer of this model is kept by {self.name}, of which {path!r} cannot be imported ({error}). "
                f"Install or upgrade it: pip install -U {self.install or self.name}"
            ) from error
        return sys.modules[path]

"""Import paths that the ecosystem knows: ``peft.tuners.<method>.{layer,config,model,bnb}`` is the method's file."""

from __future__ import annotations

import sys
from types import ModuleType


PARTS = ("config", "layer", "model", "bnb")


def alias_submodules(module: ModuleType) -> None:
    """Answer for the parts of a method that are no files of their own with ``module``, which holds its layer.

    The import system looks into ``sys.modules`` again after it has imported the parent, so this is all it takes.
    """
    parent, _, name = module.__name__.rpartition(".")
    package = parent if name in PARTS else module.__name__  # a method may be a package, with a file for its layer
    for part in PARTS:
        if sys.modules.setdefault(f"{package}.{part}", module) is module:
            vars(sys.modules[package]).setdefault(part, module)

"""The methods, one file each. Importing this package registers all of them: a method is there because its file is."""

from importlib import import_module
from pkgutil import iter_modules

import peft
from peft._lazy import lazy_module


import_module("peft.composition.config")  # whose files hold adapters that are made of others
for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

_TABLE = {module: names for module, names in peft._TABLE.items() if module.startswith(f"{__name__}.")}
_TABLE["peft.tuners.mixed"] = ("MixedModel",)
_TABLE["peft.tuners.multitask_prompt_tuning"] = (
    *peft._TABLE["peft.tuners.multitask_prompt_tuning"],
    "MultitaskPromptEmbedding",
)

__getattr__, __dir__, __all__ = lazy_module(__name__, _TABLE)

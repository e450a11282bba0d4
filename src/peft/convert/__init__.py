"""Adapters of other tools, from full models, in other sizes, and where they can be served."""

from peft.convert.extract import Extraction, extract_adapter
from peft.convert.resize import Resized, negate_adapter, rebase_adapter, resize_adapter
from peft.convert.serving import Serving, check_serving


__all__ = [
    "Extraction",
    "Resized",
    "Serving",
    "check_serving",
    "extract_adapter",
    "negate_adapter",
    "rebase_adapter",
    "resize_adapter",
]

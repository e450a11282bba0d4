"""Adapters of other tools, from full models, in other sizes, and where they can be served."""

from peft.convert.converting import Conversion, convert_adapter, format_of
from peft.convert.extract import Extraction, extract_adapter
from peft.convert.formats import FORMATS
from peft.convert.resize import Resized, negate_adapter, rebase_adapter, resize_adapter
from peft.convert.serving import Serving, check_serving


__all__ = [
    "FORMATS",
    "Conversion",
    "Extraction",
    "Resized",
    "Serving",
    "check_serving",
    "convert_adapter",
    "extract_adapter",
    "format_of",
    "negate_adapter",
    "rebase_adapter",
    "resize_adapter",
]

"""The path by which the ecosystem imports the tuner of mixed models; ``peft.tuners.mixed.model`` is this file too."""

import sys

from peft._lazy import also_known
from peft.core.model.mixed import MixedModel
from peft.peft_types import PEFT_TYPE_TO_MIXED_MODEL_MAPPING as COMPATIBLE_TUNER_TYPES
from peft.peft_types import PEFT_TYPE_TO_PREFIX_MAPPING


__all__ = ["COMPATIBLE_TUNER_TYPES", "MixedModel"]

# What unloads a mixed model by the names of its parts asks for these.
PREFIXES = [PEFT_TYPE_TO_PREFIX_MAPPING[method] for method in COMPATIBLE_TUNER_TYPES]

sys.modules[f"{__name__}.model"] = sys.modules[__name__]
also_known(__name__)

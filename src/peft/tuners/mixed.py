"""The path by which the ecosystem imports the tuner of mixed models."""

from peft.core.model.mixed import MixedModel
from peft.utils.peft_types import PEFT_TYPE_TO_MIXED_MODEL_MAPPING as COMPATIBLE_TUNER_TYPES


__all__ = ["COMPATIBLE_TUNER_TYPES", "MixedModel"]

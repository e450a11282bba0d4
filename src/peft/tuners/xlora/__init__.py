"""X-LoRA: W x + g sum_a s_a B_a A_a x, the s_a from a first pass of the frozen model (arXiv 2402.07148)."""

from peft.tuners.xlora.config import XLoraConfig
from peft.tuners.xlora.layer import XLoraClassifier, XLoraLayer
from peft.tuners.xlora.model import XLoraModel


__all__ = ["XLoraClassifier", "XLoraConfig", "XLoraLayer", "XLoraModel"]

"""Fused autograd functions. Plain torch operations are their specification, and tests hold the two equal."""

from peft.kernels.dora import adapted_norm, dora_linear
from peft.kernels.linear import Factors, active_rate, bare_weight, is_hooked, low_rank_linear
from peft.kernels.loss import chunked_cross_entropy, chunked_loss
from peft.kernels.strict import DenseUpdateError, is_plain, plain, strict


__all__ = [
    "DenseUpdateError",
    "Factors",
    "active_rate",
    "adapted_norm",
    "bare_weight",
    "chunked_cross_entropy",
    "chunked_loss",
    "dora_linear",
    "is_hooked",
    "is_plain",
    "low_rank_linear",
    "plain",
    "strict",
]

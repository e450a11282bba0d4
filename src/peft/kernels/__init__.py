"""Fused autograd functions. Plain torch operations are their specification, and tests hold the two equal."""

from peft.kernels.linear import Factors, active_rate, is_bare_linear, is_plain, low_rank_linear, plain


__all__ = ["Factors", "active_rate", "is_bare_linear", "is_plain", "low_rank_linear", "plain"]

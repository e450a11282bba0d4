"""bitsandbytes: W = absmax * code[q] in blocks of 4 bits (QLoRA, arXiv 2305.14314); W = SCB / 127 * q by rows of 8."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import nn

from peft.core.base.storage.quantized import Quantized


class BitsAndBytes4bit(Quantized):
    """``Linear4bit``: NF4 or FP4, with or without double quantisation.

    On CPUs with AVX512-BF16 the library repacks the codes at the first forward in evaluation mode. From then on its
    ``dequantize_4bit`` is wrong, so :meth:`read` undoes the packing in copies; and its product has no gradient for the
    input, not in training mode either, so what trains is unpacked for good (:meth:`keep_differentiable`).
    """

    name = "bitsandbytes"
    layer_name = "Linear4bit"
    linears: ClassVar[tuple[tuple[str, str], ...]] = (("bitsandbytes", "Linear4bit"),)
    fresh_output = True
    install = "'bitsandbytes>=0.50'"
    slots: ClassVar[tuple[str, ...]] = ("weight", "quant_state")

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        weight: Any = m.weight
        state = _state(m)
        if state is None:  # not quantised yet: that happens on the way to a device
            return weight.detach()
        return self.of_blocks(weight.data, state)

    def of_blocks(self, codes: torch.Tensor, state: Any) -> torch.Tensor:
        """What 4-bit codes with this state stand for."""
        return self.library("bitsandbytes.functional").dequantize_4bit(*self._unpacked(codes, state))

    def _unpacked(self, codes: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        """Codes and their state as they were before the library has packed them, the rounding of scales aside."""
        if not getattr(state, "packing_format_for_cpu", False):
            return codes, state
        state = copy.copy(state)
        state.original_nested = False  # the scales are dense now, and rounding them again would change W
        codes, state = self.library("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = state.absmax.T.reshape(-1).float().contiguous()
        return codes, state

    def keep_differentiable(self, m: nn.Module) -> None:
        if getattr(m, "support_avx512bf16_for_cpu", False):
            m.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        state = _state(m)
        if getattr(state, "packing_format_for_cpu", False):
            weight: Any = m.weight
            weight.data, state = self._unpacked(weight.data, state)
            weight.quant_state = m.quant_state = state

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        old: Any = m.weight
        state = _state(m)
        if state is None:
            value = value.to(old.dtype)
        else:
            value = value.to(getattr(state, "original_dtype", None) or state.dtype)
        # Moving to a device is what quantises; `module` is given so that its state becomes the new one too.
        new = type(old)(
            value.contiguous(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=m,
        )
        m.weight = new if state is None else new.to(value.device)

    def compute_dtype(self, m: nn.Module, attribute: str) -> torch.dtype | None:
        if m.compute_dtype is not None:
            return m.compute_dtype
        state = _state(m)
        return None if state is None else getattr(state, "original_dtype", None) or state.dtype


def _state(m: nn.Module) -> Any:
    """The quantisation state; sharding (FSDP) strips it off the parameter, and the module still has it."""
    own = getattr(m.weight, "quant_state", None)
    return getattr(m, "quant_state", None) if own is None else own


class BitsAndBytes8bit(Quantized):
    """``Linear8bitLt`` (LLM.int8, arXiv 2208.07339). Scales move from the weight to ``state`` at the first forward."""

    name = "bitsandbytes"
    layer_name = "Linear8bitLt"
    linears: ClassVar[tuple[tuple[str, str], ...]] = (("bitsandbytes", "Linear8bitLt"),)
    fresh_output = True
    install = "'bitsandbytes>=0.50'"
    slots: ClassVar[tuple[str, ...]] = ("weight", "state")

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        weight: Any = m.weight
        if weight.dtype != torch.int8:  # kept in 16 bits (has_fp16_weights), or not quantised yet
            return weight.detach()
        return of_rows(weight.data, weight.SCB if getattr(weight, "SCB", None) is not None else m.state.SCB)

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        old: Any = m.weight
        fp16 = m.state.has_fp16_weights
        # quantised on the way back
        new = type(old)(value.contiguous().cpu(), requires_grad=False, has_fp16_weights=fp16)
        state = copy.copy(m.state)  # the old one may be kept for unmerging
        state.CB = state.SCB = None
        m.weight, m.state = new.to(old.device) if old.dtype == torch.int8 else new.to(old.device, old.dtype), state


def of_rows(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What 8-bit codes ``[out, in]`` stand for: 127 is the largest magnitude of a row, which scales ``[out]`` hold."""
    return codes.float() * (scales.to(codes.device).float() / 127).unsqueeze(1)

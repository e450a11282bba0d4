"""HQQ: W = (q - zero) * scale in groups, found by half-quadratic optimisation (mobiusml.github.io/hqq_blog)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from peft.core.base.storage.quantized import Quantized


class HQQ(Quantized):
    """``HQQLinear``."""

    name = "hqq"
    fresh_output = True
    linears: ClassVar[tuple[tuple[str, str], ...]] = (("hqq", "HQQLinear"),)
    slots: ClassVar[tuple[str, ...]] = ("W_q", "meta")

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        return m.dequantize().detach()

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        if m.quant_config is None:
            raise ValueError("this HQQLinear was loaded without its quant_config, so hqq cannot quantise it again. "
                             "Call merge_and_unload(dequantize=True) for a dense merged layer.")  # fmt: skip
        options = {key: value for key, value in m.quant_config.items() if key != "offload_meta"}
        config = {**options, "offload_meta": m.offload_meta}  # the constructor takes it out of the config
        new = type(m)(None, config, compute_dtype=m.compute_dtype, device=str(m.device), initialize=False)
        new.quantize(value.contiguous(), **options)
        m.W_q, m.meta = nn.Parameter(new.W_q.data, requires_grad=False), new.meta

    def shift_groups(self, m: nn.Module, attribute: str, change: torch.Tensor, size: int) -> bool:
        meta = m.meta
        out, inner = meta["shape"]
        group = meta["group_size"] or inner
        # Only zero points that are numbers of their own, one for each group along the inputs, can hold the change.
        own = meta["axis"] == 1 and size % group == 0 and meta["zero"].is_floating_point() and "zero_q" not in meta
        if not own or meta["scale"].shape != meta["zero"].shape:
            return False
        for_each = change.repeat_interleave(size // group, 1).view_as(meta["zero"])  # (q - (zero - d / scale)) * scale
        m.meta = {**meta, "zero": meta["zero"] - (for_each / meta["scale"]).to(meta["zero"].dtype)}
        return True

    def compute_dtype(self, m: nn.Module, attribute: str) -> torch.dtype | None:
        return m.compute_dtype

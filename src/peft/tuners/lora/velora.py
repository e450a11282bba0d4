"""VeLoRA: for the gradient of A an input is kept as one number for each group of features (arXiv 2405.17991)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from peft.core.adapter import part, setting
from peft.core.base.kinds import Kind
from peft.core.layer.buffers import BufferDict
from peft.kernels import Factors, active_rate
from peft.kernels.autocast import is_autocast
from peft.kernels.dropout import Dropped, draw_seed
from peft.kernels.few import is_few
from peft.kernels.linear import NO_CONTEXT, is_eager, no_autocast, shaped_as
from peft.kernels.remake import is_held, kept, recomputed
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Lora


def grouped(x: torch.Tensor, count: int) -> torch.Tensor:
    """``[n, in]`` -> ``[n, count, width]``, width = ceil(in / count), with zeros behind the last feature."""
    width = -(-x.shape[1] // count)
    return F.pad(x, (0, count * width - x.shape[1])).view(len(x), count, width)


def average_direction(groups: torch.Tensor) -> torch.Tensor:
    """The mean ``[width]`` of all groups ``[n, count, width]``, of length one; 0 where n is."""
    return F.normalize(groups.flatten(0, 1).float().sum(0) / max(len(groups), 1), dim=0)


def gradient_of_down(dh: torch.Tensor, kept: torch.Tensor, v: torch.Tensor, features: int) -> torch.Tensor:
    """dh^T x' ``[r, in]`` with x' = kept v^T by group, which is never made.

    Args:
        dh: ``[n, r]``. kept: ``[n, count]``. v: ``[width]``.
    """
    return ((dh.T @ kept)[..., None] * v).flatten(1)[:, :features]


class VeLora(Lora):
    """LoRA's forward; the backward of A sees of each group x_g its projection (x_g v) v^T, v = ``lora_velora_embed``.

    A frozen base layer keeps no input, so what is kept falls from one number for each feature to one for each group.
    v is the mean direction of the groups of this input (or of the first one, or random), and is saved. In evaluation
    mode the gradient is LoRA's own.
    """

    option: ClassVar[str] = "velora_config"
    lora_velora_embed = part(BufferDict)
    velora_options = setting()
    agrees: ClassVar[frozenset[str]] = frozenset({"delta", "update"})

    @classmethod
    def refuses(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        if kind.matrix and not kind.read_by_parent:
            return None
        return "VeLoRA keeps less of the inputs of linear layers, and this is none, or another module computes for it"

    def make_pair(self, config: LoraConfig) -> None:
        super().make_pair(config)
        options: Any = config.velora_config
        self.velora_options = options
        width = -(-self.in_features // options.num_groups)
        random = options.init_type == "random"
        self.lora_velora_embed = F.normalize(torch.randn(width), dim=0) if random else torch.zeros(width)

    def product(self) -> Factors | None:
        return None if self._compresses() else super().product()

    def _compresses(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.held_pair()[0].requires_grad

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        rate = active_rate(self.lora_dropout)
        return super().delta(x) if rate is None or not self._compresses() else self._update(x, rate)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        return self._update(x, 0.0) if self._compresses() else super().update(x)

    def _update(self, x: torch.Tensor, rate: float) -> torch.Tensor:
        if not is_eager(x):
            return super().update(F.dropout(x, rate) if rate else x)
        options, (a, b) = self.velora_options, self.acting_pair()
        fixed = options.init_type == "random" or (options.init_type.endswith("once") and self.lora_velora_embed.any())
        v = self.lora_velora_embed if fixed else None
        drop = (rate, draw_seed()) if rate else None
        # r numbers of a token are scaled instead of its outputs, which a bias is among
        inner = 1.0 if self.lora_bias or isinstance(self.scaling, torch.Tensor) else self.scaling
        h, v = Compressed.apply(x, a, v, options.num_groups, options.scale, drop, inner)
        if not fixed:
            self.lora_velora_embed.copy_(v)
        with NO_CONTEXT if is_few(x) else recomputed():
            up = self.raised(h, b) if self.computes_pair else self.lora_B(h)
        return up if inner is self.scaling else up * self.scaling


class Compressed(Function):
    """``(s A drop(x), v)``: the product, of which the backward pass keeps x by group only, and the direction in use.

    Where x's own graph keeps x, or what makes it again, nothing is kept of it: not even the groups, nor the product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        v: torch.Tensor | None,
        count: int,
        scale: float,
        drop: tuple[float, int] | None,
        inner: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = x.device.type
        ctx.product_dtype = torch.get_autocast_dtype(device) if is_autocast(device) else x.dtype
        ctx.drop, ctx.shape, ctx.dtype, ctx.count, ctx.inner = drop, x.shape, x.dtype, count, inner
        ctx.kept, saved = (None, None) if is_few(x) else kept(x)
        ctx.is_free = ctx.kept is not None and (saved is None or is_held(x))
        with no_autocast(x):
            rows = Compressed.rows(ctx, x)
            groups = None if ctx.is_free and v is not None else grouped(rows, count)
            v = average_direction(groups) if v is None else v.clone()  # type: ignore[arg-type]
            ctx.towards = v * scale
            if not ctx.is_free:
                saved = groups @ ctx.towards.to(rows.dtype)  # type: ignore[operator]
            h = Compressed.product(ctx, x, rows, a)
        ctx.save_for_backward(saved, v, a)
        ctx.mark_non_differentiable(v)
        return h, v

    @staticmethod
    def rows(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """``drop(x)`` as ``[n, in]``."""
        rows = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
        return rows if ctx.drop is None else Dropped(*ctx.drop).copy(rows) / (1 - ctx.drop[0])

    @staticmethod
    def product(ctx: Any, x: torch.Tensor, rows: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """``s A drop(x)``, ``[..., r]``; rows are ``drop(x)``. No view, which would hide whose output it is."""
        h = rows.to(ctx.product_dtype) @ a.to(ctx.product_dtype).T
        h = h if ctx.inner == 1 else h.mul_(ctx.inner)
        return shaped_as(x, h)

    @staticmethod
    def recipe(ctx: Any, depth: int) -> Callable[[], torch.Tensor] | None:
        """How the product is made again, where x is there without being kept."""

        def again() -> torch.Tensor:
            x, _, a = ctx.saved_tensors
            x = ctx.kept.read() if x is None else x
            with torch.no_grad(), no_autocast(x):
                return Compressed.product(ctx, x, Compressed.rows(ctx, x), a)

        return again if ctx.is_free else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        by_group, v, a = ctx.saved_tensors
        dh, dx = gradient.reshape(-1, len(a)), None
        if ctx.inner != 1:
            dh = dh * ctx.inner
        if ctx.is_free:
            rows = Compressed.rows(ctx, ctx.kept.get(by_group))
            by_group = grouped(rows, ctx.count) @ ctx.towards.to(rows.dtype)
        da = gradient_of_down(dh.to(a.dtype), by_group.to(a.dtype), v.to(a.dtype), a.shape[1])
        if ctx.needs_input_grad[0]:
            dx = Compressed.rows(ctx, dh @ a.to(dh.dtype)).view(ctx.shape).to(ctx.dtype)
        return dx, da, None, None, None, None, None

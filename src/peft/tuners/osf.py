"""OSF: W' = U_h S_h V_h + U_l S_l V_l, W's top frozen and its tail trained beside it (arXiv 2504.07097)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import ModulesToSave, TargetModules, option, resolve_pattern
from peft.core.adapter import part, setting
from peft.core.base.kinds import fan
from peft.core.families import Fold
from peft.core.layer.buffers import BufferDict
from peft.core.model.registry import define_tuner
from peft.errors import ConfigError
from peft.kernels.decompositions import svd
from peft.kernels.made_again import Transformable
from peft.peft_types import PeftType


@dataclass
class OSFConfig(TargetModules, ModulesToSave):
    """Config of OSF: the large singular directions of W keep what the model knows, the small ones learn.

    For learning tasks one after another without forgetting: gradients along the frozen directions are left out. As
    many numbers train as the tail of the decomposition has, which is far more than a LoRA's.
    """

    METHOD: ClassVar[PeftType] = PeftType.OSF

    effective_rank: int | float | None = option(
        None,
        "How many of the largest singular values are frozen with their vectors: a number, or a share of all below 1. "
        "Left out, half of them.",
    )
    rank_pattern: dict[str, float] | None = option(
        None,
        "effective_rank of particular modules: a module name, an end of one, or a regular expression -> rank.",
        names=dict,
    )
    init_weights: bool | None = option(
        True, "Start with the tail of W, so that nothing changes; otherwise at random numbers."
    )
    target_svd_config: dict | None = option(
        None,
        "Not used: rank_pattern says the same and more. Part of the file format, where it is empty.",
        instead="rank_pattern says which module keeps which rank.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = {f"rank_pattern[{key!r}]": value for key, value in (self.rank_pattern or {}).items()}
        for field, rank in {"effective_rank": self.effective_rank, **ranks}.items():
            if rank is not None and not (type(rank) is int and rank > 0 or type(rank) is float and 0 < rank < 1):
                raise ConfigError(
                    f"OSFConfig: {field}={rank!r} is not valid: it must be a whole number of at least 1, or a share "
                    "of the singular values, between 0 and 1."
                )


def osf_weight(
    u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, top_u: torch.Tensor, top_v: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """W' = U_h S_h V_h + U_l S_l V_l, ``[out, in * kernel]``; gradients have no part along U_h and V_h.

    Args:
        u, s, v: U_l ``[out, k]``, S_l ``[k]``, V_l ``[k, in * kernel]``.
        top_u, top_v: U_h ``[out, n]`` and V_h ``[n, in * kernel]``. high: U_h S_h V_h.
    """
    u, v = _Beside.of(u, top_u), _Beside.of(v.T, top_v.T).T
    return torch.addmm(high, u * s, v)


class OSF(Fold):
    """W' = U_h S_h V_h + U_l S_l V_l, from the SVD of W as ``[out, in * kernel]``; k = rank - effective rank.

    ``osf_svd_params`` has U_low ``[out, k]``, S_low ``[k]`` and V_low ``[k, in * kernel]``. The frozen part is made
    from the base again when a file is loaded; it takes as much memory as W twice over.
    """

    osf_svd_params = part(nn.ModuleDict)
    osf_U_high, osf_V_high = part(BufferDict, remade=True), part(BufferDict, remade=True)
    osf_high = part(BufferDict, remade=True)
    effective_rank = setting()

    def create(self, config: OSFConfig, key: str) -> None:
        rank = min(fan(self.shape))
        wanted = resolve_pattern(config.rank_pattern, key, config.effective_rank)
        top = rank // 2 if wanted is None else int(wanted * rank) if isinstance(wanted, float) else wanted
        if top >= rank:
            raise ConfigError(
                f"effective_rank={wanted} freezes all of the {rank} singular values of "
                f"{key or type(self.base).__name__!r}, and nothing is left to train. Lower it there, by "
                "rank_pattern, or leave that module out of target_modules."
            )
        u, s, v = svd(self.base_weight().detach().flatten(1).float())
        low: Any = u[:, top:], s[top:], v[top:]
        if not config.init_weights:
            low = tuple(torch.randn(tensor.shape) for tensor in low)
        low = {sub: nn.Parameter(tensor.contiguous()) for sub, tensor in zip(("U_low", "S_low", "V_low"), low)}
        self.effective_rank, self.osf_svd_params = top, nn.ParameterDict(low)
        self.freeze(u[:, :top], s[:top], v[:top])

    def freeze(self, u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> None:
        """Keep U_h, S_h and V_h."""
        self.osf_U_high, self.osf_V_high, self.osf_high = u.contiguous(), v.clone(), (u * s) @ v

    def loaded(self) -> None:
        if self.osf_high.is_meta:
            top = self.effective_rank
            u, s, v = svd(self.base_weight().detach().flatten(1).float())
            self.freeze(u[:, :top], s[:top], v[:top])

    def folded(self, base: torch.Tensor) -> torch.Tensor:
        low = self.osf_svd_params
        tensors = low["U_low"], low["S_low"], low["V_low"], self.osf_U_high, self.osf_V_high, self.osf_high
        return osf_weight(*(tensor.to(base.dtype) for tensor in tensors)).view_as(base)

    def change(self, dtype: torch.dtype | None) -> torch.Tensor:
        base = self.base_weight()  # the difference of two large weights is formed before it is rounded
        return (self.folded(base) - base).to(dtype=dtype)


class _Beside(Transformable):
    """A matrix as it is; its gradient without what lies in the span of the orthonormal columns of another."""

    @staticmethod
    def forward(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return matrix.view_as(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (columns,) = ctx.saved_tensors
        return torch.addmm(gradient, columns, columns.T @ gradient, alpha=-1), None


OSFModel = define_tuner(OSF, OSFConfig, default_roles=("linear",))

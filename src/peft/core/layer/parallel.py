"""Linear layers of which each process computes a part (tensor parallelism), and adapters, which each has whole.

Which part is told by the widths: a layer that takes less than its input has the input's columns cut, one that gives
less than its output has the output's rows cut. What an adapter holds is the same on all processes, and so are its
gradients; a file knows nothing of the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from peft.core.base.storage.sharded import Team, is_dtensor
from peft.kernels.linear import Factors, product_dtype


if TYPE_CHECKING:
    from peft.core.layer.layer import BaseTunerLayer


_AVAILABLE = torch.distributed.is_available()  # asked in each call of each layer


def several_processes() -> bool:
    """Whether this process has others beside it, that it may exchange tensors with."""
    return _AVAILABLE and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def team_of(layer: BaseTunerLayer, x: Any) -> Team | None:
    """The processes that compute the layer together; None where this one has all of it, or DTensors are passed on."""
    if not several_processes() or not layer.kind.matrix or layer.kind.opaque or is_dtensor(x):
        return None
    mesh = layer.storage.mesh(layer.get_base_layer(), layer.kind.weight)
    return None if mesh is None else Team(mesh)


def low_rank(layer: BaseTunerLayer, team: Team, x: torch.Tensor, factors: Sequence[Factors]) -> torch.Tensor:
    """The base layer and low-rank updates: only the products of rank r go from process to process."""
    y = layer.base_layer(x)
    cut_x, cut_y = x.shape[-1] != layer.in_features, y.shape[-1] != layer.out_features
    dtype = product_dtype(y)
    for f in factors:
        down, up = f.down.to(dtype), f.up.to(dtype)
        inner = F.dropout(x, f.dropout) if f.dropout else x
        hidden = F.linear(inner.to(dtype), team.part(down, 1) if cut_x else down)
        if cut_x:
            hidden = team.sum(hidden)
        if cut_y:
            hidden, up = team.fork(hidden), team.part(up, 0)
        y = y + (F.linear(hidden, up) * f.scale).to(y.dtype)
    return y


def as_whole(
    layer: BaseTunerLayer, team: Team, x: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """What ``compute`` makes of the whole input with a base layer that takes and gives wholes; this process's part."""
    base, cut = layer._modules["base_layer"], []

    def before(module: Any, args: tuple) -> tuple:
        return (team.part(args[0]), *args[1:]) if x.shape[-1] != layer.in_features else args

    def after(module: Any, args: tuple, y: torch.Tensor) -> torch.Tensor:
        if y.shape[-1] == layer.out_features:
            return y
        cut.append(True)
        return team.whole(y, layer.out_features)

    with base.register_forward_pre_hook(before), base.register_forward_hook(after):  # type: ignore[union-attr]
        y = compute(x if x.shape[-1] == layer.in_features else team.whole(x, layer.in_features))
    return team.part(y) if cut else y

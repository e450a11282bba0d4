"""Weights of which each process holds a part: ``DTensor`` (FSDP 2, tensor parallelism), FSDP 1 and DeepSpeed ZeRO-3.

Reading gathers, and every process has to take part. What was gathered is gone when the caller lets go of it. Nothing
is gathered for methods whose forward needs no dense weight.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import compress
from operator import not_
from typing import Any

import torch
from torch import nn

from peft.core.base.storage.plain import Storage


FSDP1_INNER = "_fsdp_wrapped_module"
# What DeepSpeed ZeRO-3 leaves on every module. It asks by `hasattr` whether one has them already, so a wrapper must
# not answer for the module that it wraps.
MARKS = frozenset({"pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"})


class Distributed(Storage):
    """A parameter that is a ``torch.distributed.tensor.DTensor``."""

    replaceable = False

    def matches(self, m: nn.Module, attribute: str) -> bool:
        return is_dtensor(m._parameters.get(attribute))

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        return getattr(m, attribute).detach().full_tensor()

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        old = getattr(m, attribute)
        new = distributed_like(value.to(old.dtype), old)
        if shared:
            setattr(m, attribute, nn.Parameter(new, requires_grad=False))
        else:  # in place: whoever shards the model holds on to the memory of its part
            with torch.no_grad():
                old.to_local().copy_(new.to_local())

    def keep(self, m: nn.Module, attribute: str) -> tuple[nn.Parameter, torch.Tensor]:
        parameter = getattr(m, attribute)
        return parameter, parameter.detach().to_local().clone()

    def put_back(self, m: nn.Module, attribute: str, kept: tuple[nn.Parameter, torch.Tensor]) -> None:
        parameter, local = kept
        with torch.no_grad():
            parameter.to_local().copy_(local)  # type: ignore[operator]
        setattr(m, attribute, parameter)

    def read_kept(self, m: nn.Module, attribute: str, kept: tuple[Any, torch.Tensor]) -> torch.Tensor:
        like, local = kept
        make = sys.modules["torch.distributed.tensor"].DTensor.from_local
        sizes = {"shape": like.shape, "stride": like.stride()}  # which the parts do not tell where they are not equal
        return make(local, like.device_mesh, like.placements, run_check=False, **sizes).full_tensor()

    def call(self, m: nn.Module, tensors: Mapping[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        own = {name: getattr(m, name, None) for name in tensors}
        given = {
            name: distributed_like(value, own[name]) if is_dtensor(own[name]) and not is_dtensor(value) else value
            for name, value in tensors.items()
        }
        return super().call(m, given, args, kwargs)

    def mesh(self, m: nn.Module, attribute: str) -> Any:
        return getattr(m, attribute).device_mesh

    def holds_updates_exactly(self, m: nn.Module, attribute: str) -> bool:
        return False  # an update would have to be gathered with it

    def anchor(self, m: nn.Module, attribute: str) -> torch.Tensor:
        return getattr(m, attribute).to_local()


def is_dtensor(value: Any) -> bool:
    """Whether this is a ``DTensor``; the module that defines it is only asked if it is there."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor with all of its parts, on every process; all have to take part. Others are as they were."""
    if value.shape != getattr(value, "ds_shape", value.shape):  # where a context around has it whole, it stays so
        with gathered([value]):
            return value.detach().clone()
    return value.detach().full_tensor() if is_dtensor(value) else value  # type: ignore[operator]


def partitioned(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Those of which DeepSpeed ZeRO-3 has left a process its part."""
    return [t for t in tensors if hasattr(t, "ds_id")] if "deepspeed" in sys.modules else []


def is_fsdp1(module: nn.Module) -> bool:
    """Whether this is a ``FullyShardedDataParallel``, which stands around a module."""
    return FSDP1_INNER in module._modules and hasattr(module, "_handle")


def tensors_in(module: nn.Module) -> dict[str, torch.Tensor]:
    """``module.state_dict(keep_vars=True)``, without what FSDP 1 gathers for it, and its names."""
    if not any(is_fsdp1(m) for m in module.modules()):
        return module.state_dict(keep_vars=True)
    found = {}
    for path, m in module.named_modules():
        start = "".join([f"{part}." for part in path.split(".") if part and part != FSDP1_INNER])
        kept = {n: b for n, b in m._buffers.items() if n not in m._non_persistent_buffers_set}
        found.update({start + name: t for name, t in (m._parameters | kept).items() if t is not None})
    return found


@torch.no_grad()
def fill(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy tensors that every process has whole into those of which each may hold a part, (old, new)."""
    ordinary = [_ORDINARY.issuperset(map(type, pair)) for pair in pairs]
    if any(ordinary):  # by one call: an adapter has hundreds of small ones
        torch._foreach_copy_(*map(list, zip(*compress(pairs, ordinary))))
    for old, value in compress(pairs, map(not_, ordinary)):
        old.copy_(distributed_like(value.to(old.dtype), old) if is_dtensor(old) else value)


_ORDINARY = frozenset((torch.Tensor, nn.Parameter))


class Team:
    """The processes of a mesh that compute a layer together, and how a tensor gets from parts to a whole and back.

    A *part* is a process's own share of the last axis (of ``dim``); a *whole* is the same tensor on every process, and
    so is its gradient. All four pass gradients.
    """

    def __init__(self, mesh: Any) -> None:
        self.mesh, self.of = mesh, sys.modules["torch.distributed.tensor"]

    def whole(self, part: torch.Tensor, size: int) -> torch.Tensor:
        """All parts, put together; ``size`` is the length of the last axis then."""
        shape = torch.Size((*part.shape[:-1], size))
        # Of the whole: the sizes of the parts do not tell it where they differ.
        stride = torch.empty(shape, device="meta").stride()
        parts = self.of.DTensor.from_local(
            part.contiguous(), self.mesh, [self.of.Shard(-1)], run_check=False, shape=shape, stride=stride
        )
        return parts.full_tensor(grad_placements=[self.of.Replicate()])

    def part(self, value: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """This process's part of a whole."""
        return self._replicated(value).redistribute(placements=[self.of.Shard(dim % value.dim())]).to_local()

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of what the processes have."""
        partial = self.of.DTensor.from_local(value, self.mesh, [self.of.Partial()], run_check=False)
        return partial.redistribute(placements=[self.of.Replicate()]).to_local()

    def fork(self, value: torch.Tensor) -> torch.Tensor:
        """A whole from which each process computes a part of its own: its gradients are summed."""
        return self._replicated(value).to_local(grad_placements=[self.of.Partial()])

    def _replicated(self, value: torch.Tensor) -> Any:
        return self.of.DTensor.from_local(value, self.mesh, [self.of.Replicate()], run_check=False)

    def agree(self, value: torch.Tensor) -> None:
        """Give all processes the tensor of the first."""
        for group in self.mesh.get_all_groups():
            first = torch.distributed.get_global_rank(group, 0)
            torch.distributed.broadcast(value.detach(), first, group)


def distributed_like(value: torch.Tensor, like: Any) -> Any:
    """A tensor that every process has whole, cut as a ``DTensor`` is, without communication; gradients pass."""
    module = sys.modules["torch.distributed.tensor"]
    whole = [module.Replicate()] * like.device_mesh.ndim
    value = module.DTensor.from_local(value.to(like.to_local().device), like.device_mesh, whole, run_check=False)
    return value.redistribute(placements=like.placements)


class FSDP1(Storage):
    """A module that is a unit of ``FullyShardedDataParallel``: its parameters are there while it is called."""

    def matches(self, m: nn.Module, attribute: str) -> bool:
        return is_fsdp1(m)

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        unit = sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel
        with unit.summon_full_params(m, recurse=False, writeback=False):
            return getattr(m, attribute).detach().clone()  # the gathered one is freed on leaving

    def unwritable(self, m: nn.Module, attribute: str) -> str | None:
        return (
            "the layer is a unit of FSDP, and nothing can be merged into its parts. Save the adapter, load the base "
            "model without FSDP, and merge there."
        )

    def anchor(self, m: nn.Module, attribute: str) -> torch.Tensor:
        return next(m.parameters())


class ZeRO3(Storage):
    """A parameter that DeepSpeed ZeRO-3 has partitioned: empty but for the time in which it is gathered."""

    replaceable = False

    def matches(self, m: nn.Module, attribute: str) -> bool:
        return hasattr(m._parameters.get(attribute), "ds_id")

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        parameter = getattr(m, attribute)
        with gathered([parameter]):
            return parameter.detach().clone()  # the gathered one is freed on leaving

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        parameter = getattr(m, attribute)
        if shared:
            raise ValueError(
                f"the {attribute} of this {type(m).__name__} is another module's as well, and a parameter that "
                "DeepSpeed ZeRO-3 has partitioned cannot be replaced in one of them: nothing can be merged into it. "
                "Keep the adapter unmerged, or merge it without ZeRO-3."
            )
        with gathered([parameter], modifier_rank=0), torch.no_grad():
            parameter.data.copy_(value)

    def keep(self, m: nn.Module, attribute: str) -> torch.Tensor:
        return getattr(m, attribute).ds_tensor.detach().clone()

    def put_back(self, m: nn.Module, attribute: str, kept: torch.Tensor) -> None:
        parameter = getattr(m, attribute)
        if parameter.data.numel():  # gathered for good, as small ones are: it has to be gathered anew
            parameter.partition()
        parameter.ds_tensor.data.copy_(kept)

    def call(self, m: nn.Module, tensors: Mapping[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        rest = [p for name, p in m.named_parameters() if name not in tensors and hasattr(p, "ds_id")]
        with gathered(rest):  # its hooks expect parameters of their own, and would not know the given ones
            return super().call(_Bare(m), {f"module.{name}": t for name, t in tensors.items()}, args, kwargs)

    def output_may_be_overwritten(self, m: nn.Module, attribute: str) -> bool:
        return False


class _Bare(nn.Module):
    """A module whose hooks are left out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


@contextmanager
def gathered(parameters: list[Any], modifier_rank: int | None = None) -> Iterator[None]:
    """A context in which parameters of ZeRO-3 are whole; those that are not partitioned stay as they are.

    Args:
        modifier_rank: the process whose changes all get on leaving; None if nothing is changed.
    """
    if modifier_rank is None:  # a module that computes has its own whole, and DeepSpeed refuses to free them
        parameters = [p for p in parameters if not getattr(p, "ds_active_sub_modules", ())]
    if not parameters:
        yield
        return
    with sys.modules["deepspeed"].zero.GatheredParameters(parameters, modifier_rank=modifier_rank):
        yield

"""LoRA on the tensor-parallel linear layers of Megatron-Core, whose weights are split over processes.

Each process holds its shard of A or of B, as it holds its shard of W: of a column-parallel layer (W split by outputs)
B is split, of a row-parallel one (by inputs) A is. The pair is made of the library's own layers, so its sums over
processes are theirs; the shard of s B A is the product of what a process holds, so merging needs none.
"""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import torch
from torch import nn

from peft.core.base.kinds import Kind
from peft.core.filling import unfilled_linear
from peft.errors import MissingPackageError


class ParallelLinear(Kind):
    """A linear layer that gives ``(output, bias)`` of activations ``[tokens, batch, features]``.

    Attributes:
        layer: its name in ``megatron.core.tensor_parallel``. kept: what its part of the pair has as the layer has it.
    """

    types: tuple[type, ...] = ()

    def __init__(self, layer: str, *kept: str) -> None:
        self.layer, self.kept = layer, (*kept, "is_expert", "tp_group")

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        out, inner = m.weight.shape
        return int(out), int(inner)

    def part(self, m: Any, inner: int, out: int, **options: Any) -> nn.Module:
        """A layer of the same class as the pair needs it: without bias, and with a tensor as its output."""
        cls = next(cls for cls in self.types if isinstance(m, cls))
        config = copy.copy(m.config)
        config.perform_initialization = False
        options |= {name: getattr(m, name) for name in self.kept if hasattr(m, name)}
        made = cls(inner, out, config=config, init_method=_no_values, bias=False, skip_bias_add=True, **options)
        made.__class__ = _as_part(cls)  # whose forward gives one tensor, not Megatron's pair
        return made

    def replicated(self, m: Any, inner: int, out: int) -> nn.Module:
        """The factor that all processes hold; split sequences give it the gradient of their own tokens."""
        made = unfilled_linear(inner, out)
        # By which Megatron sums its gradient over the processes.
        made.weight.sequence_parallel = bool(m.config.sequence_parallel)
        return made

    def refused(self, config: Any, variants: list[type]) -> str | None:
        """Why what a config asks for, with these variants, has no meaning on a parallel layer; or None."""
        if not config.megatron_config:
            return "parallel layers are adapted where megatron_config is given"
        more = [variant.__name__ for variant in variants]
        more += ["lora_bias"] if config.lora_bias else []
        if config.init_lora_weights not in (True, False, "gaussian"):
            more.append(f"init_lora_weights={config.init_lora_weights!r}")
        if not more:
            return None
        return f"no process holds all of a parallel layer's weight or pair, which {', '.join(more)} would need"

    def tensor_in(self, output: Any) -> torch.Tensor:
        return output[0]

    def with_tensor(self, output: Any, y: torch.Tensor) -> Any:
        return (y, *output[1:])

    def batch_axis(self, m: nn.Module) -> int:
        return 1


class ColumnParallel(ParallelLinear):
    """W is split by outputs: A is replicated, B is split."""

    def factor(self, m: Any, r: int, bias: bool = False) -> tuple[nn.Module, nn.Module]:
        return self.replicated(m, m.input_size, r), self.part(m, r, m.output_size)


class RowParallel(ParallelLinear):
    """W is split by inputs: A is split, and its outputs are summed over the processes; B is replicated."""

    def factor(self, m: Any, r: int, bias: bool = False) -> tuple[nn.Module, nn.Module]:
        return self.part(m, m.input_size, r), self.replicated(m, r, m.output_size)


class _Part:
    """What a layer of the library lacks to be a factor."""

    weight: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0]  # type: ignore[misc]

    def reset_parameters(self) -> None:
        """Draw values as ``nn.Linear`` does."""
        nn.Linear.reset_parameters(self)  # type: ignore[arg-type]


@functools.cache
def _as_part(cls: type) -> type:
    return type(cls.__name__, (_Part, cls), {"__module__": __name__})


def _no_values(weight: torch.Tensor) -> torch.Tensor:
    return weight


PARALLEL = (
    ColumnParallel("ColumnParallelLinear", "gather_output"),
    RowParallel("RowParallelLinear", "input_is_parallel"),
)


def use_library(name: str) -> None:
    """Let the parallel layers of a library be adapted.

    Args:
        name: ``megatron.core``, or a package that offers the same.

    Raises:
        MissingPackageError: if it cannot be imported, or has no such layers.
    """
    try:
        layers = importlib.import_module(f"{name}.tensor_parallel")
        found = [getattr(layers, kind.layer) for kind in PARALLEL]
    except (ImportError, AttributeError) as error:
        raise MissingPackageError(
            f"megatron_config adapts the parallel layers of {name!r}, which cannot be used here: {error}. Install it "
            "(pip install megatron-core), name the package that has tensor_parallel.ColumnParallelLinear and "
            "RowParallelLinear in megatron_core, or leave megatron_config out to adapt the model's other layers."
        ) from error
    for kind, cls in zip(PARALLEL, found):
        kind.types = tuple(dict.fromkeys((*kind.types, cls)))

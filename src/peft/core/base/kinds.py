"""How a kind of base layer uses its weight: asked and answered here, never by a method.

A method sees every base layer as ``y = apply(x, W) + b`` with ``W`` dense and ``[out, in, *kernel]``. How that ``W``
is *kept* (plain, 4-bit, sharded, ...) is the other, independent question: see :mod:`peft.core.base.storage`.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft.core.base.rows import joined, rows_of
from peft.core.base.storage import foreign_linear
from peft.core.filling import unfilled, unfilled_linear
from peft.errors import MeaninglessError, NoEqualWeightError, WrongTypeError


class Kind:
    """One kind of layer. Stateless; the module is passed in.

    Attributes:
        name: class name that adapted layers of this kind carry (``lora.Linear``, ``lora.Conv2d``).
        weight, bias: attributes of the module that hold W and b (``bias`` is None where there is none).
        opaque: the module multiplies by W itself, in its own forward: W is swapped in for the call.
        read_by_parent: another module reads ``layer.weight`` instead of calling the layer.
        lookup: x holds indices, W is a table.
        companions: sub-modules that belong to the layer and are adapted with it.
        fan_in_fan_out: W is stored ``[in, out]``.
        channel_axis: the axis of x and y that holds the features.
        matrix: ``y = x W^T + b`` along the last axis of x.
        whole: the module's weight is nobody's concern.
    """

    name = "Linear"
    types: tuple[type, ...] = (nn.Linear,)
    weight = "weight"
    bias: str | None = "bias"
    opaque = False
    read_by_parent = False
    lookup = False
    companions: tuple[str, ...] = ()
    fan_in_fan_out = False
    channel_axis = -1
    matrix = False
    whole = False

    def matches(self, m: nn.Module) -> bool:
        return isinstance(m, self.types)

    def refusal(self, m: nn.Module) -> str | None:
        """Why this very module cannot be adapted, or None."""
        return None

    @property
    def read_elsewhere(self) -> bool:
        """Whether the layer's weight is read by another computation: an adapter acts by a weight, or not at all."""
        return self.opaque or self.read_by_parent

    def target_name(self, key: str) -> str:
        """What a config calls the weight that is adapted in the module of this name."""
        return key

    def is_own(self, m: nn.Module) -> bool:
        """Whether the module's own forward is just :meth:`apply` with W as it is stored, and b."""
        return type(m) in self.types

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        """``[out, in, *kernel]`` of W, without reading W."""
        return m.out_features, m.in_features

    def sizes(self, m: nn.Module) -> tuple[int, int]:
        """Features of x and of y."""
        out, inner = self.shape(m)[:2]
        return inner, out

    def orient(self, w: torch.Tensor, m: nn.Module) -> torch.Tensor:
        """From the stored layout to ``[out, in, *kernel]``."""
        return w

    def restore(self, w: torch.Tensor, m: nn.Module) -> torch.Tensor:
        """From ``[out, in, *kernel]`` to the stored layout."""
        return w

    def apply(self, m: nn.Module, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """``W x``, without bias."""
        return F.linear(x, w)

    def gradients(
        self, m: nn.Module, x: torch.Tensor, w: torch.Tensor, gradient: torch.Tensor, wanted: tuple[bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of x and of W from that of :meth:`apply`'s output, those that are wanted."""
        if not any(wanted):
            return None, None
        # Backward passes run without gradients, and this one needs a graph of its own.
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(want) if want else t for t, want in zip((x, w), wanted)]
            y = self.apply(m, *inputs)
        found = iter(torch.autograd.grad(y, [t for t, want in zip(inputs, wanted) if want], gradient))
        of_x, of_w = (next(found) if want else None for want in wanted)
        return of_x, of_w

    def factor(self, m: nn.Module, r: int, bias: bool = False) -> tuple[nn.Module, nn.Module]:
        """A low-rank pair (down, up) for this layer, with the shapes of the file format and no values yet."""
        inner, out = self.sizes(m)
        return unfilled_linear(inner, r), unfilled_linear(r, out, bias)

    def compose(self, m: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """The dense weight that a pair stands for. Raises ValueError where no weight of the layer equals it."""
        return b @ a

    def pairs(self, m: nn.Module, a: torch.Tensor, b: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of A and B as the pairs that act apart from each other: one for each group, or expert."""
        return [(a, b)]

    def no_dense_pair(self, m: nn.Module) -> str | None:
        """Why no weight of this layer equals a low-rank pair, or None."""
        return None

    def down(self, m: nn.Module, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """``A x`` for a matrix A ``[r, in * kernel]`` that multiplies x as the weight ``[out, in * kernel]`` does."""
        return self.apply(m, x, a)

    def up(self, m: nn.Module, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``B h`` for a matrix B ``[out, r]`` and what :meth:`down` gives."""
        return F.linear(h, b)

    def along_channels(self, v: torch.Tensor, m: nn.Module) -> torch.Tensor:
        """A vector over features, shaped to multiply x or y."""
        return v

    def scaled(self, m: nn.Module, y: torch.Tensor) -> torch.Tensor:
        """What the layer makes of vectors from its table: some multiply them by a number."""
        return y

    def channels_last(self, y: torch.Tensor) -> torch.Tensor:
        """x or y with the features as the last axis, a view."""
        return y

    def channels_back(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`channels_last`."""
        return y

    def tensor_in(self, output: Any) -> torch.Tensor:
        """The y in what the layer gives."""
        return output

    def with_tensor(self, output: Any, y: torch.Tensor) -> Any:
        """What the layer gives, with another y."""
        return y

    def batch_axis(self, m: nn.Module) -> int:
        return 0

    def take_rows(self, m: nn.Module, args: tuple, kwargs: dict, rows: torch.Tensor) -> tuple[tuple, dict]:
        """The call's inputs for some rows of the batch."""
        return (rows_of(args[0], rows, self.batch_axis(m)), *args[1:]), kwargs

    def join_rows(self, m: nn.Module, parts: list[Any], order: torch.Tensor) -> Any:
        """The outputs of several groups of rows, put back into the order of the batch."""
        return self.with_tensor(parts[0], joined([*map(self.tensor_in, parts)], order, self.batch_axis(m)))


class Linear(Kind):
    """``nn.Linear``, and the linear layers of quantisation libraries: W is ``[out, in]``, x has its features last."""

    matrix = True

    def gradients(
        self, m: nn.Module, x: torch.Tensor, w: torch.Tensor, gradient: torch.Tensor, wanted: tuple[bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        of_x = gradient @ w if wanted[0] else None
        rows = gradient.reshape(-1, gradient.shape[-1])
        return of_x, rows.T @ x.reshape(-1, x.shape[-1]) if wanted[1] else None

    def matches(self, m: nn.Module) -> bool:
        # The special kinds below mean one class each; whatever else is linear is of the general kind.
        return isinstance(m, self.types) or (type(self) is Linear and foreign_linear(m) is not None)

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        storage = None if isinstance(m, self.types) else foreign_linear(m)
        return (m.out_features, m.in_features) if storage is None else storage.linear_shape(m)


class AttentionOutput(Linear):
    """``out_proj`` of ``nn.MultiheadAttention``, which reads the weight and never calls the layer."""

    types = (nn.modules.linear.NonDynamicallyQuantizableLinear,)
    read_by_parent = True


class TransposedLinear(Linear):
    """``Conv1D`` of GPT-2: W is stored ``[in, out]``."""

    fan_in_fan_out = True

    def matches(self, m: nn.Module) -> bool:
        # Who has such a layer has imported the library, so the question imports nothing.
        pytorch_utils = sys.modules.get("transformers.pytorch_utils")
        return pytorch_utils is not None and isinstance(m, pytorch_utils.Conv1D)

    def is_own(self, m: nn.Module) -> bool:
        return type(m).__name__ == "Conv1D"

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        return m.nf, m.nx

    def orient(self, w: torch.Tensor, m: nn.Module) -> torch.Tensor:
        return w.T

    restore = orient


class Conv(Kind):
    """Convolution of one, two or three dimensions, with any stride, padding, padding mode, dilation and groups."""

    def __init__(self, dims: int):
        self.dims = dims
        self.channel_axis = -1 - dims
        self.name = f"Conv{dims}d"
        self.types = ((nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1],)

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        return m.out_channels, m.in_channels // m.groups, *m.kernel_size

    def sizes(self, m: nn.Module) -> tuple[int, int]:
        return m.in_channels, m.out_channels

    def apply(self, m: nn.Module, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return m._conv_forward(x, w, None)  # knows of padding modes, unlike F.conv

    def down(self, m: nn.Module, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        a = a.view(-1, *self.shape(m)[1:])
        return m._conv_forward(x, a.repeat(m.groups, *[1] * (a.dim() - 1)), None)  # each group has its own A x

    def up(self, m: nn.Module, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        return convolve(h, b.reshape(*b.shape, *[1] * self.dims), groups=m.groups)

    def along_channels(self, v: torch.Tensor, m: nn.Module) -> torch.Tensor:
        return v.reshape(-1, *[1] * self.dims)

    def channels_last(self, y: torch.Tensor) -> torch.Tensor:
        return y.movedim(-self.dims - 1, -1)

    def channels_back(self, y: torch.Tensor) -> torch.Tensor:
        return y.movedim(-1, -self.dims - 1)

    def factor(self, m: nn.Module, r: int, bias: bool = False) -> tuple[nn.Module, nn.Module]:
        if r % m.groups:
            raise ValueError(
                f"rank {r} does not divide over the {m.groups} groups of the convolution {m}; choose a multiple of "
                f"{m.groups}, for instance with rank_pattern."
            )
        conv = self.types[0]
        # A moves over the input as the base's kernel does; B looks at one place of what A gives.
        options = {"stride": m.stride, "padding": m.padding, "dilation": m.dilation, "padding_mode": m.padding_mode}
        down = unfilled(conv, m.in_channels, r, m.kernel_size, bias=False, **options)
        return down, unfilled(conv, r, m.out_channels, 1, groups=m.groups, bias=bias)

    def compose(self, m: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if reason := self.no_dense_pair(m):
            raise NoEqualWeightError(reason)
        return torch.einsum("or,ri...->oi...", b.flatten(1), a)

    def pairs(self, m: nn.Module, a: torch.Tensor, b: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(a.chunk(m.groups), b.chunk(m.groups)))

    def no_dense_pair(self, m: nn.Module) -> str | None:
        if m.groups == 1:
            return None
        return (
            f"a low-rank pair on a convolution with {m.groups} groups reads all {m.in_channels} input channels, but "
            f"the kernel of each group only {m.in_channels // m.groups}: no grouped kernel equals it, so it can "
            "neither be merged nor turned into a weight. Keep the adapter unmerged."
        )


class Embedding(Kind):
    """A table of vectors, also with the output scale that some transformers put on it (``embed_scale``).

    W is the transposed table, ``[dim, tokens]``: x selects columns.
    """

    name = "Embedding"
    types = (nn.Embedding,)
    bias = None
    lookup = True

    def refusal(self, m: nn.Module) -> str | None:
        if m.max_norm is None:
            return None
        return "its max_norm rewrites the table in every forward call; set max_norm=None to adapt it"

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        return m.embedding_dim, m.num_embeddings

    def orient(self, w: torch.Tensor, m: nn.Module) -> torch.Tensor:
        return w.T

    restore = orient

    def apply(self, m: nn.Module, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.embedding(x, w.T, m.padding_idx)  # padding_idx matters for gradients alone
        return self.scaled(m, y)

    def scaled(self, m: nn.Module, y: torch.Tensor) -> torch.Tensor:
        scale = getattr(m, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, torch.Tensor) else scale)  # a float32 buffer would widen y


class Attention(Kind):
    """``nn.MultiheadAttention`` with its packed q, k and v; the module multiplies by its weight itself."""

    name = "MultiheadAttention"
    types = (nn.MultiheadAttention,)
    weight, bias = "in_proj_weight", "in_proj_bias"
    opaque = True
    companions = ("out_proj",)

    def refusal(self, m: nn.Module) -> str | None:
        if m._qkv_same_embed_dim:
            return None
        return "its key and value sizes differ from the query's, so it has no packed in_proj_weight"

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        return 3 * m.embed_dim, m.embed_dim

    def batch_axis(self, m: nn.Module) -> int:
        return 0 if m.batch_first else 1

    def take_rows(self, m: nn.Module, args: tuple, kwargs: dict, rows: torch.Tensor) -> tuple[tuple, dict]:
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        call = dict(zip(names, args), **kwargs)
        batch = call["query"].shape[self.batch_axis(m)]
        for name in ("query", "key", "value"):
            call[name] = rows_of(call[name], rows, self.batch_axis(m))
        if call.get("key_padding_mask") is not None:
            call["key_padding_mask"] = rows_of(call["key_padding_mask"], rows)
        # Of three dimensions, it holds a mask for each head: batch and heads share the first axis.
        mask = call.get("attn_mask")
        if mask is not None and mask.dim() == 3:
            call["attn_mask"] = rows_of(mask.unflatten(0, (batch, -1)), rows).flatten(0, 1)
        return (), call

    def join_rows(self, m: nn.Module, parts: list[Any], order: torch.Tensor) -> Any:
        outputs, weights = zip(*parts)
        averages = None if weights[0] is None else joined(weights, order)
        return joined(outputs, order, self.batch_axis(m)), averages


class Whole(Kind):
    """A module whose weight is of no concern: it is called, copied or replaced whole.

    Of a mixed batch, it gets the rows of the first argument. Nothing of it can be asked that needs a weight.
    """

    name = "Whole"
    types = (nn.Module,)
    weight, bias = "", None
    whole = True

    def shape(self, m: nn.Module) -> tuple[int, ...]:
        raise MeaninglessError(  # torch.jit asks modules for all of their properties
            f"{type(m).__name__} is none of {', '.join(kind_names())}, so there is no one weight of it to read, fold "
            "or merge. modules_to_save, and methods that train a copy of a module, can take it."
        )

    def orient(self, w: torch.Tensor, m: nn.Module) -> torch.Tensor:
        self.shape(m)
        return w

    restore = orient

    def apply(self, m: nn.Module, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return self.orient(w, m)

    def take_rows(self, m: nn.Module, args: tuple, kwargs: dict, rows: torch.Tensor) -> tuple[tuple, dict]:
        if args:
            return super().take_rows(m, args, kwargs, rows)
        first = next(iter(kwargs))
        return (), {**kwargs, first: rows_of(kwargs[first], rows)}

    def join_rows(self, m: nn.Module, parts: list[Any], order: torch.Tensor) -> Any:
        if not all(isinstance(part, torch.Tensor) for part in parts):
            raise WrongTypeError(
                f"adapter_names cannot be used here: {type(m).__name__} gives no single tensor, so what the adapters "
                "make of their rows cannot be put together. Activate one adapter at a time with set_adapter."
            )
        return super().join_rows(m, parts, order)


WHOLE = Whole()


# The more special kinds come first.
KINDS: list[Kind] = [
    AttentionOutput(),
    Linear(),
    TransposedLinear(),
    Conv(1),
    Conv(2),
    Conv(3),
    Embedding(),
    Attention(),
]


def kind_of(m: nn.Module) -> Kind | None:
    """The kind of a base layer, or None where no kind knows it."""
    return next((kind for kind in KINDS if kind.matches(m)), None)


def innermost(module: Any) -> nn.Module:
    """The layer inside an adapted one; any other module as it is."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def foreign_kind(layer_cls: type, m: nn.Module) -> Kind | None:
    """How a layer class of a third party sees a base layer of its own: whole, unless that says its features."""
    if layer_cls.__module__.startswith("peft."):
        return None
    return Kind() if hasattr(m, "in_features") and hasattr(m, "out_features") else WHOLE


def kind_names() -> list[str]:
    """Names of all layer kinds, for messages."""
    return ["Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding", "MultiheadAttention"]


def fan(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight ``[out, in, *kernel]`` as a matrix: (out, in * kernel)."""
    return shape[0], math.prod(shape[1:])

"""The layers on which the laws are checked: small models, their inputs, and which modules in them are adapted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class ScaledEmbedding(nn.Embedding):
    """An embedding which multiplies its output by a constant, as those of Gemma and of BART-like models do."""

    def __init__(self, count: int, width: int, embed_scale: float) -> None:
        super().__init__(count, width)
        self.register_buffer("embed_scale", torch.tensor(embed_scale), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> [..., width]."""
        return super().forward(ids) * self.embed_scale


class Stack(nn.Module):
    """Three experts kept in 3-D parameters [experts, in, out], and a 2-D gate."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        if is_transposed:
            self.is_transposed = True
        self.up = nn.Parameter(torch.randn(3, 6, 10) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 10, 6) * 0.3)
        self.gate = nn.Parameter(torch.randn(3, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, 6] -> [batch, 6]."""
        hidden = torch.tanh(torch.einsum("bi,eio->beo", x, self.up))
        out = torch.einsum("beo,eoi->bei", hidden, self.down)
        return (out * self.gate).sum(1)


class Chain(nn.Module):
    """Layers one after another, tanh between them, and a base parameter that no adapter owns.

    Their names hold a number, `blocks.0.layer`: an adapter called "0" must not be taken for it.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"layer": layer}) for layer in layers)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, ...] -> [batch, ...]."""
        for i, block in enumerate(self.blocks):
            x = block["layer"](torch.tanh(x) if i else x)
        return x * self.gain


class Attending(nn.Module):
    """`nn.MultiheadAttention` over a batch-first input, whichever way round the layer wants it."""

    def __init__(self, batch_first: bool, bias: bool = True) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [batch, tokens, 8], mask [batch, tokens] true where padded -> [batch, tokens, 8]."""
        x = x if self.attn.batch_first else x.transpose(0, 1)
        y, weights = self.attn(x, x, value=x, key_padding_mask=mask, need_weights=mask is not None)
        y = y if self.attn.batch_first else y.transpose(0, 1)
        return y * self.gain if weights is None else y * self.gain + weights.sum(-1, keepdim=True)


class Encoder(nn.Module):
    """torch's transformer layer, whose fast path reads the weights of its parts and calls none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """x [batch, tokens, 8], mask [batch, tokens] true where padded -> [batch, tokens, 8]."""
        return self.block(x, src_key_padding_mask=mask) * self.gain


class Encoders(nn.Module):
    """A stack of such layers, which drops padded tokens where it takes the fast path."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
        self.stack = nn.TransformerEncoder(layer, 2)
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, 8], mask [batch, tokens] true where padded -> [batch, tokens, 8], zero where padded."""
        y = self.stack(x, src_key_padding_mask=mask) * self.gain
        return y.masked_fill(mask[..., None], 0)


@dataclass(frozen=True)
class Place:
    """A layer to adapt: a small model, its inputs, and the layers in it that are adapted.

    Attributes:
        targets: entries of `target_modules`, or of `target_parameters` where `parameters`.
        inputs: makes the inputs for a batch of six.
        affine: the output is that of one adapted layer, so updates of the weight add up in it.
        fast_path: torch may compute the plain model by other kernels, so it is compared with a tolerance.
        deep: rounding errors go through several layers.
        invoked: the model is called with token ids, each row with the invocation token: for variants that wait for it.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[torch.Tensor, ...]]
    targets: tuple[str, ...] = ("layer",)
    parameters: bool = False
    affine: bool = False
    fast_path: bool = False
    deep: bool = False
    invoked: bool = False

    @property
    def kind(self) -> str:
        return self.name.partition("[")[0]

    @property
    def has_bias(self) -> bool:
        """Whether the adapted layers have a bias."""
        return "no-bias" not in self.name and self.kind not in ("Embedding", "Parameter")

    @property
    def typical(self) -> bool:
        """Whether it stands for its kind where one layer of a kind is enough."""
        return self.name in TYPICAL or self.invoked


TYPICAL = (
    "Linear",
    "Linear[no-bias]",
    "Conv1D",
    "Conv1d[stride]",
    "Conv2d[stride]",
    "Conv2d[groups]",
    "Conv3d[stride]",
    "Embedding[scaled]",
    "MultiheadAttention[masked]",
    "LayerNorm",
    "Parameter[3d]",
)

BATCH = 6


def _numbers(*shape: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: (torch.randn(BATCH, *shape),)


def _tokens(count: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: ((torch.arange(BATCH * 5).view(BATCH, 5) * 7) % count,)


def _masked() -> tuple[torch.Tensor, ...]:
    lengths = torch.tensor([5, 4, 3, 5, 2, 4])
    return torch.randn(BATCH, 5, 8), torch.arange(5)[None] >= lengths[:, None]


def chain(layer: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """Makes a :class:`Chain` of one such layer."""
    return lambda: Chain(layer(*args, **options))


LAYERS = [
    Place("Linear", lambda: Chain(nn.Linear(8, 12), nn.Linear(12, 8)), _numbers(3, 8)),
    Place("Linear[no-bias]", chain(nn.Linear, 8, 12, bias=False), _numbers(8), affine=True),
    Place("Linear[encoder]", Encoder, _numbers(5, 8), ("linear1", "linear2"), fast_path=True),
    Place("Linear[out_proj]", lambda: Attending(True), _numbers(5, 8), ("out_proj",), fast_path=True),
    Place("Conv1D", chain(Conv1D, 12, 8), _numbers(3, 8), affine=True),
    Place("Conv1d[stride]", chain(nn.Conv1d, 4, 6, 3, stride=2, padding=2), _numbers(4, 7), affine=True),
    Place(
        "Conv1d[circular]",
        chain(nn.Conv1d, 4, 6, 3, padding="same", dilation=2, padding_mode="circular", bias=False),
        _numbers(4, 7),
        affine=True,
    ),
    Place(
        "Conv2d[stride]",
        chain(nn.Conv2d, 2, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
        _numbers(2, 6, 5),
        affine=True,
    ),
    Place(
        "Conv2d[same]",
        chain(nn.Conv2d, 2, 6, (3, 4), padding="same", dilation=(2, 1)),
        _numbers(2, 6, 5),
        affine=True,
    ),
    Place(
        "Conv2d[reflect]",
        chain(nn.Conv2d, 4, 6, 3, padding=(1, 2), padding_mode="reflect"),
        _numbers(4, 5, 6),
        affine=True,
    ),
    Place("Conv2d[groups]", chain(nn.Conv2d, 8, 6, (2, 3), groups=2, padding=1), _numbers(8, 4, 5), affine=True),
    Place("Conv2d[pointwise]", chain(nn.Conv2d, 8, 4, 1), _numbers(8, 3, 3), affine=True),
    Place(
        "Conv3d[stride]",
        chain(nn.Conv3d, 2, 6, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0)),
        _numbers(2, 3, 5, 2),
        affine=True,
    ),
    Place(
        "Conv3d[groups]",
        chain(nn.Conv3d, 4, 6, (2, 1, 2), groups=2, padding=1, padding_mode="replicate", bias=False),
        _numbers(4, 3, 2, 3),
        affine=True,
    ),
    Place("Embedding", chain(nn.Embedding, 11, 8), _tokens(11), affine=True),
    Place("Embedding[padding_idx]", chain(nn.Embedding, 11, 8, padding_idx=4), _tokens(11), affine=True),
    Place("Embedding[scaled]", chain(ScaledEmbedding, 11, 8, 2.5), _tokens(11), affine=True),
    Place("MultiheadAttention", lambda: Attending(True), _numbers(5, 8), ("attn",), fast_path=True),
    Place("MultiheadAttention[masked]", lambda: Attending(True), _masked, ("attn",), fast_path=True),
    Place("MultiheadAttention[sequence-first]", lambda: Attending(False), _masked, ("attn",)),
    Place("MultiheadAttention[no-bias]", lambda: Attending(True, bias=False), _numbers(5, 8), ("attn",)),
    Place("MultiheadAttention[encoder]", Encoder, _masked, ("self_attn",), fast_path=True),
    Place("MultiheadAttention[encoders]", Encoders, _masked, ("self_attn", "linear1"), fast_path=True, deep=True),
    Place("LayerNorm", lambda: Chain(nn.LayerNorm(8)), _numbers(3, 8)),
    Place("LayerNorm[encoder]", Encoder, _numbers(5, 8), ("norm1",), fast_path=True),
    Place("Parameter[2d]", lambda: Chain(Stack(False)), _numbers(6), ("layer.gate",), parameters=True),
    Place("Parameter[3d]", lambda: Chain(Stack(False)), _numbers(6), ("down", "up"), parameters=True),
    Place("Parameter[transposed]", lambda: Chain(Stack(True)), _numbers(6), ("up", "down", "gate"), parameters=True),
    Place("Parameter[weight]", chain(nn.Linear, 8, 12), _numbers(8), ("layer.weight",), parameters=True, affine=True),
]

"""What the laws are tested on: methods x layers x dtypes, and the combinations that have no meaning.

Methods come from the registry: a newly registered one is tested without a change here, unless its config has no small
default (`EXTRAS`). `REFUSED` is the one list of holes in the table, each with the reason that the library must give.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import nn
from toys import ScaledEmbedding, Stack
from transformers.pytorch_utils import Conv1D

import peft.tuners  # noqa: F401  registers the methods
from peft import PeftConfig, PeftModel, get_peft_model
from peft.core.blocks.blocks import BlockLayer
from peft.core.families import Copy, Delta, Fold, Output, Rotation, Rows, Sample, Scale
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import locate, walk
from peft.utils.peft_types import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


# --- methods --------------------------------------------------------------------------------------------------

EXTRAS: dict[str, dict[str, Any]] = {
    "oft": {"oft_block_size": 4},
    "road": {"group_size": 2},
    "boft": {"boft_block_size": 2},
    "adalora": {"init_r": 4, "target_r": 2, "total_step": 10},
    "trainable_tokens": {"token_indices": [1, 3, 6]},
    "vblora": {"num_vectors": 10, "vector_length": 4, "init_vector_bank_bound": 0.7},
    "unilora": {"theta_d_length": 32, "init_theta_d_bound": 2.0},
    "tinylora": {"u": 6},
    "randlora": {"randlora_alpha": 8},
    "poly": {"n_skills": 2, "r": 1},
    "mtl_lora": {"n_up_projection": 2, "weights_sharpness": 1.0},
    "shira": {"r": 1, "random_seed": 3},
    "supertuning": {"sparsity": 0.5},
    "c3a": {"block_size": 4},
    "fourierft": {"n_frequency": 12, "scaling": 30.0},
    "waveft": {"n_frequency": 12, "scaling": 4.0},
    "gralora": {"alpha": 8},
    "delora": {"delora_lambda": 4},
    "miss": {"r": 3},
    "psoft": {"r": 3, "psoft_alpha": 4},
    "adamss": {"num_subspaces": 3, "subspace_rank": 2},
    "frod": {"sparse_rate": 0.2, "progressbar": False},
}
"""Method -> fields without which it does nothing small; `r`, where it counts, is 4 for every method."""

SECOND: dict[str, dict[str, Any]] = {"trainable_tokens": {"token_indices": [0, 2]}}
"""Method -> fields that a second adapter has to have otherwise if both are to be active."""

VARIANTS: dict[str, dict[str, Any]] = {
    "lora[dora]": {"use_dora": True},
    "lora[rslora]": {"use_rslora": True, "lora_alpha": 3},
    "lora[bias]": {"lora_bias": True},
    "lora[gaussian]": {"init_lora_weights": "gaussian"},
    "lora[orthogonal]": {"init_lora_weights": "orthogonal"},
    "lora[random]": {"init_lora_weights": False},
    "lora[mica]": {"init_lora_weights": "mica"},
    "lora[kasa]": {"kasa_config": {"beta": 0.1}},
    "lora[bdlora]": {"use_bdlora": {"target_modules_bd_b": [".*"], "nblocks": 2}},
    "lora[bdlora-a]": {"use_bdlora": {"target_modules_bd_a": [".*"], "nblocks": 4}},
    "lora[qalora]": {"use_qalora": True, "qalora_group_size": 4},
    "lora[velora]": {"velora_config": {"num_groups": 3, "init_type": "random"}},
    "lora[monteclora]": {"monteclora_config": {"num_samples": 3}},
    "ia3[feedforward]": {"feedforward_modules": r".*"},
    "oft[blocks]": {"r": 2, "oft_block_size": 0},
    "oft[exact]": {"use_cayley_neumann": False},
    "oft[shared]": {"block_share": True},
    "oft[constrained]": {"coft": True, "eps": 1.0},
    "oft[terms]": {"num_cayley_neumann_terms": 7},
    "boft[butterfly]": {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
    "boft[blocks]": {"boft_block_size": 0, "boft_block_num": 2, "init_weights": False},
    "deft[qr]": {"decomposition_method": "qr", "alpha": 6},
    "deft[para]": {"para": True},
    "deft[random]": {"init_weights": False, "init_scale": 20.0},
    "glora[vector]": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    "glora[constant]": {"config_A_B": "constant", "config_C": "none"},
    "glora[random]": {"config_A_B": "constant", "init_weights": False},
    "vera[drawn]": {"save_projection": False, "projection_prng_key": 5},
    "hira[random]": {"init_weights": False},
    "randlora[sparse]": {"sparse": True, "randlora_alpha": 8},
    "randlora[drawn]": {"very_sparse": True, "save_projection": False, "projection_prng_key": 5, "randlora_alpha": 8},
    "poly[splits]": {"n_splits": 2},
    "mtl_lora[linear]": {"task_specific_matrix_type": "linear"},
    "lily[shared]": {"stride_A": 2, "num_B": 3, "scaling": 0.7},
    "lily[token]": {"routing": "token"},
    "unilora[indices]": {"save_indices": True, "proj_seed": 5},
    "supertuning[pair]": {"sparsity": 0.7, "r": 2, "lora_alpha": 3, "save_precomputed_indices": False},
    "c3a[pattern]": {"block_size_pattern": {".*": 3}, "init_weights": True},
    "waveft[entries]": {"use_idwt": False, "n_frequency": 12, "init_weights": False},
    "waveft[db4]": {"wavelet_family": "db4", "n_frequency": 12, "scaling": 8.0},
    "gralora[hybrid]": {"alpha": 8, "gralora_k": 4, "hybrid_r": 2},
    "miss[bat]": {"r": 3, "init_weights": "bat"},
    "miss[mini]": {"r": 3, "init_weights": "mini", "mini_r": 2},
    "peanut[deep]": {"depth": 2, "act_fn": "gelu", "scaling": 2.0},
    "psoft[free]": {"psoft_orth": False, "r": 3, "psoft_alpha": 2, "ab_svd_init": "pissa_init"},
    "psoft[series]": {"use_cayley_neumann": True, "cayley_neumann_eps": 0.9, "r": 3, "psoft_svd": "lowrank"},
    "tinylora[tied]": {"weight_tying": 0.5, "init_weights": "uniform", "save_projection": False},
    "hra[odd]": {"r": 3},
    "hra[orthogonal]": {"apply_GS": True, "init_weights": False},
    "road[2]": {"variant": "road_2"},
    "road[4]": {"variant": "road_4"},
    "beft[random]": {"init_weights": False},
    "frod[drawn]": {"init_weights": False, "save_projection": False, "sparse_rate": 0.1},
    "osf[random]": {"init_weights": False, "effective_rank": 0.3},
    "adamss[random]": {"init_weights": None, "num_subspaces": 2, "use_dynamic_rank": True, "subspace_rank": 4},
}
"""Main switches of single methods, as rows of their own: method[switch] -> fields."""

INVOCATION = 10  # a token that is in each row of the inputs of `Linear[tokens]`
VARIANTS["lora[alora]"] = {"alora_invocation_tokens": [INVOCATION]}

COMBINED = (
    *("dora+kasa", "dora+velora", "dora+monteclora", "dora+bdlora", "dora+bdlora-a", "dora+qalora", "dora+mica"),
    *("kasa+velora", "kasa+monteclora", "kasa+mica", "velora+monteclora", "velora+bdlora-a", "velora+qalora"),
    *("velora+mica", "monteclora+bdlora", "monteclora+mica", "qalora+mica"),
    *("alora+dora", "alora+kasa", "alora+velora", "alora+monteclora", "alora+bdlora", "alora+qalora", "alora+mica"),
    *("dora+rslora", "kasa+rslora", "velora+rslora", "monteclora+rslora", "bdlora+rslora", "qalora+rslora"),
    *("mica+rslora", "alora+rslora", "dora+gaussian", "dora+orthogonal", "kasa+gaussian", "kasa+orthogonal"),
    *("velora+gaussian", "velora+orthogonal", "monteclora+gaussian", "monteclora+orthogonal", "qalora+gaussian"),
    *("alora+gaussian", "alora+orthogonal", "alora+bias", "alora+dora+mica"),
)
"""The variants of LoRA that mean something together: each is a row, and meets one kind of layer."""

APART = {
    "dora+arrow": "no update of its own",
    **{f"arrow+{name}": "no update of its own" for name in ("kasa", "velora", "monteclora", "bdlora", "qalora")},
    "arrow+mica": "could start",
    "arrow+loftq": "could start",
    "kasa+bdlora": "no product of blocks",
    "kasa+qalora": "differs within a group",
    "monteclora+bdlora-a": "fill the zeros between the blocks",
    "monteclora+qalora": "one for each group",
    "bdlora+qalora": "cut the same axis in two ways",
    "mica+bdlora": "singular vectors of the whole weight|a start of its own",
    "bdlora+gaussian": "a start of its own",
    "qalora+orthogonal": "A is smaller",
    "qalora+pissa": "A is smaller",
    "qalora+eva": "A is smaller",
    "bdlora+pissa": "a start of its own",
    "kasa+pissa": "would not come back",
    "arrow+pissa": "could start",
    "arrow+eva": "could start",
    "alora+loftq": "changes the base weight",
    "alora+pissa": "changes the base weight",
}
"""The variants that mean nothing together -> what the error must say."""


def fields_of(combination: str) -> dict[str, Any]:
    """The fields of several variants of LoRA at once."""
    more: dict[str, dict[str, Any]] = {"lora[arrow]": {"arrow_config": {"top_k": 1}}}
    more |= {f"lora[{start}]": {"init_lora_weights": start} for start in ("loftq", "pissa", "olora", "eva")}
    return {k: v for name in combination.split("+") for k, v in {**VARIANTS, **more}[f"lora[{name}]"].items()}


VARIANTS.update({f"lora[{combination}]": fields_of(combination) for combination in COMBINED})

NOT_IDENTITY = {
    "c3a",
    "fourierft",
    "waveft[entries]",
    *(name for name in VARIANTS if "kasa" in name),
    *("lora[random]", "hira[random]", "hra[odd]", "hra[orthogonal]", "beft[random]"),
    *("deft[para]", "deft[random]", "glora[random]", "osf[random]", "adamss[random]", "frod[drawn]"),
    *("vblora", "boft[blocks]", "unilora", "unilora[indices]", "tinylora[tied]"),
}
"""Rows whose fresh adapter is random by definition."""


OF_MATRICES = {"lora[bdlora]", "lora[bdlora-a]", "lora[qalora]", "lora[velora]"}
"""Variants of LoRA on linear layers only: they cut, pool or keep the features of an input."""

OF_LAYERS = {"lora[mica]", "lora[kasa]", "lora[monteclora]", *OF_MATRICES}
"""Variants of LoRA that mean something for whole layers only, not for bare parameters."""

STRONGER = {"c3a": 5, "c3a[pattern]": 5}
"""Rows whose update is divided by the number of inputs: how much larger their numbers are made, to be seen at all."""

HELD_CONSTANT = {
    "deft": "on which side of relu's kink an entry of P is",
    **{name: "the norm of W + dW" for name in VARIANTS if "dora" in name},
    "lora[velora]": "inputs, as what they project on",
    "oft[constrained]": "the projection onto the ball",
    "osf": "the gradient's part along the frozen directions is left out",
    "osf[random]": "the same",
    "vblora": "which vectors of the bank are in use",
}
"""Rows whose definition takes something for a constant in the backward pass."""


@dataclass(frozen=True)
class Method:
    """A row: a registered method with a small config."""

    name: str
    fields: tuple[tuple[str, Any], ...]
    second: tuple[tuple[str, Any], ...]
    config_cls: type[PeftConfig]
    layer_cls: type[BaseTunerLayer]

    @property
    def given(self) -> dict[str, Any]:
        return dict(self.fields)

    def has(self, field: str) -> bool:
        """Whether the config knows a field."""
        return field in {f.name for f in dataclasses.fields(self.config_cls)}

    @property
    def waits(self) -> bool:
        """Whether it acts from an invocation token on only."""
        return "alora_invocation_tokens" in self.given

    @property
    def shifts(self) -> bool:
        """Whether it adds to the output what merging puts into the bias, of a layer without one too."""
        return self.name.startswith("beft") or self.name == "lora[bias]"

    @property
    def sums(self) -> bool:
        """Whether adapters that differ in all their numbers have a weighted sum."""
        possible = self.layer_cls.adapter_cls.adds.possible
        return possible or "combination_type" in inspect.signature(self.tuner_cls.add_weighted_adapter).parameters

    @property
    def tuner_cls(self) -> type[BaseTuner]:
        return PEFT_TYPE_TO_TUNER_MAPPING[self.config_cls.METHOD]

    def is_a(self, *families: type) -> bool:
        return issubclass(self.layer_cls.adapter_cls, families)


@functools.cache
def methods() -> tuple[Method, ...]:
    """All registered methods that adapt single layers, not whole blocks nor by other adapters, and the variants."""
    rows: dict[str, tuple[Any, dict[str, Any]]] = {}
    found = []
    for key, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if issubclass(tuner, BaseTuner) and not issubclass(tuner.layer_cls, BlockLayer) and key != "XLORA":
            rows[getattr(key, "value", key).lower()] = (key, {})
    for name, fields in VARIANTS.items():
        rows[name] = (rows[name.partition("[")[0]][0], fields)
    for name, (key, fields) in rows.items():
        config_cls, method = PEFT_TYPE_TO_CONFIG_MAPPING[key], name.partition("[")[0]
        ranks = {f.name: 4 for f in dataclasses.fields(config_cls) if f.name == "r" and f.default}
        given = ranks | EXTRAS.get(method, {}) | fields
        layer_cls = PEFT_TYPE_TO_TUNER_MAPPING[key].layer_cls
        found.append(Method(name, tuple(given.items()), tuple(SECOND.get(method, {}).items()), config_cls, layer_cls))
    return tuple(found)


# --- layers ---------------------------------------------------------------------------------------------------


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
    """A column: a small model, its inputs, and the layers in it that are adapted.

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


def _invoked() -> tuple[torch.Tensor]:
    ids = (torch.arange(BATCH * 5).view(BATCH, 5) * 7) % INVOCATION
    ids[torch.arange(BATCH), torch.arange(BATCH) % 3] = INVOCATION
    return (ids,)


def _masked() -> tuple[torch.Tensor, ...]:
    lengths = torch.tensor([5, 4, 3, 5, 2, 4])
    return torch.randn(BATCH, 5, 8), torch.arange(5)[None] >= lengths[:, None]


def _chain(layer: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Chain(layer(*args, **options))


PLACES = [
    Place("Linear", lambda: Chain(nn.Linear(8, 12), nn.Linear(12, 8)), _numbers(3, 8)),
    Place("Linear[no-bias]", _chain(nn.Linear, 8, 12, bias=False), _numbers(8), affine=True),
    Place("Linear[encoder]", Encoder, _numbers(5, 8), ("linear1", "linear2"), fast_path=True),
    Place("Linear[out_proj]", lambda: Attending(True), _numbers(5, 8), ("out_proj",), fast_path=True),
    Place(
        "Linear[tokens]",
        lambda: Chain(nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)),
        _invoked,
        ("1.layer", "2.layer"),
        invoked=True,
    ),
    Place("Conv1D", _chain(Conv1D, 12, 8), _numbers(3, 8), affine=True),
    Place("Conv1d[stride]", _chain(nn.Conv1d, 4, 6, 3, stride=2, padding=2), _numbers(4, 7), affine=True),
    Place(
        "Conv1d[circular]",
        _chain(nn.Conv1d, 4, 6, 3, padding="same", dilation=2, padding_mode="circular", bias=False),
        _numbers(4, 7),
        affine=True,
    ),
    Place(
        "Conv2d[stride]",
        _chain(nn.Conv2d, 2, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
        _numbers(2, 6, 5),
        affine=True,
    ),
    Place(
        "Conv2d[same]",
        _chain(nn.Conv2d, 2, 6, (3, 4), padding="same", dilation=(2, 1)),
        _numbers(2, 6, 5),
        affine=True,
    ),
    Place(
        "Conv2d[reflect]",
        _chain(nn.Conv2d, 4, 6, 3, padding=(1, 2), padding_mode="reflect"),
        _numbers(4, 5, 6),
        affine=True,
    ),
    Place("Conv2d[groups]", _chain(nn.Conv2d, 8, 6, (2, 3), groups=2, padding=1), _numbers(8, 4, 5), affine=True),
    Place("Conv2d[pointwise]", _chain(nn.Conv2d, 8, 4, 1), _numbers(8, 3, 3), affine=True),
    Place(
        "Conv3d[stride]",
        _chain(nn.Conv3d, 2, 6, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0)),
        _numbers(2, 3, 5, 2),
        affine=True,
    ),
    Place(
        "Conv3d[groups]",
        _chain(nn.Conv3d, 4, 6, (2, 1, 2), groups=2, padding=1, padding_mode="replicate", bias=False),
        _numbers(4, 3, 2, 3),
        affine=True,
    ),
    Place("Embedding", _chain(nn.Embedding, 11, 8), _tokens(11), affine=True),
    Place("Embedding[padding_idx]", _chain(nn.Embedding, 11, 8, padding_idx=4), _tokens(11), affine=True),
    Place("Embedding[scaled]", _chain(ScaledEmbedding, 11, 8, 2.5), _tokens(11), affine=True),
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
    Place("Parameter[weight]", _chain(nn.Linear, 8, 12), _numbers(8), ("layer.weight",), parameters=True, affine=True),
]


# --- cells ----------------------------------------------------------------------------------------------------

DTYPES = {
    "float32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, True),
    "bfloat16-uncast": (torch.bfloat16, False),
}
"""Name -> dtype of the base model, and whether 16-bit adapters are held in float32 (`autocast_adapter_dtype`)."""


@dataclass(frozen=True)
class Cell:
    """A method on a layer in a dtype."""

    method: Method
    place: Place
    precision: str

    @property
    def id(self) -> str:
        return f"{self.method.name}-{self.place.name}-{self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision][0]

    @property
    def autocast(self) -> bool:
        return DTYPES[self.precision][1]

    def base(self, seed: int = 0) -> nn.Module:
        """The plain model, in evaluation mode; its weights depend on the seed only."""
        torch.default_generator.manual_seed(seed)
        model = self.place.build()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.3)  # a bias of 0, a norm of 1 or a tiny weight would hide mistakes
        return model.to(self.dtype).eval()

    def inputs(self) -> tuple[torch.Tensor, ...]:
        generator_state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(1)
        tensors = self.place.inputs()
        torch.random.set_rng_state(generator_state)
        return tuple(t.to(self.dtype) if t.is_floating_point() else t for t in tensors)

    def config(self, second: bool = False, **changes: Any) -> PeftConfig:
        """A small config that targets the layer; that of a second adapter which can be active beside the first."""
        fields = copy.deepcopy(self.method.given) | (dict(self.method.second) if second else {})
        fields["target_parameters" if self.place.parameters else "target_modules"] = list(self.place.targets)
        return self.method.config_cls(**fields | changes)

    def fresh(self, *names: str, base: nn.Module | None = None, seed: int = 2) -> PeftModel:
        """The model with fresh adapters, in evaluation mode; the first one is active."""
        base = self.base() if base is None else base
        torch.default_generator.manual_seed(seed)
        model = get_peft_model(base, self.config(), names[0], autocast_adapter_dtype=self.autocast)
        for i, name in enumerate(names[1:], 1):
            self.add(model, name, second=i == 1)
        return model.eval()

    def add(self, model: PeftModel, name: str, second: bool = False) -> None:
        model.add_adapter(name, self.config(second), autocast_adapter_dtype=self.autocast)

    def adapted(self, *names: str) -> PeftModel:
        """The model with adapters far from their start, in evaluation mode; the first one is active."""
        model = self.fresh(*names)
        for i, name in enumerate(names):
            perturb(model, name, 10 + i, STRONGER.get(self.method.name, 1))
        return model

    def run(self, model: nn.Module, **kwargs: Any) -> torch.Tensor:
        """The output without gradients, as float32."""
        with torch.no_grad():
            return model(*self.inputs(), **kwargs).float()

    def loss(self, model: nn.Module, rows: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """A fixed random functional of the output, linear in it; `rows` weighs the samples."""
        output = model(*self.inputs(), **kwargs)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        each = (output.float() * weight).flatten(1).mean(1)
        return each.sum() if rows is None else (each * rows).sum()

    # --- tolerances
    @property
    def relative(self) -> float:
        """Bound of rounding errors, relative to the largest entry: 16 bits round each number by up to 1/256."""
        if self.dtype == torch.float32:
            return 2e-5
        return 0.06 if self.place.deep else 0.02

    def near(self, found: torch.Tensor, wanted: torch.Tensor, what: str = "", factor: float = 1.0) -> None:
        """Two outputs are equal but for rounding."""
        assert found.shape == wanted.shape and found.isfinite().all()
        error, size = (found.float() - wanted.float()).abs().max().item(), wanted.float().abs().max().item()
        assert error <= factor * self.relative * (size + 1), f"{what}: {error} of {size}"

    def apart(self, found: torch.Tensor, other: torch.Tensor) -> None:
        """Two outputs differ by more than rounding: without that, the law would show nothing."""
        difference, size = (found.float() - other.float()).abs().max().item(), other.float().abs().max().item()
        assert difference > 2 * self.relative * (size + 1), f"{difference} of {size}: the adapter does too little"

    # --- holes
    def refusal(self, operation: str) -> Refusal | None:
        """The hole in the table that this operation falls into, if any."""
        return next((r for r in REFUSED if r.operation == operation and r.when(self.method, self.place)), None)

    @property
    def differentiable(self) -> bool:
        """Whether the gradient is the derivative: not where the method, or a padding token, holds a part constant."""
        return self.method.name not in HELD_CONSTANT and self.place.name != "Embedding[padding_idx]"

    @property
    def unmergeable(self) -> bool:
        return self.refusal("merge") is not None


# --- holes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Cells without meaning.

    Attributes:
        operation: "adapt", "merge" (and `get_delta_weight`), "delta" (that alone), "several", "mixed", "combine".
        phrase: what the error must say, as a regular expression.
        reason: why there is no meaning.
    """

    operation: str
    phrase: str
    reason: str
    when: Callable[[Method, Place], bool]


def _grouped_pair(method: Method, place: Place) -> bool:
    return "groups" in place.name and method.name.partition("[")[0] == "lora"


def _read(method: Method, place: Place) -> bool:
    return method.name == "lora[velora]" and place.name == "Linear[out_proj]"


REFUSED = [
    Refusal(
        "adapt",
        "it is none of",
        "only methods that replace whole modules know what to do with a module that has no weight W in W x + b",
        lambda m, p: p.kind == "LayerNorm" and not m.layer_cls.adapter_cls.any_module,
    ),
    Refusal(
        "adapt",
        "token rows exist only in embeddings and in linear",
        "a token is a row of a table, or an output of a head; other layers have no tokens",
        lambda m, p: m.is_a(Rows) and p.kind not in ("Linear", "Conv1D", "Embedding", "LayerNorm"),
    ),
    Refusal(
        "adapt",
        "lora_bias.*(bias|target_parameters)|target_parameters.*lora_bias",
        "a table and a bare parameter have no bias that B's could join",
        lambda m, p: bool(m.given.get("lora_bias")) and p.kind in ("Embedding", "Parameter"),
    ),
    Refusal(
        "adapt",
        "has no bias that BEFT could train",
        "a table has no bias",
        lambda m, p: m.name.startswith("beft") and p.kind == "Embedding",
    ),
    Refusal(
        "adapt",
        "target_parameters does not work with",
        "what has no input or output of its own, or no single weight, has no place for these variants",
        lambda m, p: m.name in OF_LAYERS and p.parameters,
    ),
    Refusal(
        "adapt",
        "no grouped kernel equals it",
        "these variants decompose the weight that the pair changes, and a pair on a grouped convolution has none",
        lambda m, p: m.name in OF_LAYERS - OF_MATRICES and _grouped_pair(m, p),
    ),
    Refusal(
        "adapt",
        "and this is none",
        "tables, kernels and projections that another module multiplies by have no features to cut, pool or keep",
        lambda m, p: m.name in OF_MATRICES and (p.kind not in ("Linear", "Conv1D") or _read(m, p)),
    ),
    Refusal(
        "adapt",
        "its weight is read by another computation",
        "whoever reads the weight sees none of what a step draws",
        lambda m, p: m.name == "lora[monteclora]" and (p.kind == "MultiheadAttention" or p.name == "Linear[out_proj]"),
    ),
    Refusal(
        "adapt",
        "use_dora.*target_parameters|target_parameters.*use_dora",
        "DoRA scales outputs, and what a bare parameter's module puts out is not known",
        lambda m, p: bool(m.given.get("use_dora")) and p.parameters,
    ),
    Refusal(
        "adapt",
        "no grouped kernel equals it",
        "DoRA needs the norm of the adapted weight, and a pair on a grouped convolution has no weight",
        lambda m, p: bool(m.given.get("use_dora")) and _grouped_pair(m, p),
    ),
    Refusal(
        "adapt",
        "its weight is read by another computation",
        "the update depends on the sample, so there is no weight to give to a computation that reads one",
        lambda m, p: m.is_a(Sample) and (p.kind == "MultiheadAttention" or p.name == "Linear[out_proj]"),
    ),
    Refusal(
        "adapt",
        "n_splits=2 does not divide",
        "a table of eleven tokens has no two equal parts",
        lambda m, p: m.given.get("n_splits") == 2 and p.kind == "Embedding",
    ),
    Refusal(
        "merge",
        "no one weight equals it",
        "the update depends on the sample",
        lambda m, p: m.is_a(Sample) or m.waits,
    ),
    Refusal(
        "merge",
        "no grouped kernel equals it",
        "the pair's A reads all channels, a grouped kernel only those of its group",
        _grouped_pair,
    ),
    Refusal(
        "merge",
        "pairs channels of different groups",
        "a pair of outputs of two groups would read the inputs of both, a grouped kernel those of one",
        lambda m, p: m.name.startswith("road") and "groups" in p.name,
    ),
    Refusal(
        "delta",
        "replaces the module",
        "a copy of a module is no change of one weight",
        lambda m, p: m.is_a(Copy),
    ),
    Refusal(
        "several",
        "one adapter can be active at a time",
        "two copies cannot both stand in for one module",
        lambda m, p: m.is_a(Copy),
    ),
    Refusal(
        "mixed",
        "computes with the weight of an adapted layer",
        "the attention around out_proj reads its weight once for all rows; adapting the attention itself is the way",
        lambda m, p: p.name == "Linear[out_proj]",
    ),
    Refusal(
        "mixed",
        "not known row by row",
        "what a module makes of a bare parameter need not keep the rows of a batch apart",
        lambda m, p: p.parameters,
    ),
    Refusal(
        "combine",
        "depends on the sample, so no sum",
        "what the adapters do is no tensor, so there is nothing to sum",
        lambda m, p: m.is_a(Sample),
    ),
    Refusal(
        "combine",
        "not linear in their tensors",
        "a product, a rotation or another curve of tensors: the sum of such has another form",
        lambda m, p: not m.sums and not m.is_a(Sample),
    ),
    Refusal(
        "combine",
        "use DoRA, which divides by the norm",
        "DoRA divides by the norm of the adapted weight",
        lambda m, p: bool(m.given.get("use_dora")),
    ),
    Refusal(
        "combine",
        "differ in (glora_[ABCDE].Xd|supertuning_lora_A)",
        "the sum of products of two trained factors has a higher rank, which the method has no room for",
        lambda m, p: m.name in ("glora", "supertuning[pair]") or (m.name == "glora[random]" and p.has_bias),
    ),
]
"""The holes: combinations of a method, a layer and an operation that mean nothing; the error gives this reason."""


def cells(
    *operations: str,
    precisions: tuple[str, ...] = tuple(DTYPES),
    refused: bool = False,
    switches: bool = True,
    each_layer: bool = True,
) -> list[Cell]:
    """The cells in which all these operations mean something; with `refused`, those in which the last means nothing.

    Methods meet every layer in float32 (unless a law says that one of each kind will do: `each_layer`), and one layer
    of each kind in the other precisions. Their switches meet one layer of each kind, in float32 unless the law is
    asked for in all precisions, and only if a switch could break it (`switches`).
    """
    found = []
    for method in methods():
        switch = method.name in VARIANTS
        for place in PLACES:
            if not method.has("target_parameters" if place.parameters else "target_modules"):
                continue  # the config has no words for it
            if switch and not (switches and place.typical):
                continue
            if place.invoked != method.waits or (
                "+" in method.name and place.name not in ("Linear", "Linear[tokens]")
            ):
                continue
            for precision in precisions if not switch or len(precisions) == len(DTYPES) else precisions[:1]:
                if not place.typical and not (each_layer and precision == "float32"):
                    continue
                cell = Cell(method, place, precision)
                *before, last = ("adapt", *operations) if operations != ("adapt",) else operations
                if all(cell.refusal(op) is None for op in before) and (cell.refusal(last) is not None) == refused:
                    found.append(cell)
    return found


# --- helpers --------------------------------------------------------------------------------------------------


def layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """All tuner layers of a model, with the names that their modules have in the plain model; outer ones first."""
    root = model.base_model.model if isinstance(model, PeftModel) else model
    return [(site.key, w) for site in walk(root) for _, w in site.wrappers if isinstance(w, BaseTunerLayer)]


def perturb(model: nn.Module, name: str, seed: int, times: float = 1) -> None:
    """Add seeded noise to all tensors of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in layers(model):
            for p in layer.adapter_parameters(name):
                p.add_((torch.randn(p.shape, generator=generator) * 0.3 * times).to(p.dtype))


def parameters_of(model: nn.Module, name: str) -> list[torch.Tensor]:
    """The tensors of an adapter, each once."""
    return list({id(p): p for _, layer in layers(model) for p in layer.adapter_parameters(name)}.values())


def gradient(p: torch.Tensor) -> torch.Tensor:
    """The gradient of a tensor; zero where the loss does not depend on it."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's state dict."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's parameters as they are now, under the names that they have in the plain model."""
    root = model.base_model.model if isinstance(model, PeftModel) else model
    named = ((site.key, n, p) for site in walk(root) for n, p in site.module._parameters.items() if p is not None)
    return {f"{key}.{n}".removeprefix("."): p.detach().clone() for key, n, p in named}


def equal_states(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The same names in the same order, and the same bits."""
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def by_definition(cell: Cell, model: PeftModel, names: list[str]) -> nn.Module:
    """The plain model with the weights that the method's family defines for several adapters, from those of each.

    Updates add up, each from the unmerged W; scales multiply; rotations follow each other.
    """
    plain = cell.base()
    each = [_merged(model, name) for name in names]
    for key, layer in layers(model):
        target = locate(plain, key).module
        for slot in (layer.kind.weight, layer.kind.bias):
            if (key, slot) not in each[0]:
                continue
            alone = [values[key, slot].double() for values in each]
            start = getattr(target, slot)  # None where merging gives a bias to a layer without
            wide = torch.zeros_like(alone[0]) if start is None else start.detach().double()
            if cell.method.is_a(Output):
                wide = _mapped(layer, names, wide, slot)
            elif not cell.method.is_a(Rotation):
                wide = _combined(cell.method, wide, alone)
            elif slot == layer.kind.weight:
                wide = _turned(layer, names, wide)
            setattr(target, slot, nn.Parameter(wide.to(cell.dtype), requires_grad=False))
    return plain


def weighted(cell: Cell, model: PeftModel, weights: dict[str, float], as_scales: bool = False) -> nn.Module:
    """The plain model with W + sum_i w_i (W_i - W); `as_scales`: with sum_i w_i W_i where the adapters act."""
    plain, base, alone, model = cell.base(), base_weights(cell.base()), {}, copy.deepcopy(model)
    for name in weights:
        model.merge_adapter([name])
        alone[name] = base_weights(model)
        model.unmerge_adapter()
    for key in dict.fromkeys(key for values in alone.values() for key in values):
        each = [values[key].double() for values in alone.values()]
        start = base[key].double() if key in base else torch.zeros_like(each[0])
        if as_scales and any(not torch.equal(one, start) for one in each):
            start = torch.zeros_like(start)
        wide = start + sum(weight * (one - start) for weight, one in zip(weights.values(), each))
        path, _, slot = key.rpartition(".")
        setattr(plain.get_submodule(path), slot, nn.Parameter(wide.to(cell.dtype), requires_grad=False))
    return plain


def _merged(model: PeftModel, name: str) -> dict[tuple[str, str], torch.Tensor]:
    """The weights and biases of the adapted layers with one adapter merged."""
    model.merge_adapter([name])
    values = {}
    for key, layer in layers(model):
        for slot in (layer.kind.weight, layer.kind.bias):
            if slot and getattr(layer.get_base_layer(), slot, None) is not None:
                values[key, slot] = getattr(layer.get_base_layer(), slot).detach().clone()
    model.unmerge_adapter()
    return values


def _combined(method: Method, start: torch.Tensor, alone: list[torch.Tensor]) -> torch.Tensor:
    if method.is_a(Delta, Fold, Rows):
        return start + sum(one - start for one in alone)
    assert method.is_a(Scale), f"say here what two active adapters of {method.layer_cls.__name__} mean"
    factors = [torch.where(start == 0, 1, one / start) for one in alone]
    return start * torch.stack(factors).prod(0)


def _mapped(layer: BaseTunerLayer, names: list[str], start: torch.Tensor, slot: str) -> torch.Tensor:
    """M_2 M_1 W, and M_2 (M_1 b + c_1) + c_2: what comes out of one map goes into the next."""
    base = layer.get_base_layer()
    for name in names:
        adapter = layer.adapters[name]
        matrix = adapter.map_output(torch.eye(layer.shape[0], dtype=torch.float64)).detach().T
        shift = adapter.shift()
        if slot == layer.kind.bias:
            start = matrix @ start + (0 if shift is None else shift.detach().double())
        else:
            weight = layer.kind.orient(start, base)
            start = layer.kind.restore((matrix @ weight.flatten(1)).view_as(weight), base)
    return start


def _turned(layer: BaseTunerLayer, names: list[str], start: torch.Tensor) -> torch.Tensor:
    """S_2 S_1 W (R_1 R_2)^T, and S_2 R_2^T S_1 R_1^T W for tables, which rotate their output; S scales the output."""
    base = layer.get_base_layer()
    weight = layer.kind.orient(start, base)
    for name in names if layer.kind.lookup else names[::-1]:
        adapter = layer.adapters[name]
        rotation, s = adapter.rotation().detach().double(), adapter.scale_out()
        weight = rotation.T @ weight if layer.kind.lookup else (weight.flatten(1) @ rotation.T).view_as(weight)
        if s is not None:
            weight = s.detach().double().view(-1, *[1] * (weight.dim() - 1)) * weight
    return layer.kind.restore(weight, base)


# --- which cases are run --------------------------------------------------------------------------------------


def over(found: Iterable[Cell]) -> Callable[[Any], Any]:
    """Parametrise a law over cells."""

    def decorate(law: Any) -> Any:
        cases = [pytest.param(cell, id=cell.id) for cell in sampled(law, found, lambda cell: (cell.method, cell.id))]
        return pytest.mark.parametrize("cell", cases)(law)

    return decorate


def sampled(law: Any, found: Iterable[Any], row: Callable[[Any], tuple[Method, str]]) -> list[Any]:
    """The cases of a law that are run: all of plain rows in float32, a third of the others, chosen by name.

    The others are rows with a setting of their own, such as ``lora[dora]``, and those in 16 bits.

    The laws say similar things in different ways, so together they meet each cell several times. ``LAWS=all`` in the
    environment runs every case.

    Args:
        row: the method of a case, and what names the case.
    """

    def met(method: Method, name: str) -> bool:
        return ("[" not in method.name and "bfloat16" not in name) or not crc32(f"{law.__name__} {name}".encode()) % 3

    return [case for case in found if os.environ.get("LAWS") == "all" or met(*row(case))]

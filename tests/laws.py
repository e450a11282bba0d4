"""What the laws are tested on: methods x layers x dtypes, and the combinations that have no meaning.

Methods come from the registry: a newly registered one is tested without a change here, unless its config has no small
default (`EXTRAS`). `REFUSED` is the one list of holes in the table, each with the reason that the library must give.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import nn

import peft.tuners  # noqa: F401  registers the methods
from peft.core.blocks.blocks import BlockLayer
from peft.core.model.tuner import BaseTuner
from peft.testing import Refusal
from peft.testing.cells import Cell, Method
from peft.testing.cells import cells as cells_of
from peft.testing.places import BATCH, LAYERS, Chain, Place
from peft.utils.peft_types import PEFT_TYPE_TO_TUNER_MAPPING


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
    "abba": {"r1": 2, "r2": 3, "alpha": 8},
    "comol": {"num_experts": 3, "top_k": 2},
    "mix_lora": {"r": 2, "num_experts": 3},
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
    "lora[gated]": {"use_gating": True},
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
    "abba[random]": {"init_weights": False},
    "comol[soft]": {"top_k": None, "init_weights": False},
    "dylora[rank]": {"rank": 3, "last_only": True},
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
    *("kasa+qalora", "monteclora+qalora", "bdlora+gaussian", "bdlora-a+gaussian", "qalora+orthogonal"),
    *(f"bias+{name}" for name in ("dora", "kasa", "velora", "monteclora", "bdlora", "qalora", "gated", "rslora")),
    *("bias+gaussian", "bias+orthogonal", "alora+bias+dora"),
    *("velora+mica", "monteclora+bdlora", "monteclora+mica", "qalora+mica"),
    *("alora+dora", "alora+kasa", "alora+velora", "alora+monteclora", "alora+bdlora", "alora+qalora", "alora+mica"),
    *("dora+rslora", "kasa+rslora", "velora+rslora", "monteclora+rslora", "bdlora+rslora", "qalora+rslora"),
    *("mica+rslora", "alora+rslora", "dora+gaussian", "dora+orthogonal", "kasa+gaussian", "kasa+orthogonal"),
    *("velora+gaussian", "velora+orthogonal", "monteclora+gaussian", "monteclora+orthogonal", "qalora+gaussian"),
    *("gated+kasa", "gated+velora", "gated+qalora", "gated+mica", "gated+rslora", "gated+bdlora"),
    "gated+monteclora",
    *("alora+gaussian", "alora+orthogonal", "alora+bias", "alora+dora+mica"),
)
"""The variants of LoRA that mean something together: each is a row, and meets one kind of layer."""

REWRITING = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Starts that take a part out of the base weight."""

APART = {
    "dora+arrow": "no update of its own",
    **{f"arrow+{name}": "no update of its own" for name in ("kasa", "velora", "monteclora", "bdlora", "qalora")},
    "arrow+mica": "could start",
    "kasa+bdlora": "no product of blocks",
    "monteclora+bdlora-a": "fill the zeros between the blocks",
    "bdlora+qalora": "cut the same axis in two ways",
    "dora+gated": "each sample has another one",
    "alora+gated": "a mean over all tokens of a row",
    "arrow+gated": "no update of its own",
    "arrow+bias": "no update of its own",
    "mica+bias": "trains A alone",
    "mica+bdlora": "singular vectors of the whole weight|makes whole factors",
    "bdlora+orthogonal": "makes whole factors",
    "bdlora+eva": "makes whole factors",
    "qalora+eva": "A is smaller",
    "arrow+eva": "could start",
    **{f"alora+{start}": "changes the base weight" for start in REWRITING},
    **{f"arrow+{start}": "could start" for start in REWRITING},
    **{f"bdlora+{start}": "makes whole factors" for start in REWRITING},
    **{f"qalora+{start}": "A is smaller" for start in REWRITING},
    **{f"{name}+{start}": "would not come back" for name in ("kasa", "gated") for start in REWRITING},
}
"""The variants that mean nothing together -> what the error must say."""


def fields_of(combination: str) -> dict[str, Any]:
    """The fields of several variants of LoRA at once."""
    more: dict[str, dict[str, Any]] = {"lora[arrow]": {"arrow_config": {"top_k": 1}}}
    more |= {f"lora[{start}]": {"init_lora_weights": start} for start in (*REWRITING, "eva")}
    return {k: v for name in combination.split("+") for k, v in {**VARIANTS, **more}[f"lora[{name}]"].items()}


VARIANTS.update({f"lora[{combination}]": fields_of(combination) for combination in COMBINED})

NOT_IDENTITY = {
    "c3a",
    "fourierft",
    "waveft[entries]",
    *(name for name in VARIANTS if "kasa" in name),
    *("lora[random]", "hira[random]", "hra[odd]", "hra[orthogonal]", "beft[random]"),
    *("abba[random]", "comol[soft]"),
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


@functools.cache
def methods() -> tuple[Method, ...]:
    """All registered methods that adapt single layers, not whole blocks nor by other adapters, and the variants."""
    rows: dict[str, tuple[Any, dict[str, Any]]] = {}
    for key, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items():
        if not issubclass(tuner, BaseTuner) or tuner.mixes or issubclass(tuner.layer_cls, BlockLayer):
            continue
        if key != "XLORA":
            rows[getattr(key, "value", key).lower()] = (key, {})
    for name, fields in VARIANTS.items():
        rows[name] = (rows[name.partition("[")[0]][0], fields)
    return tuple(_method(name, *row) for name, row in rows.items())


def _method(name: str, key: Any, fields: dict[str, Any]) -> Method:
    method = name.partition("[")[0]
    return Method.of(
        PEFT_TYPE_TO_TUNER_MAPPING[key],
        EXTRAS.get(method, {}) | fields,
        name=name,
        second=tuple(SECOND.get(method, {}).items()),
        identity=name not in NOT_IDENTITY,
        times=STRONGER.get(name, 1),
        constant=name in HELD_CONSTANT,
        shifts=method == "beft" or name == "lora[bias]",
        waits="alora_invocation_tokens" in fields,
        on=("Linear", "Linear[tokens]") if "+" in name else (),
        holes=REFUSED,
    )


# --- layers ---------------------------------------------------------------------------------------------------


def _invoked() -> tuple[torch.Tensor]:
    ids = (torch.arange(BATCH * 5).view(BATCH, 5) * 7) % INVOCATION
    ids[torch.arange(BATCH), torch.arange(BATCH) % 3] = INVOCATION
    return (ids,)


WAITING = Place(
    "Linear[tokens]",
    lambda: Chain(nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)),
    _invoked,
    ("1.layer", "2.layer"),
    invoked=True,
)

PLACES = [*LAYERS[:4], WAITING, *LAYERS[4:]]


# --- holes ----------------------------------------------------------------------------------------------------


def _grouped_pair(method: Method, place: Place) -> bool:
    return "groups" in place.name and method.name.partition("[")[0] == "lora"


def _read(method: Method, place: Place) -> bool:
    return method.name == "lora[velora]" and place.name == "Linear[out_proj]"


REFUSED = (
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
        lambda m, p: (m.name in OF_LAYERS or "gated" in m.name) and p.parameters,
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
        "reads features",
        "a gate is a function of features, and a table's input is indices",
        lambda m, p: "gated" in m.name and p.kind == "Embedding",
    ),
    Refusal(
        "adapt",
        "n_splits=2 does not divide",
        "a table of eleven tokens has no two equal parts",
        lambda m, p: m.given.get("n_splits") == 2 and p.kind == "Embedding",
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
)
"""The holes of single methods, beyond those of families; the error gives this reason."""


def cells(*operations: str, **which: Any) -> list[Cell]:
    """The cells of all these methods on all these layers, see :func:`peft.testing.cells.cells`."""
    return cells_of(methods(), PLACES, *operations, **which)


# --- which cases are run --------------------------------------------------------------------------------------


def over(found: Iterable[Cell]) -> Callable[[Any], Any]:
    """Parametrise a law over cells."""

    def decorate(law: Any) -> Any:
        return pytest.mark.parametrize("cell", params(law.__name__, found))(law)

    return decorate


def params(law: str, found: Iterable[Cell]) -> list[Any]:
    """The cells of a law that are run, as parameters of a test."""
    return [pytest.param(cell, id=cell.id) for cell in sampled(law, found, lambda cell: (cell.method, cell.id))]


def sampled(law: str, found: Iterable[Any], row: Callable[[Any], tuple[Method, str]]) -> list[Any]:
    """The cases of a law that are run: all of plain rows in float32, a third of the others, chosen by name.

    The others are rows with a setting of their own, such as ``lora[dora]``, and those in 16 bits.

    The laws say similar things in different ways, so together they meet each cell several times. ``LAWS=all`` in the
    environment runs every case.

    Args:
        law: the name of its test. row: the method of a case, and what names the case.
    """

    def met(method: Method, name: str) -> bool:
        return (not method.switch and "bfloat16" not in name) or not crc32(f"{law} {name}".encode()) % 3

    return [case for case in found if os.environ.get("LAWS") == "all" or met(*row(case))]

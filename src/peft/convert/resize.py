"""Another rank for an adapter, and its negative, from its file alone."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from peft.config import resolve_pattern
from peft.convert.held import PREFIX, Held, Pair, Pairs, held_of, named, pairs_of, patterned, whole
from peft.core.combine.ranks import product_svd, shared_ranks


# Methods whose trained tensors are a product B A, by the tails of the names of A and B.
PRODUCTS = {
    "LORA": (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")),
    "HIRA": (("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")),
}


@dataclass(frozen=True)
class Resized:
    """What :func:`resize_adapter` has done.

    Attributes:
        output: the folder. ranks: the new rank by module. errors: by module, the norm of what was cut off over that of
            the product before. kept: the share of the whole energy (squared singular values) that is left.
    """

    output: str
    ranks: dict[str, int]
    errors: dict[str, float]
    kept: float


def resize_adapter(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Resized:
    """Give an adapter another rank: its products B A become the best ones of that rank.

    The base model is not needed: A and B are decomposed by way of a matrix ``[r, r]``, a layer at a time. Where the
    rank already fits, the tensors stay as they are; a larger one is not made of a smaller one, as it would be zeros.
    Scales, DoRA's magnitudes, biases and whole modules stay. For HiRA the product is that of its B A, before W.

    Args:
        source: folder of the adapter, or its name on the hub. output: folder to write to.
        rank: the most that a layer has. energy: the share of the squared singular values of the whole model to keep,
            in (0, 1]: ranks are shared out among layers by their singular values. Give one, or both: then no layer
            gets more than ``rank``.

    Example::

        resize_adapter("runs/style", "runs/style-small", energy=0.95)

    Raises:
        ValueError: neither is given, or has no meaning; the method is no product; a layer's update consists of
            blocks (grouped convolutions, stacks of experts). Nothing is written then.
    """
    check_size(rank, energy)
    held = Held.read(source)
    products = dict(_products(held))
    ranks = {module: len(held.tensors[down]) for module, (down, _) in products.items()}
    values = {module: _values(held, module, names) for module, names in products.items()}
    wanted = ranks if energy is None else shared_ranks(values, energy)
    new = {module: min(ranks[module], wanted[module], rank or ranks[module]) for module in products}
    errors = {}
    for module, names in products.items():
        errors[module] = _cut(held, names, new[module], ranks[module])
    total = sum(float(value.double().square().sum()) for value in values.values())
    left = sum(float(value[: new[module]].double().square().sum()) for module, value in values.items())
    _set_ranks(held, ranks, new)
    held.write(output)
    return Resized(os.fspath(output), new, errors, left / total if total else 1.0)


def check_size(rank: int | None, energy: float | None) -> None:
    """Check a rank and a share of energy, of which at least one is given.

    Raises:
        ValueError: for others.
    """
    if rank is None and energy is None:
        raise ValueError("say how large the result is to be: rank=16, or energy=0.95, a share of the singular values.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is a whole number of at least 1, got {rank!r}.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is a share of the squared singular values, in (0, 1], got {energy!r}.")


def negate_adapter(source: str | os.PathLike, output: str | os.PathLike) -> None:
    """Write the adapter that takes away what this one adds: dW becomes -dW, bit for bit (arXiv 2212.04089).

    Raises:
        ValueError: the adapter is not a LoRA whose update is all it is (DoRA, whole modules, trained tokens, biases of
            the base model), or of a method of which no sign can be turned. Nothing is written then.
    """
    held = Held.read(source)
    if getattr(held.config, "use_dora", False):
        raise ValueError("the adapter is a DoRA, which scales whole rows of the weight: no DoRA is its negative.")
    products = [*dict(_products(held)).values()]
    turned = {up for _, up in products} | {name for name in held.tensors if name.endswith(".lora_B.bias")}
    if rest := held.tensors.keys() - turned - {down for down, _ in products}:
        raise ValueError(
            f"these tensors replace those of the base model, and have no negative: {named(rest)}. Take them out "
            "(modules_to_save, trainable_token_indices, bias) before negating."
        )
    held.tensors.update({name: -held.tensors[name] for name in turned if name in held.tensors})
    held.write(output)


def rebase_adapter(source: str | os.PathLike, onto: str | os.PathLike, output: str | os.PathLike) -> None:
    """Write the LoRA that does on a base with another LoRA baked in what this one does on the plain base.

    dW' = dW - dV, with A and B side by side: exact, at the sum of the ranks. The other one is baked in by merging it
    (``merge_and_unload``, ``peft merge``).

    Args:
        source: the LoRA that is to stay an adapter. onto: the one that becomes part of the base.

    Raises:
        ValueError: one of them is no LoRA that is its update alone (DoRA, whole modules, trained tokens, biases).
            Nothing is written then.
    """
    own, baked = pairs_of(Held.read(source)), pairs_of(Held.read(onto))
    for what, given in ((source, own), (onto, baked)):
        odd = [module for module, pair in given.pairs.items() if pair.magnitude is not None or pair.bias is not None]
        if odd or given.others:
            raise ValueError(f"{what} is more than its updates, which add up: {named([*odd, *given.others])}.")
    made = {}
    for module in dict.fromkeys((*own.pairs, *baked.pairs)):
        parts = [(given.pairs[module], sign * given.scale(module)) for given, sign in ((own, 1.0), (baked, -1.0))
                 if module in given.pairs]  # fmt: skip
        down = torch.cat([pair.down for pair, _ in parts])
        up = torch.cat([pair.up * scale for pair, scale in parts], 1)
        made[module] = Pair(down, up, alpha=len(down), table=parts[0][0].table)
    held_of(Pairs(made, extra={"base_model_name_or_path": None})).write(output)


# --- products in files --------------------------------------------------------------------------------------------


def _products(held: Held) -> Iterator[tuple[str, tuple[str, str]]]:
    """Module -> the names of A and B in the file."""
    kind = str(getattr(held.config.peft_type, "value", held.config.peft_type))
    if kind not in PRODUCTS:
        raise ValueError(
            f"the tensors of {kind} are no product B A of a rank to change; peft.save_as_lora writes a LoRA of any "
            f"rank instead. Products are {', '.join(PRODUCTS)}."
        )
    if getattr(held.config, "target_parameters", None):
        raise ValueError("target_parameters are stacks of experts' matrices, whose ranks cannot be changed in a file.")
    for down, up in PRODUCTS[kind]:
        for name in held.tensors:
            module = name.removesuffix("." + down)
            if module != name:
                other = f"{module}.{up}"
                if other not in held.tensors:
                    raise ValueError(f"the adapter has {name} and no {other}: its file is incomplete.")
                if held.tensors[other].shape[1] != len(held.tensors[name]):
                    raise ValueError(f"{module} is a grouped convolution, whose pair is no single product.")
                yield module.removeprefix(PREFIX), (name, other)


def _matrices(held: Held, down: str, up: str) -> tuple[torch.Tensor, torch.Tensor]:
    wide = [t if t.dtype == torch.float64 else t.float() for t in (held.tensors[down], held.tensors[up])]
    return wide[0].flatten(1), wide[1].flatten(1)


def _scale(config: Any, module: str, rank: int) -> float:
    """What the product of a module is multiplied by, at a rank."""
    if not hasattr(config, "lora_alpha"):
        return 1.0
    alpha = resolve_pattern(config.alpha_pattern, module, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _values(held: Held, module: str, names: tuple[str, str]) -> torch.Tensor:
    return product_svd(*_matrices(held, *names))[1] * _scale(held.config, module, len(held.tensors[names[0]]))


def _cut(held: Held, names: tuple[str, str], rank: int, old: int) -> float:
    """Replace a pair by the best one of a lower rank; the relative error."""
    if rank >= old:
        return 0.0
    u, s, vh = product_svd(*_matrices(held, *names))
    root = s[:rank].sqrt()
    parts = root[:, None] * vh[:rank], u[:, :rank] * root
    for name, part in zip(names, parts):
        like = held.tensors[name]
        shape = (rank, *like.shape[1:]) if name == names[0] else (like.shape[0], rank, *like.shape[2:])
        held.tensors[name] = part.reshape(shape).to(like.dtype)
    norm = float(s.double().norm())
    return float(s[rank:].double().norm()) / norm if norm else 0.0


def _set_ranks(held: Held, old: dict[str, int], new: dict[str, int]) -> None:
    """Say the new ranks in the config, and the alphas with which the scales stay."""
    config = held.config
    fields = dict(zip(("r", "rank_pattern"), patterned(new)))
    if hasattr(config, "lora_alpha"):
        alphas = {}
        for module, rank in new.items():
            alpha = resolve_pattern(config.alpha_pattern, module, config.lora_alpha)
            ratio = rank / old[module]
            alphas[module] = whole(alpha * (math.sqrt(ratio) if config.use_rslora else ratio))
        fields.update(zip(("lora_alpha", "alpha_pattern"), patterned(alphas)))
    held.config = dataclasses.replace(config, **fields)

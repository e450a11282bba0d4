"""Another rank for an adapter, and its negative, from its file alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from peft.convert.held import Held, Pair, Pairs, beyond_pairs, held_of, is_lora, pairs_of
from peft.convert.products import pairs_in, products_of
from peft.errors import some
from peft.kernels.decompositions import shared_ranks


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
    Scales, DoRA's magnitudes, biases, routers and whole modules stay. The methods are LoRA; AdaLoRA; HiRA, whose
    product is that of its B A, before W; LoKr with a low-rank W2; GraLoRA, each of whose k x k blocks is one; DyLoRA,
    of the rank in use; LoRA-XS; MixLoRA, each of whose experts is one; Poly, of all A and all B of a layer's skills.
    The last five have one rank for all layers.

    Args:
        source: folder of the adapter, or its name on the hub. output: folder to write to.
        rank: the most that a layer has; of GraLoRA, that of a row of blocks together, as ``r`` in its config.
        energy: the share of the squared singular values of the whole model to keep, in (0, 1]: ranks are shared out
            among layers by their singular values (GraLoRA has one for all: the largest). Give one, or both: then no
            layer gets more than ``rank``.

    Example::

        resize_adapter("runs/style", "runs/style-small", energy=0.95)

    Raises:
        ValueError: neither is given, or has no meaning; the method, or the variant of LoRA, is no product of a rank
            to change; a layer is a grouped convolution or a stack of experts. Nothing is written then.
    """
    check_size(rank, energy)
    held = Held.read(source)
    method, products = products_of(held)
    before = {p.module: p.rank * p.side for p in products}
    values = {(p.module, block): found for p in products for block, found in enumerate(p.values())}
    shared = {} if energy is None else shared_ranks(values, energy)
    new = {}
    for p in products:
        most = [p.rank, *([] if rank is None else [-(-rank // p.side)])]
        new[p.module] = min(*most, max((r for (module, _), r in shared.items() if module == p.module), default=p.rank))
    if method.uniform:  # one rank for all: the largest
        new = dict.fromkeys(new, max(new.values()))
    errors = {p.module: p.cut(new[p.module]) for p in products}
    total = sum(float(value.double().square().sum()) for value in values.values())
    left = sum(float(value[: new[module]].double().square().sum()) for (module, _), value in values.items())
    ranks = {p.module: new[p.module] * p.side for p in products}
    method.say(held, before, ranks)
    held.write(output)
    return Resized(os.fspath(output), ranks, errors, left / total if total else 1.0)


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
    if is_lora(held) and "init_lora_weights" in (found := beyond_pairs(held.config)):
        raise ValueError(f"what the adapter adds is not its product: {found['init_lora_weights']}.")
    pairs = pairs_in(held)
    turned = {up for _, _, up in pairs} | {name for name in held.tensors if name.endswith(".lora_B.bias")}
    if rest := held.tensors.keys() - turned - {down for _, down, _ in pairs}:
        raise ValueError(
            f"these tensors replace those of the base model, and have no negative: {some(rest)}. Take them out "
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
    read = [Held.read(source), Held.read(onto)]
    own, baked = map(pairs_of, read)
    for what, held in zip((source, onto), read):
        if found := beyond_pairs(held.config):
            raise ValueError(f"{what} is more than its A and B: {'; '.join(found.values())}.")
    for what, given in ((source, own), (onto, baked)):
        odd = [module for module, pair in given.pairs.items() if pair.magnitude is not None or pair.bias is not None]
        if odd or given.others:
            raise ValueError(f"{what} is more than its updates, which add up: {some([*odd, *given.others])}.")
    made = {}
    for module in dict.fromkeys((*own.pairs, *baked.pairs)):
        parts = [(given.pairs[module], sign * given.scale(module)) for given, sign in ((own, 1.0), (baked, -1.0))
                 if module in given.pairs]  # fmt: skip
        down = torch.cat([pair.down for pair, _ in parts])
        up = torch.cat([pair.up * scale for pair, scale in parts], 1)
        made[module] = Pair(down, up, alpha=len(down), table=parts[0][0].table)
    held_of(Pairs(made, extra={"base_model_name_or_path": None})).write(output)

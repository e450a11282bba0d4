"""The low-rank products in an adapter's file, by method: how they are read, and written again at another rank."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from peft.config import RankPatterns, patterned
from peft.convert.held import Held
from peft.core.files.io import PREFIX
from peft.core.layer.weight import wide
from peft.kernels.decompositions import halves, product_svd
from peft.tuners.lora.config import divisor, whole
from peft.tuners.lora.layer import Lora


Svd = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # u [out, r], s [r], vh [r, in]


@dataclass
class Product:
    """B A of one module, or of each block of one.

    Attributes:
        module: its name in the base model. blocks: (A ``[r, in]``, B ``[out, r]``), all of one r. scale: what the
            product is multiplied by. put: writes the blocks, as decompositions of one rank, into the file's tensors.
        side: how many blocks there are in a row, whose ranks the config counts together.
    """

    module: str
    blocks: list[tuple[torch.Tensor, torch.Tensor]]
    scale: float
    put: Callable[[Sequence[Svd]], None]
    side: int = 1

    @property
    def rank(self) -> int:
        """Of each block."""
        return len(self.blocks[0][0])

    def values(self) -> list[torch.Tensor]:
        """The singular values of each block.

        Raises:
            ValueError: a factor has entries that are not finite.
        """
        if not all(torch.isfinite(factor).all() for block in self.blocks for factor in block):
            raise ValueError(f"{self.module}: the adapter has NaN or infinite entries: it is broken.")
        return [product_svd(*block)[1] * abs(self.scale) for block in self.blocks]

    def cut(self, rank: int) -> float:
        """Make each block the best product of a lower rank; the error relative to them all."""
        if rank >= self.rank:
            return 0.0
        found = [product_svd(*block) for block in self.blocks]
        self.put([(u[:, :rank], s[:rank], vh[:rank]) for u, s, vh in found])
        whole_norm, lost = (math.sqrt(sum(float(s[cut:].double().square().sum()) for _, s, _ in found))
                            for cut in (0, rank))  # fmt: skip
        return lost / whole_norm if whole_norm else 0.0


class Method(NamedTuple):
    """How a method keeps products.

    Attributes:
        read: the products of a file. say: writes ranks by module, before and after, into the config. uniform: the
            config has one rank for all modules.
    """

    read: Callable[[Held], Iterator[Product]]
    say: Callable[[Held, dict[str, int], dict[str, int]], None]
    uniform: bool = False


def products_of(held: Held) -> tuple[Method, list[Product]]:
    """How an adapter's method keeps products, and those of its file.

    Raises:
        ValueError: the method's tensors are no product of a rank to change, or these are not.
    """
    kind = held.method
    if kind not in METHODS:
        why = WHY_NOT.get(kind, "it has none")
        raise ValueError(
            f"the tensors of {kind} are no product B A of a rank to change: {why}. peft.save_as_lora writes a LoRA of "
            f"any rank of what a weight equals. Products are {', '.join(METHODS)}."
        )
    if getattr(held.config, "target_parameters", None):
        raise ValueError("target_parameters are stacks of experts' matrices, whose ranks cannot be changed in a file.")
    return METHODS[kind], [*METHODS[kind].read(held)]


def pairs_by_name(held: Held, names: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """(module, name of A, name of B) of each pair in a file.

    Args:
        names: tails of the names of A and B.

    Raises:
        ValueError: a pair lacks its half.
    """
    for tails in names:
        for name in held.tensors:
            tail = next((tail for tail in tails if name.endswith(f".{tail}")), None)
            if tail is None:
                continue
            module = name.removesuffix(f".{tail}")
            down, up = (f"{module}.{one}" for one in tails)
            if other := {down, up} - held.tensors.keys():
                raise ValueError(f"the adapter has {name} and no {other.pop()}: its file is incomplete.")
            if name == down:
                yield module.removeprefix(PREFIX), down, up


def _putting(
    held: Held, names: Sequence[str], made: Callable[[Sequence[Svd]], Sequence[torch.Tensor]]
) -> Callable[[Sequence[Svd]], None]:
    """What puts decompositions of a module's blocks back: as the tensors that are made of them, under these names."""

    def put(found: Sequence[Svd]) -> None:
        for name, new in zip(names, made(found)):
            held.tensors[name] = new.to(held.tensors[name].dtype).contiguous()

    return put


def _halves_of_one(found: Sequence[Svd]) -> tuple[torch.Tensor, torch.Tensor]:
    return halves(*found[0])


# --- LoRA, HiRA --------------------------------------------------------------------------------------------------

_NAMES = {
    "LORA": (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")),
    "HIRA": (("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")),
}


def pairs_in(held: Held) -> list[tuple[str, str, str]]:
    """The pairs of a LoRA or HiRA: (module, name of A, name of B).

    Raises:
        ValueError: the adapter is of another method, or of grouped convolutions.
    """
    kind = held.method
    if kind not in _NAMES:
        raise ValueError(f"the adapter is {kind}, whose file is no list of pairs A and B.")
    found = [*pairs_by_name(held, _NAMES[kind])]
    for module, down, up in found:
        a, b = held.tensors[down], held.tensors[up]
        if b.shape[1] != len(a) and a.dim() == 2:
            raise ValueError(f"{module}: A is {list(a.shape)} and B {list(b.shape)}: the file is damaged.")
        if b.shape[1] != len(a):
            raise ValueError(f"{module} is a grouped convolution, whose pair is no single product.")
    return found


def _read_pairs(held: Held) -> Iterator[Product]:
    if (variant := _fixed(held.config)) is not None:
        raise ValueError(f"the adapter is {variant}, which has tensors of its own that follow the rank.")
    for module, down, up in pairs_in(held):
        a, b = held.tensors[down], held.tensors[up]

        def made(found: Sequence[Svd], a: torch.Tensor = a, b: torch.Tensor = b) -> tuple[torch.Tensor, torch.Tensor]:
            new_a, new_b = halves(*found[0])  # [r, in * kernel], [out, r]
            return new_a.reshape(-1, *a.shape[1:]), new_b.reshape(len(b), -1, *b.shape[2:])

        blocks = [(wide(a).flatten(1), wide(b).flatten(1))]
        yield Product(module, blocks, _lora_scale(held.config, module, len(a)), _putting(held, (down, up), made))


def _fixed(config: Any) -> str | None:
    """The variant of LoRA whose rank is bound to other tensors, or None."""
    if not hasattr(config, "lora_alpha"):
        return None
    cls = Lora.of(config)
    return cls.__name__ if cls.fixed_rank else None


def _lora_scale(config: Any, module: str, rank: int) -> float:
    if not hasattr(config, "lora_alpha"):
        return 1.0
    return config.alpha_at(module) / divisor(rank, config.use_rslora)


def _say_patterns(held: Held, old: dict[str, int], new: dict[str, int]) -> None:
    """Say the new ranks, and the alphas with which the scales stay."""
    config = held.config
    fields = dict(zip(("r", "rank_pattern"), patterned(new)))
    if isinstance(config, RankPatterns):
        rslora = getattr(config, "use_rslora", False)
        alphas = {m: whole(config.alpha_at(m) * divisor(rank / old[m], rslora)) for m, rank in new.items()}
        fields.update(zip((config.ALPHA, "alpha_pattern"), patterned(alphas)))
    held.config = dataclasses.replace(config, **fields)


# --- AdaLoRA ------------------------------------------------------------------------------------------------------


def _read_adalora(held: Held) -> Iterator[Product]:
    """B diag(E) A; the decomposition is what the method's own form is."""
    config = held.config
    for module, down, up in pairs_by_name(held, [("lora_A", "lora_B")]):
        middle = f"{PREFIX}{module}.lora_E"
        a, e, b = (wide(held.tensors[name]) for name in (down, middle, up))
        alpha = config.alpha_at(module)
        scale = (alpha if alpha > 0 else config.init_r) / (config.init_r + 1e-5)
        put = _putting(held, (down, middle, up), lambda found: (found[0][2], found[0][1][:, None], found[0][0]))
        yield Product(module, [(a * e, b)], scale, put)


def _say_masks(held: Held, old: dict[str, int], new: dict[str, int]) -> None:
    """AdaLoRA's ``rank_pattern``: a mask for each module, of the ranks that it started with."""
    size = held.config.init_r
    masks = {f"{module}.lora_E": [i < rank for i in range(size)] for module, rank in new.items()}
    held.config = dataclasses.replace(held.config, rank_pattern=masks)


# --- LoKr ---------------------------------------------------------------------------------------------------------


def _read_lokr(held: Held) -> Iterator[Product]:
    """W1 (x) W2 with a low-rank W2: the singular values of the product are those of W2 times those of W1."""
    tensors = held.tensors
    if cores := [name for name in tensors if name.rpartition(".")[2] in ("lokr_t2", "lokr_w1_a")]:
        raise ValueError(
            f"{cores[0]} shares its rank with another factor of LoKr, which are no single product; peft.save_as_lora "
            "writes a LoRA of any rank instead."
        )
    for module, up, down in pairs_by_name(held, [("lokr_w2_a", "lokr_w2_b")]):
        alpha = held.config.alpha_at(module)
        scale = alpha / len(tensors[down]) * float(tensors[f"{PREFIX}{module}.lokr_w1"].double().norm())
        put = _putting(held, (down, up), _halves_of_one)
        yield Product(module, [(wide(tensors[down]), wide(tensors[up]))], scale, put)


def _say_lokr(held: Held, old: dict[str, int], new: dict[str, int]) -> None:
    """The same; a module with a whole W2 stays as it is, whose rank says no more than its scale."""
    config = held.config
    kept = {name.removeprefix(PREFIX).removesuffix(".lokr_w2") for name in held.tensors if name.endswith(".lokr_w2")}
    same = {module: config.rank_at(module) for module in kept}
    _say_patterns(held, {**old, **same}, {**new, **same})


# --- GraLoRA ------------------------------------------------------------------------------------------------------


def _read_gralora(held: Held) -> Iterator[Product]:
    """k x k blocks: columns n, j of A ``[k, in / k, r]`` and rows n of B_j ``[k, r, out / k]``, of rank r / k each."""
    config = held.config
    for module, down, up in pairs_by_name(held, [("gralora_A", "gralora_B")]):
        a, b = wide(held.tensors[down]), wide(held.tensors[up])
        k = len(a)
        pieces_a, pieces_b = a.unflatten(2, (k, -1)), b.unflatten(1, (k, -1))  # [n, in, j, r / k], [j, n, r / k, out]
        blocks = [(pieces_a[n, :, j].mT, pieces_b[j, n].mT) for n in range(k) for j in range(k)]

        def put(found: Sequence[Svd], names: tuple[str, str] = (down, up), k: int = k) -> None:
            pairs = [halves(*svd) for svd in found]
            a = torch.stack([down.mT for down, _ in pairs]).unflatten(0, (k, k))  # [n, j, in, r / k]
            b = torch.stack([up.mT for _, up in pairs]).unflatten(0, (k, k))  # [n, j, r / k, out]
            ratio = (k * a.shape[-1] + config.hybrid_r) / (config.r + config.hybrid_r)  # alpha, an int, stays
            for name, new in zip(names, (a.transpose(1, 2).flatten(2), b.transpose(0, 1).flatten(1, 2) * ratio)):
                held.tensors[name] = new.to(held.tensors[name].dtype)
            if config.hybrid_r:
                name = f"{PREFIX}{names[0].removeprefix(PREFIX).removesuffix('gralora_A')}gralora_B_general.weight"
                held.tensors[name] = held.tensors[name] * ratio

        yield Product(module, blocks, config.alpha / (config.r + config.hybrid_r), put, k)


def _say_gralora(held: Held, old: dict[str, int], new: dict[str, int]) -> None:
    held.config = dataclasses.replace(held.config, r=next(iter(new.values())))


# --- one rank, and one scale by it, for all modules ---------------------------------------------------------------


def _read_dylora(held: Held) -> Iterator[Product]:
    """The ranks in use of B A; afterwards the first ranks are again the best ones."""
    used = held.config.rank or held.config.r
    for module, down, up in pairs_by_name(held, [("dylora_A", "dylora_B")]):
        a, b = wide(held.tensors[down])[:used], wide(held.tensors[up])[:, :used]
        yield Product(module, [(a, b)], held.config.alpha / used, _putting(held, (down, up), _halves_of_one))


def _say_dylora(held: Held, old: dict[str, int], new: dict[str, int]) -> None:
    rank, before = next(iter(new.values())), held.config.rank or held.config.r
    if rank < before:
        changes = {"r": rank, "rank": None, "min_r": min(held.config.min_r, rank)}
        held.config = dataclasses.replace(held.config, alpha=whole(held.config.alpha * rank / before), **changes)


def _read_lora_xs(held: Held) -> Iterator[Product]:
    """B R A; R becomes the singular values, A and B the vectors."""
    for module, down, up in pairs_by_name(held, [("xs_A", "xs_B")]):
        middle = f"{PREFIX}{module}.xs_R"
        a, r, b = (wide(held.tensors[name]) for name in (down, middle, up))
        put = _putting(held, (down, middle, up), lambda found: (found[0][2], found[0][1].diag(), found[0][0]))
        yield Product(module, [(a, b @ r)], held.config.alpha / len(a), put)


def _read_mix_lora(held: Held) -> Iterator[Product]:
    """A ``[experts * r, in]`` and B ``[out, experts * r]``: a product of each expert. Their routers stay."""
    experts = held.config.num_experts
    for module, down, up in pairs_by_name(held, [("mix_A", "mix_B")]):
        a, b = wide(held.tensors[down]).chunk(experts), wide(held.tensors[up]).chunk(experts, 1)
        put = _putting(held, (down, up), _side_by_side)
        yield Product(module, [*zip(a, b)], held.config.alpha / held.config.r, put)


def _side_by_side(found: Sequence[Svd]) -> tuple[torch.Tensor, torch.Tensor]:
    downs, ups = zip(*itertools.starmap(halves, found))
    return torch.cat(downs), torch.cat(ups, 1)


def _read_poly(held: Held) -> Iterator[Product]:
    """A ``[splits, skills, in / splits, r]``, B ``[splits, skills, r, out / splits]``, of which every A meets every B.

    What any mixture of the skills does is made of these products, so that one of all A and all B is cut.
    """
    for module, down, up in pairs_by_name(held, [("poly_lora_A", "poly_lora_B")]):
        a, b = wide(held.tensors[down]), wide(held.tensors[up])

        def made(found: Sequence[Svd], b: torch.Tensor = b) -> tuple[torch.Tensor, torch.Tensor]:
            new_a, new_b = halves(*found[0])
            rank, pieces = len(new_a), b.shape[:2]
            scaled = new_b.reshape(*pieces, -1, rank).transpose(2, 3) * (rank / b.shape[2])  # the scale is 1 / r
            return new_a.mT.reshape(*pieces, -1, rank), scaled

        blocks = [(a.flatten(0, 2).mT, b.transpose(2, 3).flatten(0, 2))]
        yield Product(module, blocks, 1 / a.shape[-1], _putting(held, (down, up), made))


def _say_uniform(held: Held, old: dict[str, int], new: dict[str, int]) -> None:
    """Say the new rank, and the alpha with which the scale stays, where there is one."""
    rank, config = next(iter(new.values())), held.config
    alpha = {"alpha": whole(config.alpha * rank / config.r)} if hasattr(config, "alpha") else {}
    held.config = dataclasses.replace(config, r=rank, **alpha)


METHODS = {
    "LORA": Method(_read_pairs, _say_patterns),
    "HIRA": Method(_read_pairs, _say_patterns),
    "ADALORA": Method(_read_adalora, _say_masks),
    "LOKR": Method(_read_lokr, _say_lokr),
    "GRALORA": Method(_read_gralora, _say_gralora, uniform=True),
    "DYLORA": Method(_read_dylora, _say_dylora, uniform=True),
    "LORA_XS": Method(_read_lora_xs, _say_uniform, uniform=True),
    "MIX_LORA": Method(_read_mix_lora, _say_uniform, uniform=True),
    "POLY": Method(_read_poly, _say_uniform, uniform=True),
}
"""Method -> how it keeps products."""

_WHY = {
    ("LOHA", "ABBA"): "two products are multiplied entry by entry, of which there is no best one of a lower rank",
    ("VERA", "PVERA", "RANDLORA", "VBLORA", "UNILORA", "TINYLORA"): "its matrices are drawn, or shared by layers",
    ("DELORA",): "each of its directions has the same length, which a decomposition does not keep",
    ("MISS",): "one block is repeated over the weight, and its rank is the length of that block",
    ("LILY", "COMOL", "MTL_LORA"): "its factors meet in ways that depend on the input or the task, between A and B",
    ("SHIRA", "SUPERTUNING"): "its update is single entries, of which the rank says the number alone",
    ("GLORA",): "it changes weight and bias by several factors, each of which may be low-rank or not",
    ("REFT", "PEANUT", "SHADOW"): "it is no change of a weight, or a network between its factors",
    ("PSOFT", "ADAMSS", "OSF", "DEFT"): "its factors are parts of the base weight, which come with their rank",
}
WHY_NOT = {method: why for methods, why in _WHY.items() for method in methods}
"""Method with a rank -> why a file says no lower one."""

"""LyCORIS' algorithms that have no method of their own here: what they do to a weight, as LoRAs; its norms and IA3.

Whole changes (``diff``) are LoRAs of full rank, one of whose factors is the identity. So are rotations of a weight's
rows (``oft_blocks``: OFT, BOFT), GLoRA, T-LoRA, and DoRA's scales on LoHa, LoKr or inputs, which need the base weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from peft.convert.formats.flux import weight_in
from peft.convert.held import Held, Pair
from peft.convert.source import Job
from peft.core.files.io import PREFIX
from peft.core.layer.weight import wide
from peft.errors import ConfigError
from peft.tuners.cayley import cayley
from peft.tuners.ia3 import IA3Config
from peft.tuners.ln_tuning import LNTuningConfig
from peft.tuners.loha import loha_weight
from peft.tuners.lokr import lokr_factor, lokr_weight


Parts = dict[str, torch.Tensor]
_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
_TLORA = ("q_layer.weight", "p_layer.weight", "lambda_layer")
CHANGES = ("diff", "oft_blocks", "rescale", *_GLORA, *_TLORA)
"""Names of tensors that are read as a LoRA of what they do."""
NORMS = {"w_norm": "weight", "b_norm": "bias"}
"""What is added to which parameter of a norm."""


def alpha_of(parts: Parts, rank: int) -> float:
    """alpha of a module: the scale is alpha over the rank; without one, or with 0, it is 1."""
    alpha = float(parts["alpha"]) if "alpha" in parts else 0.0
    # LyCORIS takes an alpha of 0 for none.
    return (alpha or rank) * (float(parts["scalar"]) if "scalar" in parts else 1.0)


def is_change(parts: Parts) -> bool:
    """Whether a module's tensors are read as a LoRA of what they do: no method here has their form."""
    if parts.keys() & set(CHANGES):
        return True
    up, scale = parts.get("lora_up.weight"), parts.get("dora_scale")
    return scale is not None and (up is None or len(scale) != len(up))


def change_of(module: str, parts: Parts, job: Job) -> torch.Tensor:
    """dW of a module, ``[out, in, *kernel]``, in float32 or wider where it is computed.

    Raises:
        ConfigError: the base weight is needed, and is not given.
    """
    if "diff" in parts:
        return parts["diff"]
    if "dora_scale" not in parts and parts.keys() & {"lokr_w1", "lokr_w1_a"}:
        return kronecker({name: wide(t) for name, t in parts.items()})
    weight = wide(weight_in(job.need_base(f"{module} is changed by a factor of its weight"), module))
    alpha, parts = parts.get("alpha"), {name: tensor.to(weight.dtype) for name, tensor in parts.items()}
    if "oft_blocks" in parts:
        rotated = _rotated(weight, parts["oft_blocks"], 0.0 if alpha is None else float(alpha))
        return rotated * parts.get("rescale", torch.ones(())) - weight
    if "a1.weight" in parts:
        rank = len(parts["a2.weight"])
        return alpha_of(parts, rank) / rank * glora_change(weight, *(parts[name] for name in _GLORA))
    if "lambda_layer" in parts:
        rank = len(parts["q_layer.weight"])
        if any(size > 1 for size in weight.shape[2:]):
            raise ConfigError(f"{module}: T-LoRA has no meaning on a kernel {list(weight.shape[2:])}, only on 1 x 1.")
        return alpha_of(parts, rank) / rank * tlora_change(weight, *(parts[name] for name in _TLORA))
    return decomposed(weight + _product(parts, weight.shape), parts["dora_scale"]) - weight


def _product(parts: Parts, shape: torch.Size) -> torch.Tensor:
    """dW of a LoRA, LoHa or LoKr without DoRA's scales."""
    if "lora_up.weight" in parts:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        if (mid := parts.get("lora_mid.weight")) is not None:
            down = torch.einsum("ij...,jn->in...", mid, down.flatten(1))
        change = (up.flatten(1) @ down.flatten(1)).view(shape)
        return change * (alpha_of(parts, len(down)) / len(down))
    if "hada_w1_a" in parts:
        a1, b1, a2, b2 = (parts[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        cores = (parts["hada_t1"], parts["hada_t2"]) if "hada_t1" in parts else None
        return loha_weight(a1, b1, a2, b2, cores, tuple(shape)) * (alpha_of(parts, len(b1)) / len(b1))
    return kronecker(parts).view(shape)


def lokr_factors(parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """W1 and W2 of a LoKr; a W2 of low rank without a core has its kernel's axes flattened."""
    (w1, a1, b1), (w2, a2, b2) = ([parts.get(f"lokr_w{n}{end}") for end in ("", "_a", "_b")] for n in (1, 2))
    return lokr_factor(w1, a1, b1), lokr_factor(w2, a2, b2, parts.get("lokr_t2"))


def kronecker(parts: Parts) -> torch.Tensor:
    """dW of a LoKr, ``[out, in, *kernel]``; of two whole factors the scale is 1, whatever alpha says."""
    small = next((parts[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in parts), None)
    scale = 1.0 if small is None else alpha_of(parts, len(small)) / len(small)
    first, second = lokr_factors(parts)
    shape = (len(first) * len(second), first.shape[1] * second.shape[1], *second.shape[2:])
    return lokr_weight(first, second, shape) * scale


def decomposed(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A weight ``[out, in, *kernel]`` whose rows, or columns, have other norms.

    Args:
        scale: the norms, ``[out, 1, ...]`` of rows or ``[1, in, ...]`` of columns.
    """
    axes = [axis for axis in range(weight.dim()) if axis != int(len(scale) == 1)]  # norms of rows, or of columns
    norms = torch.linalg.vector_norm(weight, dim=axes, keepdim=True) + torch.finfo(weight.dtype).eps
    return weight * (scale.view([*scale.shape, *[1] * (weight.dim() - scale.dim())]) / norms)


def tlora_change(weight: torch.Tensor, q: torch.Tensor, p: torch.Tensor, singular: torch.Tensor) -> torch.Tensor:
    """P diag(s) Q without what that was at the start: W's largest singular values (at all timesteps alike).

    Args:
        weight: ``[out, in, ...]``, of one position. q: ``[r, in, ...]``. p: ``[out, r, ...]``. singular: ``[1, r]``.
    """
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    rank = len(q)
    start = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return ((p.flatten(1) * singular) @ q.flatten(1) - start).view_as(weight)


def glora_change(
    weight: torch.Tensor, a1: torch.Tensor, a2: torch.Tensor, b1: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """W A1 A2 + B1 B2 with A1 ``[in, r]``, A2 ``[r, in]``, B1 ``[out, r]``, B2 ``[r, in, *kernel]``."""
    mixed = torch.einsum("oi...,ij->oj...", weight, a1.flatten(1) @ a2.flatten(1))
    return mixed + torch.einsum("or,ri...->oi...", b1.flatten(1), b2)


def rotations_of(blocks: torch.Tensor, constraint: float = 0.0) -> torch.Tensor:
    """R = (I + Q) (I - Q)^-1 with Q = S - S^T, which is orthogonal.

    Args:
        blocks: S, ``[..., b, b]``. constraint: the most that Q's norm over all blocks can be; 0 for none.
    """
    q = blocks - blocks.mT
    norm = q.norm()
    if constraint and norm > constraint:
        q = q * (constraint / norm)
    return cayley(q)


def _rotated(weight: torch.Tensor, blocks: torch.Tensor, alpha: float) -> torch.Tensor:
    """The rows of a weight, rotated.

    OFT has blocks ``[n, b, b]`` of neighbouring rows, which take R^T; BOFT a butterfly ``[m, n, b, b]``: its factor i
    takes R on rows that lie ``2^i b / 2`` apart. OFT's alpha is the constraint over the number of rows.
    """
    rows = weight.flatten(1)
    if blocks.dim() == 3:
        turned = rotations_of(blocks, alpha * len(rows)).mT @ rows.unflatten(0, (len(blocks), -1))
        return turned.flatten(0, 1).view_as(weight)
    for i, rotation in enumerate(rotations_of(blocks, alpha * len(rows))):
        apart = 2**i * (blocks.shape[-1] // 2)
        pairs = rows.unflatten(0, (-1, 2, apart)).transpose(1, 2)  # [.., apart, 2, in * kernel]
        turned = rotation @ pairs.flatten(0, 2).unflatten(0, (-1, blocks.shape[-1]))
        rows = turned.flatten(0, 1).unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return rows.view_as(weight)


# --- changes of full rank as pairs --------------------------------------------------------------------------------


def whole_pair(change: torch.Tensor) -> Pair:
    """A pair whose product is dW to the bit: one factor is the identity, the one that makes the rank lower."""
    out, inner = change.shape[0], math.prod(change.shape[1:])
    if change.dim() == 2 and inner < out:
        return Pair(torch.eye(inner, dtype=change.dtype), change, inner)
    up = torch.eye(out, dtype=change.dtype).view(out, out, *[1] * (change.dim() - 2))
    return Pair(change, up, out)


def whole_of(pair: Pair, scale: float) -> torch.Tensor | None:
    """dW of a pair as :func:`whole_pair` makes them, or None."""
    if scale != 1 or pair.magnitude is not None:
        return None
    for factor, other in ((pair.up, pair.down), (pair.down, pair.up)):
        flat = factor.flatten(1)
        if flat.shape[0] == flat.shape[1] and torch.equal(flat, torch.eye(len(flat), dtype=flat.dtype)):
            return other
    return None


# --- norms --------------------------------------------------------------------------------------------------------


def with_norms(norms: dict[str, Parts], others: Iterable[Held], job: Job) -> Held | None:
    """Norms that change, as whole modules: beside another adapter, or else an adapter of their own, which is returned.

    Raises:
        ConfigError: the base model, to whose weights they are added, is not given.
    """
    base, values = job.need_base(f"{next(iter(norms))} is a change of a norm's weight"), {}
    beside = next(iter(others), None)
    for module, parts in norms.items():
        where = f"{PREFIX}{module}" + ("" if beside else ".ln_tuning_layers")
        for part, name in NORMS.items():
            if part in parts:
                values[f"{where}.{name}"] = base.tensor(module, name) + parts[part]
    if beside is None:
        return Held(LNTuningConfig(target_modules=sorted(norms), inference_mode=True), values)
    beside.tensors.update(values)
    beside.config.modules_to_save = sorted(norms)
    return None


def norm_parts(held: Held, job: Job) -> dict[str, Parts]:
    """The other way: what whole norms of an adapter add to those of the base, by module. They leave the adapter."""
    found: dict[str, Parts] = {}
    for name in [*held.tensors]:
        module, _, tail = name.removeprefix(PREFIX).rpartition(".")
        module = module.removesuffix(".ln_tuning_layers")
        part = next((part for part, parameter in NORMS.items() if parameter == tail), "")
        if part and held.tensors[name].dim() == 1 and module in _whole_modules(held) and job.base is not None:
            found.setdefault(module, {})[part] = held.tensors.pop(name) - job.base.tensor(module, tail)
    return found


def _whole_modules(held: Held) -> set[str]:
    if isinstance(held.config, LNTuningConfig):
        return {name.removeprefix(PREFIX).partition(".ln_tuning_layers")[0] for name in held.tensors}
    saved = tuple(getattr(held.config, "modules_to_save", None) or ())
    return {module for module in held.by_module if any(f".{module}".endswith(f".{name}") for name in saved)}


# --- IA3 ----------------------------------------------------------------------------------------------------------

_BIAS = "LyCORIS' IA3 leaves the bias as it is, and IA3 here scales it with the output"


def ia3_held(modules: dict[str, Parts], job: Job) -> Held:
    """An IA3: 1 + w, of outputs or of inputs (``on_input``).

    LyCORIS scales the weight and leaves the bias, and IA3 here scales the output: where outputs are scaled and there
    is a bias, they are not the same.
    """
    tensors, inputs = {}, []
    for module, parts in modules.items():
        scale = 1 + parts["weight"]
        if bool(parts.get("on_input", torch.zeros(()))):
            inputs.append(module)
        elif job.base is None:
            job.notes.append(f"{module}: {_BIAS}, if there is one")
        elif job.base.has_bias(module):
            job.lost[f"{module}.bias"] = _BIAS
        if scale.dim() == 1:
            scale = scale[None] if module in inputs else scale[:, None]
        tensors[f"{PREFIX}{module}.ia3_l"] = scale
    config = IA3Config(target_modules=sorted(modules), feedforward_modules=sorted(inputs), inference_mode=True)
    return Held(config, tensors)


def ia3_parts(held: Held, module: str, tensor: torch.Tensor) -> Parts:
    """The other way."""
    on_input = module in (held.config.feedforward_modules or ())
    if tensor.dim() == 2:
        tensor = tensor.flatten()
    return {"weight": tensor - 1, "on_input": torch.tensor(on_input)}

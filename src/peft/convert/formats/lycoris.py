"""LyCORIS' algorithms that have no method of their own here: what they do to a weight, as LoRAs; and its IA3.

Whole changes (``diff``) are LoRAs of full rank, one of whose factors is the identity, and so are rotations of a
weight's rows (``oft_blocks``: OFT, BOFT) and GLoRA, which multiply the base weight and need it to be read.
"""

from __future__ import annotations

import math

import torch

from peft.convert.held import PREFIX, Held, Pair
from peft.convert.source import Job
from peft.tuners.ia3 import IA3Config


Parts = dict[str, torch.Tensor]
CHANGES = ("diff", "oft_blocks", "rescale", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight")
"""Names of tensors that are read as a LoRA of what they do."""


def change_of(module: str, parts: Parts, scale: float, job: Job) -> torch.Tensor:
    """dW of a module, ``[out, in, *kernel]``, in float32 or wider.

    Args:
        scale: alpha over rank, of GLoRA.

    Raises:
        ConfigError: the base weight is needed, and is not given.
    """
    if "diff" in parts:
        return parts["diff"]
    need = job.need_base(f"{module} is changed by a factor of its weight").weight(module)
    weight = need if need.dtype == torch.float64 else need.float()
    if "oft_blocks" in parts:
        rotated = _rotated(weight, parts["oft_blocks"].to(weight.dtype), float(parts.get("alpha", torch.zeros(()))))
        return rotated * parts.get("rescale", torch.ones(())).to(weight.dtype) - weight
    return scale * glora_change(
        weight, *(parts[f"{name}.weight"].to(weight.dtype) for name in ("a1", "a2", "b1", "b2"))
    )


def glora_change(
    weight: torch.Tensor, a1: torch.Tensor, a2: torch.Tensor, b1: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """W A1 A2 + B1 B2 with A1 ``[in, r]``, A2 ``[r, in]``, B1 ``[out, r]``, B2 ``[r, in, *kernel]``."""
    mixed = torch.einsum("oi...,ij->oj...", weight, a1.flatten(1) @ a2.flatten(1))
    return mixed + torch.einsum("or,ri...->oi...", b1.flatten(1), b2)


def cayley(blocks: torch.Tensor, constraint: float = 0.0) -> torch.Tensor:
    """R = (I + Q) (I - Q)^-1 with Q = S - S^T, which is orthogonal.

    Args:
        blocks: S, ``[..., b, b]``. constraint: the most that Q's norm over all blocks can be; 0 for none.
    """
    q, eye = blocks - blocks.mT, torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    norm = q.norm()
    if constraint and norm > constraint:
        q = q * (constraint / norm)
    return (eye + q) @ torch.linalg.inv(eye - q)


def _rotated(weight: torch.Tensor, blocks: torch.Tensor, alpha: float) -> torch.Tensor:
    """The rows of a weight, rotated.

    OFT has blocks ``[n, b, b]`` of neighbouring rows, which take R^T; BOFT a butterfly ``[m, n, b, b]``: its factor i
    takes R on rows that lie ``2^i b / 2`` apart. OFT's alpha is the constraint over the number of rows.
    """
    rows = weight.flatten(1)
    if blocks.dim() == 3:
        turned = cayley(blocks, alpha * len(rows)).mT @ rows.unflatten(0, (len(blocks), -1))
        return turned.flatten(0, 1).view_as(weight)
    for i, rotation in enumerate(cayley(blocks, alpha * len(rows))):
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

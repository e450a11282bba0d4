"""How the pairs of LoRA start (``init_lora_weights``).

Some starts put a part of the weight into the pair and take it out of the base: W' = W - s B A, so that what is most
important, by some measure, trains, and the output stays. The formula of each is a function of plain tensors. The base
comes back when the adapter goes, see :mod:`peft.core.layer.rewritten`.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.core.base.kinds import Kind
from peft.core.base.storage import storage_of
from peft.core.filling import draw_like_linear, is_filled_later
from peft.core.layer.rewritten import original_weight, rewrite
from peft.errors import PeftWarning
from peft.tuners.lora.config import LoraConfig, LoraGAConfig
from peft.tuners.lora.loftq import loftq_init
from peft.tuners.lora.pairs import join_pair, pair_blocks
from peft.tuners.lora.starts import PISSA, Pair, lora_ga, olora, pissa


if TYPE_CHECKING:
    from peft.tuners.lora.layer import Lora


def rewrites(init: Any) -> bool:
    """Whether a start changes the base weight."""
    return init in ("olora", "corda", "lora_ga", "loftq") or (isinstance(init, str) and bool(PISSA.fullmatch(init)))


def is_repeatable(init: Any) -> bool:
    """Whether a start gives the same again on the same base, without data and without chance."""
    return init in ("pissa", "olora", "loftq")


def is_drawn(config: LoraConfig) -> bool:
    """Whether A and B start without regard to the base weight, and leave it alone."""
    return config.init_lora_weights in (True, False, "gaussian", "orthogonal", "eva")


def refusal(kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
    """Why the start that a config asks for has no meaning on such a layer, or None."""
    init = config.init_lora_weights
    if not rewrites(init) or (kind.lookup and init != "loftq"):
        return None
    storage, start = storage_of(module, kind.weight), f"init_lora_weights={init!r}"
    if init == "loftq":
        if kind.name != "Linear":
            return f"{start} quantises linear layers only"
        if storage.name is not None:
            return (
                f"{start} starts from a dense weight, and {storage.name} keeps this one; use the default "
                "initialisation and then peft.replace_lora_weights_loftq"
            )
    if reason := kind.no_dense_pair(module):
        return f"{start} takes B A out of the weight, but {reason}"
    if not (storage.can_read and storage.can_write):
        return (
            f"{start} rewrites the base weight, and one kept by {storage.name} cannot be "
            f"{'written' if storage.can_read else 'read'}; use init_lora_weights=True, or load the base unquantised"
        )
    return None


@torch.no_grad()
def initialize(lora: Lora, config: LoraConfig) -> None:
    """Fill A and B of a fresh adapter. Every choice but False leaves the output as it is, up to rounding.

    Raises:
        ValueError: if the base weight that a start decomposes, or what was to be prepared for it, is not there.
    """
    init = config.init_lora_weights
    unprepared = lora.context.common.unprepared
    unprepared.pop(lora.name, None)
    if init == "eva" and not is_filled_later():
        unprepared[lora.name] = partial(_waiting, lora)
    _as_torch_does(lora)  # first in any case: then a seed gives the numbers that it gives elsewhere
    if init is False:
        return
    a, b = lora.held_pair()
    if rewrites(init) and not (lora.kind.lookup and init != "loftq"):
        _rewriting(lora, config)
    elif init == "orthogonal":
        for down, up in lora.kind.pairs(lora.base, a, b):
            orthogonal(down, up)
    elif lora.kind.lookup:
        a.zero_()
        b.normal_()
    else:
        _zero_up(a, b, std=1 / lora.r if init == "gaussian" else None)
    if lora.lora_bias:
        lora.lora_B.bias.zero_()


def decomposed_weight(layer: Any, init: Any) -> torch.Tensor:
    """The weight ``[out, in, *kernel]`` that a start decomposes.

    Raises:
        ValueError: if it has no values.
    """
    weight = original_weight(layer).detach()
    if weight.is_meta:
        raise ValueError(
            f"init_lora_weights={init!r} decomposes the base weight, and that of {layer.key or 'this layer'!r} has no "
            "values yet (it is on the meta device). Load the base model's weights first, or start with "
            "init_lora_weights=True and call peft.initialize later."
        )
    return weight


def _rewriting(lora: Lora, config: LoraConfig) -> None:
    """A start that changes the base weight."""
    init, (a, b) = config.init_lora_weights, lora.held_pair()
    if init in PREPARED and PREPARED[init][0] not in lora.base.__dict__:
        _unprepared(lora, init)
        return _zero_up(a, b, None)
    weight = decomposed_weight(lora.layer, init)
    if init == "loftq":
        return _loftq(lora, weight, config)
    with weight.device:  # the pair may be on the meta device, to be loaded later; the weight is not
        blocks = pair_blocks(lora)[0]
        wide = weight.flatten(1).float().unflatten(0, (blocks, -1))  # [blocks, out / blocks, in * kernel]
        gradient = _gradient(lora, wide) if init == "lora_ga" else wide
        pairs = [_decomposed(lora, config, *both) for both in zip(wide, gradient)]
        down, up = (torch.stack(factors) for factors in zip(*pairs))
        if down.shape[1] < lora.r:  # the weight has no more directions than that
            down, up = (nn.functional.pad(t, pad) for t, pad in ((down, (0, 0, 0, lora.r - down.shape[1])),
                                                                (up, (0, lora.r - up.shape[2]))))  # fmt: skip
        rest = (wide - lora.scaling * (up @ down)).flatten(0, 1).view_as(weight)
    rewrite(lora.layer, lora.name, rest.to(weight.dtype))
    for tensor, value in zip((a, b), join_pair(lora, down, up)):
        tensor.copy_(value)


PREPARED = {
    "corda": ("eigens", "preprocess_corda(model, config, run_model)"),
    "lora_ga": ("_peft_loraga_grad", "preprocess_loraga(model, config, train_step)"),
}
"""Starts that need something taken from data before: the attribute of a module that holds it, what puts it there."""


def _unprepared(lora: Lora, init: str) -> None:
    """Say what it means that nothing was prepared: of a file that is loaded, and of a start."""
    call = PREPARED[init][1]
    if is_filled_later():
        message = (
            f"the adapter was started by init_lora_weights={init!r}, and its tensors belong to a base that this start "
            f"had rewritten. On another base they mean something else: load that one, call {call} with the same data "
            "before, or save the adapter again with path_initial_model_for_weight_conversion."
        )
    else:
        message = (
            f"init_lora_weights={init!r} needs {call} before get_peft_model; without it {lora.layer.key or 'a layer'} "
            "starts as plain LoRA."
        )
    warnings.warn(message, PeftWarning, stacklevel=2)


def _waiting(lora: Lora) -> str | None:
    """What there is to say of an EVA that trains; None before it does, "" where its values came from elsewhere."""
    a, b = lora.held_pair()
    if not a.requires_grad:
        return None
    return bool(not b.any()) * (
        f"adapter {lora.name!r} has init_lora_weights='eva' and trains from the default start, as "
        "initialize_lora_eva_weights(model, dataloader) was not called after get_peft_model."
    )


def _gradient(lora: Lora, like: torch.Tensor) -> torch.Tensor:
    """The gradient that was taken of the weight, as the weight is cut; the module lets go of it."""
    taken = lora.base.__dict__.pop(PREPARED["lora_ga"][0])  # as large as the weight, and read once
    return lora.kind.orient(taken, lora.base).flatten(1).to(like).view_as(like)


def _decomposed(lora: Lora, config: LoraConfig, weight: torch.Tensor, gradient: torch.Tensor) -> Pair:
    """A and B of one block ``[out, in * kernel]`` of the weight, float32, with its gradient where that is taken."""
    init, root = config.init_lora_weights, math.sqrt(lora.scaling)
    if init == "olora":
        return olora(weight, lora.r)
    if init == "lora_ga":
        options = config.lora_ga_config or LoraGAConfig()
        return lora_ga(gradient, weight, lora.r, lora.scaling, options.direction, options.scale, options.stable_gamma)
    if init == "corda":
        eigens = lora.base.__dict__[PREPARED["corda"][0]]
        root_s = eigens.S_WC.to(weight).sqrt() / root
        return root_s[:, None] * eigens.V_WC.to(weight).T, eigens.U_WC.to(weight) * root_s
    match: Any = PISSA.fullmatch(str(init))
    if match[1] and is_filled_later():
        warnings.warn(
            f"the adapter was started by init_lora_weights={init!r}, which draws a random projection, and its tensors "
            "belong to a base that this start had rewritten. The start is repeated on this base, and gives the same "
            "only with the seed that was set right before it then (torch.manual_seed). Save the adapter again with "
            "path_initial_model_for_weight_conversion, which depends on no draw.",
            PeftWarning,
            stacklevel=2,
        )
    a, b = pissa(weight, lora.r, int(match[1]) if match[1] else None)
    return a / root, b / root


def _as_torch_does(lora: Lora) -> None:
    if lora.kind.lookup:
        for table in lora.held_pair():
            table.normal_()
        return
    for linear in (lora.lora_A, lora.lora_B):
        if type(linear) is nn.Linear and linear.bias is None:
            draw_like_linear(linear.weight)
        else:
            linear.reset_parameters()


def _zero_up(a: torch.Tensor, b: torch.Tensor, std: float | None) -> None:
    """A normal with this standard deviation, by default uniform in +-1/sqrt(fan_in); B zero."""
    if std is None:
        draw_like_linear(a)
    else:
        nn.init.normal_(a, std=std)
    b.zero_()


def _loftq(lora: Lora, weight: torch.Tensor, config: LoraConfig) -> None:
    """W becomes what is left of it in few bits, and s B A fits the rest (LoftQ)."""
    options: Any = config.loftq_config
    bits, turns = (options.get("loftq_bits", 4), options.get("loftq_iter", 1)) if isinstance(options, dict) else (
        options.loftq_bits, options.loftq_iter
    )  # fmt: skip
    with weight.device:  # the pair may be on the meta device, to be loaded later; the weight is not
        rounded, down, up = loftq_init(weight, bits, lora.r, turns)
    rewrite(lora.layer, lora.name, rounded)
    a, b = lora.held_pair()
    a.copy_(down)
    b.copy_(up / lora.scaling)


@torch.no_grad()
def orthogonal(a: torch.Tensor, b: torch.Tensor) -> None:
    """A and B from the odd and the even rows of one random orthogonal matrix: B A = 0, neither factor is."""
    r = a.shape[0]
    if r % 2:
        raise ValueError(
            f"init_lora_weights='orthogonal' needs an even rank, and in this layer each group has rank {r}; choose "
            "another r, for instance with rank_pattern."
        )
    q, _ = torch.linalg.qr(torch.randn(r, r))
    a.copy_((torch.randn(a[0].numel(), r // 2) @ q[0::2]).T.view_as(a) / 10)
    b.copy_((torch.randn(r // 2, b.shape[0]).T @ q[1::2]).view_as(b) / 10)

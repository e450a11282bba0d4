"""What a model and a training step hold in memory, counted on the meta device, where tensors take none.

The model's own forward runs there, and the tensors that autograd keeps are counted: nothing is guessed from a formula
of an architecture.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from peft.core.base.kinds import kind_of
from peft.core.base.storage import hooks_of, plain_tensors, storage_of, without_hooks
from peft.core.model.gradient_checkpointing import switched_on
from peft.core.model.walk import Site, embeddings_of, walk
from peft.kernels.few import meta_stands_for


OPTIMIZERS = {"adamw": 2.0, "adamw_8bit": 0.5, "momentum": 1.0, "sgd": 0.0}
"""Optimizer -> how many times the bytes of the (32-bit) trained parameters its states take."""

_BLOCK_OF_4_BITS = 64  # entries that share a 4-byte scale in a 4-bit weight


def readable(n: float) -> str:
    """Bytes with a unit: ``1.5 GB``, of powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}" if unit != "B" else f"{n:.0f} B"
        n /= 1000
    return f"{n:,.3g} TB"


# --- models without memory ------------------------------------------------------------------------------------


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, adapters included; quantised layers become dense ones."""
    memo: dict[int, Any] = hooks_of(model)
    for site in walk(model):
        kind = kind_of(site.module)
        if kind is None or storage_of(site.module, kind.weight).name is None:
            continue
        inner, out = kind.sizes(site.module)
        kept = storage_of(site.module, kind.weight).compute_dtype(site.module, kind.weight)
        bias = getattr(site.module, "bias", None) is not None
        memo[id(site.module)] = nn.Linear(inner, out, bias, device="meta", dtype=kept).requires_grad_(False)
    for p in model.parameters():
        # What is no plain parameter (codes, tensor subclasses) is copied as it is.
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) if _is_dense(p) else None
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return without_hooks(copy.deepcopy(model, {k: v for k, v in memo.items() if v is not None}))


def _is_dense(p: torch.Tensor) -> bool:
    return type(p) is nn.Parameter and p.is_floating_point()


def device_of(model: nn.Module) -> str:
    """Type of the device that a model trains on; that of a model on the meta device is taken to be "cuda"."""
    found = next((p.device.type for p in model.parameters()), "meta")
    return "cuda" if found == "meta" else found


def on_meta(value: Any) -> Any:
    """The same with tensors of the meta device."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {name: on_meta(part) for name, part in value.items()}
    return type(value)(on_meta(part) for part in value) if type(value) in (list, tuple) else value


# --- bytes of weights -----------------------------------------------------------------------------------------


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once, with what storages keep beside them."""
    own = [t for whole in (*model.parameters(), *model.buffers()) for t in plain_tensors(whole)]
    for m in model.modules():
        storage = storage_of(m, "weight")
        own += storage.tensors(m, "weight") if storage.name is not None else ()
    return sum({t.untyped_storage()._cdata: t.nbytes for t in own}.values())


def bytes_saved(site: Site, model: nn.Module, bits: int | None) -> int:
    """Bytes that a dense linear layer would save if its weight were kept in so many bits."""
    kind = kind_of(site.module)
    if bits is None or kind is None or kind.name != "Linear" or site.module in embeddings_of(model):
        return 0
    if storage_of(site.module, kind.weight).name is not None:
        return 0
    weight = getattr(site.module, kind.weight)
    scales = weight.numel() // _BLOCK_OF_4_BITS if bits == 4 else kind.sizes(site.module)[1]
    return weight.nbytes - weight.numel() * bits // 8 - 4 * scales


# --- bytes of activations -------------------------------------------------------------------------------------


_GROUPED = {getattr(torch, "_grouped_mm", None), getattr(nn.functional, "grouped_mm", None)} - {None}
_QUESTIONS = {torch.all: True, torch.Tensor.all: True, torch.any: False, torch.Tensor.any: False}


class _KeepsAs(TorchFunctionMode):
    """On the meta device, attention and dropout keep what they keep on another: GPUs fuse what CPUs do in steps.

    Models ask whether all of a mask is set, or all positions follow one another: where there are no values, they do.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.fuses = device != "cpu"

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = {**dict(zip(names, args)), **kwargs}
            if self.fuses or not given.get("dropout_p"):
                return _fused_attention(**given)
        # Models ask whether a mask is full, which has no answer without values: the usual one is given.
        elif func in _QUESTIONS and len(args) == 1 and not kwargs and args[0].is_meta:
            return torch.tensor(_QUESTIONS[func])
        elif func in _GROUPED and args[0].is_meta:  # which refuses all but bfloat16
            return args[0] @ args[1][0]  # one expert's product keeps the same
        elif func is nn.functional.dropout and self.fuses:
            given = {"p": 0.5, "training": True, **dict(zip(("input", "p", "training"), args)), **kwargs}
            if given["training"]:
                return torch.native_dropout(given["input"], given["p"], True)[0]
        return func(*args, **kwargs)


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


class _Ledger:
    """Bytes of the tensors that autograd keeps, by the block in which they were kept (None: outside of all)."""

    def __init__(self, model: nn.Module) -> None:
        own = [*model.parameters(), *model.buffers()]
        self.held = {t.untyped_storage()._cdata: t for t in own}  # references: an address stays taken
        self.in_block: dict[int | None, int] = {}
        self.block: int | None = None
        self.into_blocks = 0

    def note(self, t: torch.Tensor) -> torch.Tensor:
        self.in_block[self.block] = self.in_block.get(self.block, 0) + self._new(t)
        return t

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A block begins: its input is kept, and requires grad when the block is computed again."""
        self.block = id(module)
        first = args[0] if args else kwargs.get("hidden_states")
        if isinstance(first, torch.Tensor) and first.is_floating_point():
            self.into_blocks += self._new(first)
            again = first.detach().requires_grad_()
            return ((again, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": again})
        return args, kwargs

    def leave(self, *_: Any) -> None:
        self.block = None

    def _new(self, t: torch.Tensor) -> int:
        storage = t.untyped_storage()
        if storage._cdata in self.held:
            return 0
        self.held[storage._cdata] = t
        return storage.nbytes()


def activation_bytes(model: nn.Module, args: tuple, kwargs: dict[str, Any], checkpointing: bool, device: str) -> int:
    """The most bytes that autograd keeps at once in a step of this model, which is on the meta device."""
    for module in switched_on(model):
        module.gradient_checkpointing = False  # the blocks are told apart here
    blocks = blocks_of(model)
    if checkpointing and not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks that transformers could checkpoint; leave gradient_checkpointing "
            "out."
        )
    ledger = _Ledger(model)
    for block in blocks if checkpointing else ():
        block.register_forward_pre_hook(ledger.enter, with_kwargs=True)
        block.register_forward_hook(ledger.leave)
    model.train()
    hooks = saved_tensors_hooks(ledger.note, lambda t: t)
    with torch.enable_grad(), _KeepsAs(device), meta_stands_for(device), hooks, quiet():
        model(*args, **kwargs)
    outside = ledger.in_block.pop(None, 0)
    return outside + ledger.into_blocks + max(ledger.in_block.values(), default=0)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: they are of the real call's business, which will say so itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that gradient checkpointing recomputes."""
    return [m for m in model.modules() if any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(m).__mro__)]

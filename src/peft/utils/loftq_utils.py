"""LoftQ: Q and the pair B A that best make up W together, |W - Q - B A| small, in turns (arXiv 2310.08659, alg. 1)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file


BLOCK = 64
"""Entries that share a scale."""


def round_to_bits(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """What is left of a weight ``[out, in]`` that is quantised and read again; any device, the same dtype.

    With 4 bits and bitsandbytes installed, NF4; otherwise codes at the quantiles of a normal distribution, scaled by
    the largest magnitude in blocks of 64 entries (QLoRA, arXiv 2305.14314, section 3).

    Raises:
        ValueError: if ``bits`` is not 2, 4 or 8.
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"LoftQ quantises to 2, 4 or 8 bits, not {bits}.")
    if bits == 4:
        try:
            from bitsandbytes import functional
        except ImportError:
            pass
        else:
            codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
            return functional.dequantize_4bit(codes, state).to(weight.dtype)
    table = _normal_table(bits).to(weight.device)
    flat = weight.float().flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    between = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(blocks / scale.clamp_min(1e-30), between)
    return (table[codes] * scale).flatten()[: len(flat)].view_as(weight).to(weight.dtype)


def _normal_table(bits: int, offset: float = 0.9677083) -> torch.Tensor:
    """2^bits ascending codes: quantiles of N(0, 1) on both sides of an exact zero, the largest scaled to 1."""
    half = 2 ** (bits - 1)
    upper = [_quantile(p) for p in torch.linspace(offset, 0.5, half + 1)[:-1].tolist()]
    lower = [-_quantile(p) for p in torch.linspace(offset, 0.5, half)[:-1].tolist()]
    table = torch.tensor(sorted([*upper, 0.0, *lower]))
    return table / table.max()


def _quantile(p: float) -> float:
    return float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64)))


def low_rank(weight: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``[r, in]`` and B ``[out, r]``, so that B A is the best approximation of rank r and both have equal norm."""
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[:r].sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


@torch.no_grad()
def loftq_init(
    weight: torch.Tensor | nn.Parameter, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise a weight and fit a pair to the rest, in turns.

    Args:
        weight: ``[out, in]``, dense.
        num_bits: 2, 4 or 8.
        reduced_rank: rank of the pair.
        num_iter: how many turns; the best of them counts.

    Returns:
        The weight that the base shall have, read from its codes, in the dtype of ``weight``; A ``[r, in]`` and B
        ``[out, r]`` in float32.

    Raises:
        ValueError: for other bits, or fewer than one turn.
    """
    if num_iter < 1:
        raise ValueError(f"LoftQ takes at least one iteration, not {num_iter}.")
    wide = weight.detach().float()
    pair, least = torch.zeros_like(wide), float("inf")
    for _ in range(num_iter):
        rounded = round_to_bits(wide - pair, num_bits)
        a, b = low_rank(wide - rounded, reduced_rank)
        pair = b @ a
        error = float((wide - rounded - pair).norm())
        if error < least:  # at two bits a turn can make it worse
            least, best = error, (rounded.to(weight.dtype), a, b)
    return best


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Fit the LoRA of a model with a 4-bit base to what quantisation has taken from its weights, layer by layer.

    Args:
        peft_model: a :class:`PeftModel` with LoRA on layers quantised by bitsandbytes to 4 bits.
        model_path: the unquantised model's safetensors file, its folder, or its name on the hub; by default the
            folder or name that the base was loaded from.
        adapter_name: which adapter.
        callback: called as ``callback(model, module_name)`` after each layer; what it returns false for is put back.

    Raises:
        ValueError: if the model is no LoRA model, or has no 4-bit layer with this adapter.
        FileNotFoundError: if the unquantised weights are not found as safetensors.
        KeyError: if they lack a layer's weight.
    """
    from peft.core.layer.weight import unmerged_weight
    from peft.core.model.walk import layers_of  # not above: the core imports its helpers from this package
    from peft.tuners.lora import Linear4bit, LoraModel

    lora_model: Any = LoraModel
    tuner: Any = getattr(peft_model, "base_model", None)
    if not isinstance(tuner, lora_model):
        raise ValueError(f"LoftQ fits LoRA, and this is {type(tuner or peft_model).__name__} without it.")
    layers = [(n, layer) for n, layer in layers_of(tuner.model) if isinstance(layer, Linear4bit)]
    layers = [(name, layer) for name, layer in layers if adapter_name in layer]
    if not layers:
        raise ValueError(
            f"no layer that bitsandbytes keeps in 4 bits has an adapter {adapter_name!r}. Load the base with "
            "BitsAndBytesConfig(load_in_4bit=True), or use init_lora_weights='loftq' on a dense one."
        )
    prefix = getattr(tuner.model, "base_model_prefix", "")
    with _Weights(model_path or tuner.model.config._name_or_path) as weights:
        for name, layer in layers:
            full = weights.get(f"{name}.weight", prefix).to(layer.lora_A[adapter_name].weight.device).float()
            lora: Any = layer.adapters[adapter_name]
            pair = lora.held_pair()
            before = [t.detach().clone() for t in pair]
            fitted = low_rank(full - unmerged_weight(layer).float(), layer.r[adapter_name])
            for old, new, factor in zip(pair, fitted, (1.0, 1 / layer.scaling[adapter_name])):
                old.copy_(new * factor)
            if callback is not None and not callback(peft_model, name):
                for tensor, value in zip(pair, before):
                    tensor.copy_(value)
                logging.getLogger(__name__).info("LoftQ: the callback kept %s as it was", name)


class _Weights:
    """Tensors of a model's safetensors files by name, each read when it is asked for."""

    def __init__(self, source: str) -> None:
        self.paths = _files(source)
        self._open: list[Any] = []

    def __enter__(self) -> _Weights:
        self._open = [safe_open(path, framework="pt") for path in self.paths]
        self._of = {key: file for file in self._open for key in file.keys()}  # noqa: SIM118
        return self

    def __exit__(self, *args: object) -> None:
        self._of, self._open = {}, []

    def get(self, name: str, prefix: str) -> torch.Tensor:
        for key in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if key in self._of:
                return self._of[key].get_tensor(key)
        raise KeyError(f"{name} is not among the tensors of {', '.join(map(str, self.paths))}")


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
    else:
        one = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        found = [Path(one)] if one else []
    if not found:
        raise FileNotFoundError(
            f"no safetensors of the unquantised model in {source!r}; give its file or folder as model_path."
        )
    return found

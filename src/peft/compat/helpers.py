"""Small functions of 0.21 that third parties import, or replace; each says where that was seen."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from typing import Any

import torch
from torch import nn

from peft.compat.integrations import dequantize_bnb_weight
from peft.core.layer.layer import BaseTunerLayer
from peft.import_utils import is_gptqmodel_available
from peft.kernels.decompositions import halves, svd


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """A ``target_modules`` that is a string, against the whole name of a module. Trainers of videos plan by it."""
    return re.fullmatch(target_pattern, key)


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository on the hub has a file; None, with a warning, if nobody can be asked. Derived Auto classes
    call it.

    Args:
        kwargs: ``subfolder``, ``revision``, ``repo_type`` and ``token``; others are of no use here.
    """
    from huggingface_hub import constants, file_exists

    subfolder, known = kwargs.get("subfolder"), ("revision", "repo_type", "token")
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        name = f"{subfolder}/{filename}" if subfolder else filename
        return bool(file_exists(repo_id, name, **{key: kwargs[key] for key in known if key in kwargs}))
    except Exception as error:  # no network, no such name, no right to it: all alike to who asks
        warnings.warn(f"cannot ask the hub whether {repo_id} has {filename}: {error}.")
        return None


def _maybe_shard_state_dict_for_tp(model: nn.Module, state_dict: dict[str, torch.Tensor], adapter_name: str) -> None:
    """Leaves an adapter's tensors as they are. transformers 5.6 to 5.17 call it on a model with tensor parallelism, of
    which each process has its part of the layers, but here the whole adapter; ms-swift replaces it."""


def _insert_adapter_name_into_state_dict(
    state_dict: dict[str, torch.Tensor], adapter_name: str, parameter_prefix: str
) -> dict[str, torch.Tensor]:
    """A file's tensors by their names in a model: ``q.lora_A.weight`` becomes ``q.lora_A.<adapter>.weight``.

    Servers of adapters and federated trainers call it.

    Args:
        parameter_prefix: how the names of the method's parts start, ``"lora_"``.
    """

    def named(key: str) -> str:
        before, found, part = key.rpartition(parameter_prefix)
        if not found:
            return key
        part, dot, rest = part.partition(".")
        return f"{before}{found}{part}.{adapter_name}{dot}{rest}"

    return {named(key): value for key, value in state_dict.items()}


def _find_mismatched_keys(
    model: nn.Module, peft_model_state_dict: dict[str, torch.Tensor], ignore_mismatched_sizes: bool = False
) -> tuple[dict[str, torch.Tensor], list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """A state dict without the tensors whose shapes differ from the model's, and (name, there, here) of each of them.

    With ``ignore_mismatched_sizes=False`` the state dict comes back as it is. Copies of 0.21's
    ``set_peft_model_state_dict`` call it.
    """
    if not ignore_mismatched_sizes:
        return peft_model_state_dict, []
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    other = [
        (name, tuple(tensor.shape), here[name])
        for name, tensor in peft_model_state_dict.items()
        if name in here and tuple(tensor.shape) != here[name]
    ]
    left_out = {name for name, *_ in other}
    return {name: value for name, value in peft_model_state_dict.items() if name not in left_out}, other


def _loftq_init_new(
    qweight: torch.Tensor, weight: torch.Tensor, num_bits: int, reduced_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair A ``[r, in]``, B ``[out, r]`` nearest to what four bits have taken from a weight ``[out, in]``.

    Notebooks that fit LoftQ layer by layer call it.

    Args:
        qweight: the weight as bitsandbytes keeps it.

    Raises:
        ValueError: if ``num_bits`` is not 4.
    """
    if num_bits != 4:
        raise ValueError(f"weights of bitsandbytes have 4 bits here, not {num_bits}: use loftq_init for others.")
    kept = dequantize_bnb_weight(qweight, state=getattr(qweight, "quant_state", None))
    return halves(*svd(weight.detach().to(kept.device).float() - kept.float()), reduced_rank)


def decompose_weight_matrix(weight: torch.Tensor, top_k: int) -> dict[str, Any]:
    """OSF's parts of a matrix ``[out, in]``: the ``top_k`` largest singular values frozen, the others trained.

    A function of 0.21's documents.

    Returns:
        ``U_high``, ``S_high``, ``V_high`` (tensors), ``U_low``, ``S_low``, ``V_low`` (parameters), ``rank_high``.
    """
    u, s, v = svd(weight.detach().float())
    top = min(top_k, len(s))
    high = {"U_high": u[:, :top], "S_high": s[:top], "V_high": v[:top]}
    low = {"U_low": u[:, top:], "S_low": s[top:], "V_low": v[top:]}
    found: dict[str, Any] = {name: part.contiguous().to(weight.dtype) for name, part in high.items()}
    found |= {name: nn.Parameter(part.contiguous().to(weight.dtype)) for name, part in low.items()}
    return {**found, "rank_high": top}


def project_gradient_to_orthogonal_space(svd_dict: dict[str, Any]) -> None:
    """Take what lies along the frozen directions out of the gradients of ``U_low`` and ``V_low``, in place.

    A function of 0.21's documents; the layers of this package do it in their backward pass.
    """
    with torch.no_grad():
        if (gradient := svd_dict["U_low"].grad) is not None:
            frozen = svd_dict["U_high"]
            gradient.sub_(frozen @ (frozen.T @ gradient))
        if (gradient := svd_dict["V_low"].grad) is not None:
            frozen = svd_dict["V_high"]
            gradient.sub_((gradient @ frozen.T) @ frozen)


def has_valid_embedding_base_layer(layer: Any) -> bool:
    """Whether a layer is an adapted one around an embedding or an output head."""
    return isinstance(layer, BaseTunerLayer) and isinstance(layer.get_base_layer(), nn.Linear | nn.Embedding)


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """The path in the model of an embedding that is saved whole, or None if it is not in the model.

    Args:
        layer: the embedding or output head, adapted or not.
        is_embedding_in_target_modules: whether the adapter has tensors there; then it is the base layer that is meant,
            and None if nothing is around one.
    """
    if is_embedding_in_target_modules:
        if not has_valid_embedding_base_layer(layer):
            return None
        layer = layer.get_base_layer()
    return next((name for name, module in model.named_modules() if module is layer), None)


def bloom_model_postprocess_past_key_value(
    past_key_values: tuple[torch.Tensor, ...],
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Key-value prefixes in the layout of BLOOM, whose cache folds the heads into the batch and transposes the keys.

    Args:
        past_key_values: tensors ``[n, batch, heads, tokens, head_dim]``. Joined along the first axis, the first half
            are the keys of the layers, the second half their values.

    Returns:
        For each layer its keys ``[batch * heads, head_dim, tokens]`` and values ``[batch * heads, tokens, head_dim]``.
        The keys are reshaped to it, not transposed: trained prefixes on disk have their numbers in this order.
    """
    keys, values = torch.cat(tuple(past_key_values)).chunk(2)
    layers, batch, heads, tokens, head_dim = keys.shape
    keys = keys.transpose(2, 3).reshape(layers, batch * heads, head_dim, tokens)
    return tuple(zip(keys.unbind(), values.flatten(1, 2).unbind()))


def starcoder_model_postprocess_past_key_value(past_key_values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Key-value prefixes in the layout of GPTBigCode's multi-query attention: one head, keys and values side by side.

    Args:
        past_key_values: for each layer ``[2, batch, heads, tokens, head_dim]``; the first head is used.

    Returns:
        For each layer ``[batch, tokens, 2 * head_dim]``.
    """
    return tuple(torch.cat((layer[0][:, 0], layer[1][:, 0]), dim=-1) for layer in past_key_values)


CHOOSER = ("gptqmodel.utils.importer", "hf_select_quant_linear")
"""The module of GPTQModel, and its function that chooses a class for transformers' configs."""


def get_gptqmodel_quant_linear(gptq_quantization_config: Any, device_map: Any = None) -> type | None:
    """The class of linear layers that GPTQModel would use, or None without a config or without GPTQModel.

    Args:
        gptq_quantization_config: a ``GPTQConfig`` of transformers, or a dict of its fields.
        device_map: where the layers go; GPTQModel chooses the kernel by it.

    Raises:
        ValueError: if the installed GPTQModel asks for a field that the config does not have.
    """
    if gptq_quantization_config is None or not is_gptqmodel_available():
        return None
    choose = getattr(importlib.import_module(CHOOSER[0]), CHOOSER[1])
    config = gptq_quantization_config
    known = dict(config if isinstance(config, dict) else config.to_dict())
    known.update(pack=False, device_map=device_map)
    given, lacking = {}, []
    for name, parameter in inspect.signature(choose).parameters.items():  # releases differ in what they take
        if known.get(name) is not None:
            given[name] = known[name]
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            lacking.append(name)
    if lacking:
        raise ValueError(f"GPTQModel's {CHOOSER[1]} needs {', '.join(lacking)}, which the quantisation config lacks.")
    return choose(**given)

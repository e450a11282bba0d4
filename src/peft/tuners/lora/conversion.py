"""Adapters of other methods as LoRA: B A = dW, the best pair by singular value decomposition (Eckart, Young 1936)."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from peft.combining import CombinationType, Vote, idle
from peft.core.adapter import Adapter
from peft.core.base.stack import Stack
from peft.core.combine.ways import Combination, Part
from peft.core.files.entries import anatomy, configs_of
from peft.core.files.io import PREFIX, write_adapter
from peft.core.files.state_dict import get_peft_model_state_dict
from peft.core.layer.classes import is_own
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.weight import wide
from peft.core.model import operations
from peft.core.model.auxiliary import ModulesToSaveWrapper, TrainableTokensWrapper, bias_sites, biases_of
from peft.core.model.targeting import exact_targets
from peft.core.model.walk import bare, layers_of, walk
from peft.errors import NoAdaptedLayersError, WrongTypeError
from peft.kernels.decompositions import factorize, product_svd, resized, shared_ranks
from peft.tools.footprint import meta_copy
from peft.tuners.lora.config import LoraConfig, rank_fields
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.lora.pairs import join_pair, pair_blocks


# What says which layers are adapted, and of what: the same fields in every config.
_KEPT = (
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "base_model_name_or_path", "revision"),
)


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str | Sequence[str] = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    across_layers: bool = False,
    combination_type: CombinationType = "svd",
    density: float | None = None,
    majority_sign_method: Vote = "total",
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """A LoRA that does what an adapter of another method does, as nearly as its rank allows. The model is unchanged.

    Every adapter that a weight equals can be converted, on every layer that a LoRA can adapt: also rotations, scales
    and DoRA, whose updates depend on the base weight and are right for this base model only.

    Args:
        model: a model with the adapter.
        rank: an int: the rank in all layers. A float in (0, 1]: in each layer the lowest rank whose squared singular
            values make up this share of all; 1.0 gives the full rank, and with it the same outputs. An update that is
            a product of two matrices already keeps these where the rank allows.
        adapter_name: the adapter, or several, whose updates are added up: of any methods (of a PeftMixedModel).
        compile_kwargs: compile the decomposition by ``torch.compile`` with these arguments.
        weights: what the update of each of several adapters is multiplied by; by default 1.
        across_layers: a rank that is a float is a share of the energy of the whole model: ranks are shared out among
            the layers by their singular values, so that their sum is the lowest.
        combination_type: how the updates of several become one; by default their weighted sum ("svd", "linear" and
            "cat" are all the sum here). The ways that prune ("ties_svd", "dare_ties_svd", "della_svd",
            "breadcrumbs_svd", "knots_svd", ...) act on the weight's changes, with or without "_svd" at the end; see
            LoRA's ``add_weighted_adapter``.
        density: fraction of entries to keep, for the ways that prune. majority_sign_method: TIES' vote.

    Returns:
        The config, and the tensors under the names that they have in files.

    Raises:
        ValueError: for a rank that has no meaning, an unknown adapter or way, one that no weight equals, several that
            each train whole modules, and biases that a LoRA cannot have.

    Examples:
        >>> model = get_peft_model(base, IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
        >>> config, tensors = convert_to_lora(model, rank=16)
        >>> config.peft_type.value, config.target_modules
        ('LORA', {'v_proj'})
    """
    combination = _combination(combination_type, density, majority_sign_method)
    found = _converted(model, rank, adapter_name, progressbar, compile_kwargs, weights, across_layers, combination)
    return found.config, found.tensors


def lora_of(
    model: nn.Module, weights: dict[str, float], combination: Combination
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The LoRA of full rank that does what adapters, by name with their weights, combined do.

    Raises:
        ValueError: as :func:`convert_to_lora`.
    """
    found = _converted(model, 1.0, [*weights], False, None, [*weights.values()], False, combination)
    return found.config, found.tensors


class Conversion(NamedTuple):
    """A LoRA made of other adapters.

    Attributes:
        config, tensors: of the LoRA. errors: by module, the norm of what the LoRA leaves out over that of the update.
    """

    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    errors: dict[str, float]


def _converted(
    model: nn.Module,
    rank: float,
    adapter_name: str | Sequence[str],
    progressbar: bool,
    compile_kwargs: dict[str, Any] | None,
    weights: Sequence[float] | None,
    across_layers: bool,
    combination: Combination,
) -> Conversion:
    model = bare(model)
    root = anatomy(model)[0]
    names = operations.names_of(adapter_name)
    _check_names(model, root, names)
    _check_rank(rank)
    places = _places(root, names, _check_weights(names, weights))
    if len(names) == 1 and type(configs_of(model).get(names[0])) is LoraConfig:
        warnings.warn(f"adapter {names[0]!r} is a LoRA already; it is factorised again, by the rank asked for.")
    if not places:
        raise ValueError(f"adapter {', '.join(map(repr, names))} adapts no layer by a weight: no LoRA is like it.")
    decompose = factorize if compile_kwargs is None else torch.compile(factorize, **compile_kwargs)
    pairs, shifts, errors = {}, {}, {}
    with torch.no_grad():
        wanted = {}
        if across_layers and isinstance(rank, float):
            wanted = _shared(places, combination, rank)
        for place, parts in tqdm(places.items(), disable=not progressbar, desc="Converting to LoRA"):
            pairs[place], errors[place] = _pair(parts, combination, wanted.get(place, rank), decompose, bool(wanted))
            shifts[place] = combination.of_bias(parts)
    _check_fixed(rank, pairs)
    ranks = {
        place: down.shape[0] * down.shape[1] // _experts(places[place][0][0]) for place, (down, _) in pairs.items()
    }
    kept = _kept(model, root, names, places)
    if any(shift is not None for shift in shifts.values()):
        kept["lora_bias"] = True
    lora = LoraConfig(**rank_fields(ranks, ranks), **kept)
    return Conversion(lora, _written(model, root, lora, _holder(model, root, names), pairs, shifts), errors)


def save_as_lora(
    path: str | os.PathLike,
    model: nn.Module,
    rank: float,
    adapter_name: str | Sequence[str] = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    across_layers: bool = False,
    combination_type: CombinationType = "svd",
    density: float | None = None,
    majority_sign_method: Vote = "total",
) -> dict[str, float]:
    """Write what :func:`convert_to_lora` gives into a folder, to be loaded as any LoRA.

    Returns:
        By module, the error: the norm of what the LoRA leaves out over that of the update.

    Raises:
        ValueError: as :func:`convert_to_lora`; if ``path`` is a file. Nothing is written then.

    Examples:
        >>> errors = save_as_lora("as_lora", model, rank=4)  # by module
        >>> max(errors.values())
        0.0
        >>> PeftModel.from_pretrained(model.unload(), "as_lora").peft_config["default"].r
        4
    """
    if os.path.isfile(path):
        raise ValueError(f"{path} is a file; save_as_lora needs a folder.")
    combination = _combination(combination_type, density, majority_sign_method)
    found = _converted(model, rank, adapter_name, progressbar, compile_kwargs, weights, across_layers, combination)
    found.config.inference_mode = True
    write_adapter(path, found.tensors, found.config)
    return found.errors


def _combination(name: CombinationType, density: float | None, vote: Vote) -> Combination:
    found = Combination(name, density, vote).seeded()
    if unused := idle(name, {"density": density, "majority_sign_method": vote}):
        warnings.warn(f"{unused}.", stacklevel=3)
    return found


# --- what is converted ----------------------------------------------------------------------------------------


def _check_names(model: nn.Module, root: nn.Module, names: list[str]) -> None:
    if not operations.adapters_of(root):
        raise NoAdaptedLayersError(
            f"this {type(model).__name__} has no adapted layers, so there is nothing that a LoRA could do instead. "
            "Prompts cannot be converted."
        )
    operations.require_adapters(root, names, configs_of(model) or None)
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"give each adapter once, got {names}.")
    _holder(model, root, names)


def _beside(model: nn.Module, root: nn.Module, name: str) -> dict[str, Any]:
    """What an adapter trains beside its layers: as its config says, or as is seen in a model that keeps no configs."""
    if config := configs_of(model).get(name):
        return {
            field: getattr(config, field, None) for field in ("modules_to_save", "trainable_token_indices", "bias")
        }
    around = [(site.key, wrapper) for site in walk(root) for _, wrapper in site.wrappers if name in wrapper]
    tokens = {key: w.adapters[name].token_indices for key, w in around if isinstance(w, TrainableTokensWrapper)}
    biases, every = biases_of(root), [*bias_sites(root, "all", name)]
    mode = "none" if biases is None or name not in biases else LoraConfig.OWN_BIAS
    return {
        "modules_to_save": [key for key, w in around if isinstance(w, ModulesToSaveWrapper)],
        "trainable_token_indices": tokens,
        "bias": "all" if biases is not None and len(biases.tensors(name)) == len(every) > 0 else mode,
    }


def _kept(model: nn.Module, root: nn.Module, names: list[str], places: dict[str, list[Part]]) -> dict[str, Any]:
    """The fields that the LoRA has in common with the adapters' configs."""
    holder = _holder(model, root, names)
    config = configs_of(model).get(holder)
    known = {field.name for field in dataclasses.fields(config)} if config else set()
    kept = {field: getattr(config, field) for field in _KEPT if field in known}
    kept |= {field: value for field, value in _beside(model, root, holder).items() if value}
    if kept.get("bias", "none") == getattr(config, "OWN_BIAS", None):
        kept["bias"] = LoraConfig.OWN_BIAS  # those of the adapted layers, in the words of a LoRA
    if len(names) > 1 or "target_modules" not in known:
        stacks = {place for place, parts in places.items() if isinstance(parts[0][0].kind, Stack)}
        kept.update(dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")))
        kept["target_modules"] = exact_targets(root, places.keys() - stacks)
        kept["target_parameters"] = sorted(stacks) or None
    return kept


def _holder(model: nn.Module, root: nn.Module, names: list[str]) -> str:
    """That of the adapters which trains something beside its layers; else the first.

    Raises:
        ValueError: if several do: a weighted sum of modules is no such.
    """
    found = [n for n in names if any(v and v != "none" for v in _beside(model, root, n).values())]
    if len(found) > 1:
        raise ValueError(
            f"adapters {found} each train modules, tokens or biases beside their layers; one LoRA has one."
        )
    return found[0] if found else names[0]


def _check_weights(names: list[str], weights: Sequence[float] | None) -> list[float]:
    numbers = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if len(numbers) != len(names) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{len(names)} adapters need as many finite weights, got {weights!r}.")
    return numbers


def _check_rank(rank: float) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int | float) or rank <= 0:
        raise WrongTypeError(f"rank should be an int of at least 1, or a float in (0, 1], got {rank!r}.")
    if isinstance(rank, float) and rank > 1:
        raise ValueError(f"a rank that is a float is a share of the update's energy, in (0, 1]; got {rank}.")


def _check_fixed(rank: float, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    largest = max(min(down.shape[2], up.shape[1]) * down.shape[0] for down, up in pairs.values())
    if isinstance(rank, int) and rank > largest:
        raise ValueError(f"rank {rank} is larger than that of any update of this model, which is at most {largest}.")


def _layers(root: nn.Module, name: str) -> dict[str, BaseTunerLayer]:
    """The layers with an adapter, by what a config calls their weights: in what follows, the names of places."""
    around = ((site.key, wrapper) for site in walk(root) for _, wrapper in site.wrappers if name in wrapper)
    return {w.kind.target_name(key): w for key, w in around if isinstance(w, BaseTunerLayer)}


def _places(root: nn.Module, names: list[str], weights: list[float]) -> dict[str, list[Part]]:
    found: dict[str, list[Part]] = {}
    for name, weight in zip(names, weights):
        for place, layer in _layers(root, name).items():
            found.setdefault(place, []).append((layer.adapters[name], weight))
    return found


def _experts(adapter: Adapter) -> int:
    return 1 if adapter.kind.lookup else pair_blocks(adapter)[0]


def _pair(
    parts: list[Part],
    combination: Combination,
    rank: float,
    decompose: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    inner_rank: bool,
) -> tuple[tuple[torch.Tensor, torch.Tensor], float]:
    """(down ``[blocks, r, in]``, up ``[blocks, out, r]``) of the update of a layer, r for each block; the error.

    Args:
        inner_rank: the rank is that of each block.
    """
    one, product = parts[0][0], _product(parts, combination)
    blocks = _change(parts, combination) if product is None else product[1] @ product[0]
    groups = 1 if inner_rank or _experts(one) > 1 else len(blocks)
    most = min(blocks.shape[1:]) if product is None else min(*blocks.shape[1:], product[0].shape[1])
    if isinstance(rank, float):
        inner = most if rank == 1.0 else _explaining(torch.linalg.svdvals(blocks), rank)
    else:
        inner = -(-rank // groups)
    if product is not None and inner >= product[0].shape[1]:
        return (resized(product[0], inner, 1), resized(product[1], inner, 2)), 0.0
    down, up = decompose(blocks, min(inner, most))
    whole = float(torch.linalg.vector_norm(blocks))
    error = float(torch.linalg.vector_norm(blocks - up @ down)) / whole if whole else 0.0
    return (resized(down, inner, 1), resized(up, inner, 2)), error


def _change(parts: list[Part], combination: Combination) -> torch.Tensor:
    """dW of a layer as matrices ``[blocks, out, in]``."""
    change = combination.of_weight(parts)
    return _blocks(parts[0][0], wide(change))


def _product(parts: list[Part], combination: Combination) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The update as (down ``[1, r, in]``, up ``[1, out, r]``), where it is the product of a matrix with few rows."""
    adapter, weight = parts[0]
    factors = adapter.factors() if len(parts) == 1 and combination.adds and adapter.kind.matrix else None
    if factors is None or len(factors.down) >= min(factors.down.shape[1], len(factors.up)):
        return None
    wide = torch.promote_types(torch.promote_types(factors.down.dtype, factors.up.dtype), torch.float32)
    return factors.down.detach().to(wide)[None], (factors.up.detach().to(wide) * (factors.scale * weight))[None]


def _shared(places: dict[str, list[Part]], combination: Combination, share: float) -> dict[str, int]:
    """The ranks, for each block of a layer, that keep a share of the energy of the whole model."""
    values = {}
    for place, parts in places.items():
        product = _product(parts, combination)
        if product is not None:
            values[place, 0] = product_svd(product[0][0], product[1][0])[1]
            continue
        for block, found in enumerate(torch.linalg.svdvals(_change(parts, combination))):
            values[place, block] = found
    ranks: dict[str, int] = {}
    for (place, _), rank in shared_ranks(values, share).items():
        ranks[place] = max(rank, ranks.get(place, 1))
    return ranks


def _blocks(adapter: Adapter, change: torch.Tensor) -> torch.Tensor:
    """dW as matrices ``[blocks, out, in]``; that of a group of a convolution has zeros for the other groups."""
    if adapter.kind.lookup:
        return change[None]
    experts, groups = pair_blocks(adapter)
    if groups == 1:
        return change.flatten(1).unflatten(0, (experts, -1))
    parts = change.unflatten(0, (groups, -1))  # [groups, out, in / groups, *kernel]
    wide = parts.new_zeros(groups, parts.shape[1], groups, *parts.shape[2:])
    for group, part in enumerate(parts):
        wide[group, :, group] = part
    return wide.flatten(2)


def _explaining(values: torch.Tensor, share: float) -> int:
    """The lowest rank at which the squared singular values ``[blocks, n]`` make up a share of all, in every block."""
    energy = values.double().square().cumsum(-1)
    reached = energy >= share * energy[:, -1:]
    return int((~reached).sum(-1).max()) + 1


# --- what it becomes ------------------------------------------------------------------------------------------


def _written(
    model: nn.Module,
    root: nn.Module,
    lora: LoraConfig,
    name: str,
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]],
    shifts: dict[str, torch.Tensor | None],
) -> dict[str, torch.Tensor]:
    """The tensors by their names in files: those of a LoRA in a copy of the model that has no memory."""
    blank = meta_copy(root)
    for _, layer in layers_of(blank):
        layer.merged_adapters, layer.originals = [], {}  # of what has no values, none have to be taken out
    blank = operations.unload(blank, merge_first=False)
    blank.__dict__.pop("peft_config", None)
    found = lora_tensors(blank, lora, name, pairs, shifts)
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers="auto")
    prefix = "" if anatomy(model)[1] else PREFIX  # a model that is no PeftModel knows its names without
    return {key: own[key.removeprefix(prefix)] if value.is_meta else value for key, value in found.items()}


def lora_tensors(
    blank: nn.Module,
    lora: LoraConfig,
    name: str,
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]],
    shifts: dict[str, torch.Tensor | None],
) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA by their names in files; what it trains beside its layers stays on the meta device.

    Args:
        blank: the plain model, without memory; it gets the adapter.
        pairs: by what a config calls the weight, (down ``[blocks, r, in]``, up ``[blocks, out, r]``).
        shifts: what is added to biases.
    """
    tuner = LoraModel(blank, {name: lora}, name, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    for place, layer in _layers(blank, name).items():
        if is_own(layer, LoraLayer) and place in pairs:
            _fill(layer.adapters[name], *pairs[place], shifts.get(place))
    return get_peft_model_state_dict(tuner, adapter_name=name, save_embedding_layers=False)


def _fill(lora: Any, down: torch.Tensor, up: torch.Tensor, shift: torch.Tensor | None) -> None:
    a, b = join_pair(lora, down, up)
    if lora.kind.lookup:
        lora.lora_embedding_A, lora.lora_embedding_B = nn.Parameter(a), nn.Parameter(b)
        return
    lora.lora_A.weight, lora.lora_B.weight = nn.Parameter(a.contiguous()), nn.Parameter(b.contiguous())
    if lora.lora_bias:
        lora.lora_B.bias = nn.Parameter(b.new_zeros(len(b)) if shift is None else shift.to(b.dtype))

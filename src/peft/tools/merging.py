"""Adapters merged into the files of a model, tensor by tensor: never more than one layer is in memory.

The base model is made without memory, and reads its weights from the shards when a layer is folded, by the hooks with
which accelerate offloads models. What cannot be done so (files that are arranged otherwise than the model, quantised
bases, merged weights that need another config) is done in memory, and the report says why.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from peft.combining import CombinationType, Vote, idle
from peft.core.adapter import Adapter
from peft.core.combine.combined import check_auxiliary, checked_weights
from peft.core.combine.ways import Combination
from peft.core.files.io import CONFIG_NAME, replacing
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.weight import base_bias, effective, unmerged_weight
from peft.core.model.auxiliary import AuxiliaryTrainingWrapper, biases_of
from peft.core.model.declared import new_biases
from peft.core.model.walk import embeddings_of, join, shares_embeddings, walk
from peft.errors import ConfigError, NoEqualWeightError
from peft.tools.architecture import build, class_of
from peft.tools.shards import INDEX, Entry, Shards, ShardWriter, dtype_of, has_weights


_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".safetensors.index.json",
            ".bin.index.json")  # fmt: skip
_TOKENIZER = ("tokenizer", "special_tokens_map", "vocab", "merges", "added_tokens", "chat_template", "spiece")
_MERGED = "merged"


@dataclass
class MergeReport:
    """What :func:`merge_files` has written.

    Attributes:
        output: the folder. shards: files of weights. tensors: in them. changed: those that the adapters change.
        in_memory: why the whole model had to be loaded; None where it was not.
    """

    output: str
    shards: int
    tensors: int
    changed: int
    in_memory: str | None = None


@dataclass(frozen=True)
class _Job:
    """What is asked for, with the base's folder found."""

    folder: str
    adapters: Mapping[str, str]
    output: str | os.PathLike
    weights: Sequence[float] | None
    combination: CombinationType | None
    ways: Mapping[str, Any]
    dtype: torch.dtype | None
    safe_merge: bool
    quantized: bool

    @functools.cached_property
    def config(self) -> Any:
        """The base's."""
        import transformers

        return transformers.AutoConfig.from_pretrained(self.folder)


def merge_files(
    base: str | os.PathLike,
    adapters: Mapping[str, str],
    output: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    combination: CombinationType | None = None,
    density: float | None = None,
    majority_sign_method: Vote = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_driver: str | None = None,
    dtype: torch.dtype | None = None,
    safe_merge: bool = True,
    quantized: bool = False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Merge adapters into a base model and write the model, with its tokenizer and templates, to a folder.

    Args:
        base: folder of the base model, or its name on the hub.
        adapters: name -> folder. Several become their weighted sum first.
        weights: of the adapters, 1 for each by default.
        combination: how they are combined (``add_weighted_adapter``): LoRAs by their factors or updates, adapters of
            any other method that a weight equals by what they add to the weights. By default the exact sum.
        density, majority_sign_method, svd_rank, svd_clamp, svd_driver: of the combination, as there. The last three
            are of LoRAs alone, the result of which has a rank.
        dtype: of the result; by default that of each tensor in the base's files. A wider one is merged in, too.
        safe_merge: refuse merged weights that are not finite.
        quantized: write a quantised base quantised again; by default it comes out dense, rounded to nothing.
        tell: called with (tensors written, tensors in all).

    Example::

        merge_files("SmolLM2-135M", {"tone": "runs/tone/adapter"}, "merged", dtype=torch.bfloat16)

    Raises:
        ConfigError: no such base, ``output`` is its folder or that of an adapter, or an argument that the combination
            does not use.
        ValueError: the adapters cannot be merged or combined.
            Nothing is written then.
    """
    ways = {"density": density, "majority_sign_method": majority_sign_method, "svd_rank": svd_rank,
            "svd_clamp": svd_clamp, "svd_driver": svd_driver}  # fmt: skip
    if unused := idle(combination or "cat", ways):
        raise ConfigError(f"{unused}.")
    folder = _folder_of(base)
    if os.path.abspath(folder) == os.path.abspath(output):
        raise ConfigError(f"the output {os.fspath(output)!r} is the folder of the base model: name another one.")
    if os.path.isfile(os.path.join(output, CONFIG_NAME)):  # transformers would load it with the model, once more
        raise ConfigError(f"the output {os.fspath(output)!r} is the folder of an adapter: name another one.")
    return _merge(_Job(folder, adapters, output, weights, combination, ways, dtype, safe_merge, quantized), tell)


def _merge(job: _Job, tell: Callable[[int, int], None]) -> MergeReport:
    """Layer by layer, or in memory where that cannot be."""
    entries, drawn = Shards(job.folder).entries if has_weights(job.folder) else {}, torch.get_rng_state()
    reason = _only_in_memory(job.config, entries)
    if reason is not None:
        return _in_memory(job, reason)
    model = _without_memory(job.config, entries, job.dtype)
    if isinstance(model, str):
        return _in_memory(job, model)
    tied = shares_embeddings(model)  # a file that brings the table of one end has the other end without it
    adapted, names, mixture = _adapted(model, job)
    if (reason := _needs_more(adapted.get_base_model(), names, tied)) is not None:
        torch.set_rng_state(drawn)  # what the combination draws is drawn again
        return _in_memory(job, reason)
    changed = _changed(adapted.get_base_model(), names, mixture)
    with replacing(job.output) as path:
        files = _write_shards(entries, changed, path, job, tell)
        _copy_rest(job, path(""))
    return MergeReport(os.fspath(job.output), files, len(entries), len(changed))


def open_base(base: str | os.PathLike) -> nn.Module:
    """A base model whose layers read their weights from its files when they are asked for; else in memory.

    Args:
        base: folder of the model, or its name on the hub.
    """
    import transformers

    folder = _folder_of(base)
    config = transformers.AutoConfig.from_pretrained(folder)
    entries = Shards(folder).entries if has_weights(folder) else {}
    if _only_in_memory(config, entries) is None:
        model = _without_memory(config, entries, None)
        if isinstance(model, nn.Module):
            return model
    return class_of(config).from_pretrained(folder, dtype="auto")


# --- the base, in files --------------------------------------------------------------------------------------------


def _folder_of(base: str | os.PathLike) -> str:
    if os.path.isdir(base):
        if os.path.isfile(os.path.join(base, CONFIG_NAME)) and not os.path.isfile(os.path.join(base, "config.json")):
            raise ConfigError(f"{os.fspath(base)!r} holds an adapter. The base model comes first, then its adapters.")
        return os.fspath(base)
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(os.fspath(base), ignore_patterns=["*.bin", "*.h5", "*.msgpack", "*.gguf", "*.onnx"])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the base model {os.fspath(base)!r} is no folder here, nor on the hub: {reason}") from error


def _only_in_memory(config: Any, entries: dict[str, Entry]) -> str | None:
    if getattr(config, "quantization_config", None):
        return "the base model is quantised"
    return None if entries else "the base model has no safetensors files"


def _without_memory(config: Any, entries: dict[str, Entry], dtype: torch.dtype | None) -> nn.Module | str:
    """The base model, each layer of which reads its tensors from the files; or why that cannot be."""
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook
    from accelerate.utils import OffloadedWeightsLoader

    with init_empty_weights():
        model = build(config)
    model.tie_weights()  # a tied tensor is in the files once
    index = {}
    for name, entry in entries.items():
        kept = str(dtype_of(entry, dtype)).removeprefix("torch.")
        index[name] = {"safetensors_file": entry.file, "weight_name": name, "dtype": kept}
    known = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, p in known.items():
        if name in entries:
            first.setdefault(id(p), name)
    for name, p in known.items():
        if name not in entries:
            if id(p) not in first:
                return f"its files are arranged otherwise than the model: they lack {name}"
            index[name] = index[first[id(p)]]
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True,
                             weights_map=OffloadedWeightsLoader(index=index))  # fmt: skip
    return model


# --- the adapters ------------------------------------------------------------------------------------------------


class _Mixture(NamedTuple):
    """Adapters that are combined where they are merged: name -> weight, and how."""

    weights: dict[str, float]
    combination: Combination


def with_adapters(base: nn.Module, adapters: Mapping[str, str]) -> Any:
    """The base model with saved adapters, the first one active; the base itself if there are none."""
    from peft.peft_model import PeftModel

    model: Any = base
    for name, folder in adapters.items():
        if model is base:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    return model.eval()


def _adapted(base: nn.Module, job: _Job) -> tuple[Any, list[str], _Mixture | None]:
    """The model with the adapters, those to merge active, their names; how they are combined, if they are no LoRAs."""
    if not job.adapters:
        raise ConfigError("no adapter to merge was given.")
    with torch.random.fork_rng(devices=[]):  # what adapters draw before they are filled is no draw of the merging
        model = with_adapters(base, job.adapters)
    config = model.peft_config[next(iter(job.adapters))]
    method = config.method_name
    if config.is_prompt_learning:
        raise NoEqualWeightError(
            f"{method} trains tokens or prefixes, which no weight equals: keep the adapter beside the model."
        )
    names = list(job.adapters)
    if len(names) > 1 or job.weights is not None or job.combination is not None:
        numbers = [1.0] * len(names) if job.weights is None else list(job.weights)
        pairs = method == "LORA"
        if not pairs and (job.combination is not None or not model.base_model.layer_cls.adapter_cls.adds.possible):
            return model, names, _mixture(model, names, numbers, job)
        kind = {"combination_type": job.combination or "cat", **job.ways} if pairs else {}
        model.add_weighted_adapter(names, numbers, _MERGED, **kind)
        names = [_MERGED]
    model.set_adapter(names[0])
    return model, names, None


def _mixture(model: Any, names: list[str], numbers: list[float], job: _Job) -> _Mixture:
    """Adapters whose changes of each weight are combined, as they are no pairs."""
    if given := [name for name in ("svd_rank", "svd_clamp", "svd_driver") if job.ways[name] is not None]:
        raise ConfigError(f"{given[0]} is of a LoRA's A and B, and these adapters are none: leave it out.")
    numbers = checked_weights(model.base_model, names, numbers)
    check_auxiliary(model.base_model, names, [model.peft_config[name] for name in names])
    combination = Combination(job.combination or "cat", job.ways["density"], job.ways["majority_sign_method"])
    return _Mixture(dict(zip(names, numbers)), combination.seeded())


def _needs_more(model: nn.Module, names: list[str], tied: bool) -> str | None:
    """What merging changes beside the weights that are in the files."""
    if biases_of(model) is not None:
        return "the adapter trains biases of the base model"
    ends = [site for site in walk(model) if site.wrappers and site.module in embeddings_of(model)]
    if ends and tied:
        return "the adapter is on one end of a tied embedding"
    if new_biases(model, names):
        return "merging gives layers a bias"
    return None


def _changed(
    model: nn.Module, names: list[str], mixture: _Mixture | None
) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    """Name of a tensor -> what gives it, with others of its module, as these adapters make it, or mixed.

    Raises:
        NoEqualWeightError: an adapter is no weight; its layer and the reason are named.
    """
    found: dict[str, Callable[[], dict[str, torch.Tensor]]] = {}
    for site in walk(model):
        if not site.wrappers:
            continue
        wrapper: Any = site.wrappers[0][1]
        tokens = getattr(wrapper, "token_adapter", None) if isinstance(wrapper, AuxiliaryTrainingWrapper) else None
        layer = wrapper if tokens is None else tokens
        if isinstance(layer, BaseTunerLayer):
            here = [layer.adapters[name] for name in names if name in layer]
            for adapter in here:
                if reason := adapter.unmergeable():
                    raise NoEqualWeightError(f"{site.key}: adapter {adapter.name!r} cannot be merged: {reason}")
            stands = next((m for a in here if (m := a.stand_in()) is not None), None)
            if stands is not None and mixture is not None:
                raise NoEqualWeightError(
                    f"{site.key}: its adapters are whole modules, which have a weighted sum and no other combination: "
                    "leave combination out."
                )
            mixes = mixture if tokens is None else None  # of tokens only one adapter has its own
            if stands is not None:
                give = _of_module(stands)
            elif mixes is None or not here:
                give = functools.partial(effective, layer, here)
            else:
                give = functools.partial(_mixed, layer, here, mixes)
        else:
            give = _of_module(wrapper.unload(True, names))
        for name in _names(site.module):
            found[join(site.key, name)] = _prefixed(give, site.key)
    return found


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _mixed(layer: BaseTunerLayer, adapters: list[Adapter], mixture: _Mixture) -> dict[str, torch.Tensor]:
    """The tensors of a layer with the combination of what its adapters add to them."""
    parts, kind = [(adapter, mixture.weights[adapter.name]) for adapter in adapters], layer.kind
    weight = unmerged_weight(layer)
    found = {kind.weight: kind.restore(weight + mixture.combination.of_weight(parts), layer.get_base_layer())}
    if (shift := mixture.combination.of_bias(parts)) is not None:
        bias = base_bias(layer)
        found[str(kind.bias)] = shift if bias is None else bias + shift
    return found


def _of_module(module: nn.Module) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: dict(module.named_parameters())


def _prefixed(give: Callable[[], dict[str, torch.Tensor]], key: str) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {join(key, name): tensor for name, tensor in give().items()}


# --- the files written -------------------------------------------------------------------------------------------


def _write_shards(
    entries: dict[str, Entry],
    changed: Mapping[str, Callable[[], dict[str, torch.Tensor]]],
    path: Callable[[str], str],
    job: _Job,
    tell: Callable[[int, int], None],
) -> int:
    """Write the files anew, one after another, each tensor when it is made; returns how many files there are."""
    from safetensors import safe_open

    files: dict[str, list[str]] = {}
    for name, entry in entries.items():
        files.setdefault(entry.file, []).append(name)
    total, done, places = 0, 0, {}
    for file, names in files.items():
        target = os.path.basename(file)
        with ShardWriter(
            path(target), {n: (dtype_of(entries[n], job.dtype), entries[n].shape) for n in names}
        ) as writer:
            for name in names:
                tensor = changed[name]().get(name) if name in changed else None
                if tensor is None:
                    with safe_open(file, "pt") as tensors:
                        tensor = tensors.get_tensor(name)
                elif job.safe_merge and not tensor.isfinite().all():
                    raise ValueError(f"merging gives {name} NaN or infinite entries: the adapter is broken.")
                total += writer.write(name, tensor)
                places[name] = target
                done += 1
                tell(done, len(entries))
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        Path(path(INDEX)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(files)


def _copy_rest(job: _Job, target: str) -> None:
    """Copy what is no weight and not there yet: config, tokenizer, templates, code; the adapters' last."""
    sources = [job.folder, *job.adapters.values()]
    for source in sources:
        for file in sorted(Path(source).iterdir()) if os.path.isdir(source) else ():
            of_adapter = source != job.folder and not file.name.startswith(_TOKENIZER)
            if file.is_dir() or file.name.startswith(".") or file.name.endswith(_WEIGHTS) or of_adapter:
                continue
            if file.name != "README.md" and not Path(target, file.name).exists():
                shutil.copyfile(file, Path(target, file.name))
    config = Path(target, "config.json")
    if job.dtype is not None and config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("torch_dtype", None)  # its name in older configs
        values["dtype"] = str(job.dtype).removeprefix("torch.")
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _in_memory(job: _Job, reason: str) -> MergeReport:
    """The same with the whole model in memory."""
    base = class_of(job.config).from_pretrained(job.folder, dtype=job.dtype or "auto")
    if getattr(job.config, "quantization_config", None) and not job.quantized:
        base = base.dequantize()
    adapted, names, mixture = _adapted(base, job)
    if mixture is not None:
        adapted, names = _as_lora(adapted, mixture), [_MERGED]
    changed = [name for site in walk(adapted.get_base_model()) if site.wrappers for name in _names(site.module)]
    merged = adapted.merge_and_unload(safe_merge=job.safe_merge, adapter_names=names)
    with replacing(job.output) as path:
        merged.save_pretrained(path(""))
        shards = sum(name.endswith(".safetensors") for name in os.listdir(path("")))
        _copy_rest(job, path(""))
    tensors = sum(1 for _ in merged.parameters())
    return MergeReport(os.fspath(job.output), shards, tensors, len(changed), reason)


def _as_lora(adapted: Any, mixture: _Mixture) -> Any:
    """The model with one adapter in the place of a mixture: a LoRA of full rank, which is all that they add."""
    from peft.core.files.state_dict import set_peft_model_state_dict
    from peft.mapping_func import get_peft_model
    from peft.tuners.lora.conversion import lora_of

    config, tensors = lora_of(adapted, mixture.weights, mixture.combination)
    model = get_peft_model(adapted.unload(), config, _MERGED)
    set_peft_model_state_dict(model, tensors, _MERGED)
    return model

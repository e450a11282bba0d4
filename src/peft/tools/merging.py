"""Adapters merged into the files of a model, tensor by tensor: never more than one layer is in memory.

The base model is made without memory, and reads its weights from the shards when a layer is folded, by the hooks with
which accelerate offloads models. What cannot be done so (files that are arranged otherwise than the model, quantised
bases, merged weights that need another config) is done in memory, and the report says why.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from peft.core.combine.combined import checked_weights
from peft.core.combine.ways import Combination
from peft.core.files.io import replacing
from peft.core.files.shards import INDEX, Entry, Shards, has_weights
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.weight import base_bias, effective, unmerged_weight
from peft.core.model.auxiliary import AuxiliaryTrainingWrapper, biases_of
from peft.core.model.declared import new_biases
from peft.core.model.walk import embeddings_of, join, walk
from peft.tools.architecture import build, class_of
from peft.utils.error import ConfigError, NoEqualWeightError


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
    """What is asked for, with the base's folder and config found."""

    folder: str
    config: Any
    adapters: Mapping[str, str]
    output: str | os.PathLike
    weights: Sequence[float] | None
    combination: str | None
    ways: Mapping[str, Any]
    dtype: torch.dtype | None
    safe_merge: bool
    quantized: bool


def merge_files(
    base: str | os.PathLike,
    adapters: Mapping[str, str],
    output: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    combination: str | None = None,
    dtype: torch.dtype | None = None,
    safe_merge: bool = True,
    quantized: bool = False,
    tell: Callable[[int, int], None] = lambda done, total: None,
    **ways: Any,
) -> MergeReport:
    """Merge adapters into a base model and write the model, with its tokenizer and templates, to a folder.

    Args:
        base: folder of the base model, or its name on the hub.
        adapters: name -> folder. Several become their weighted sum first.
        weights: of the adapters, 1 for each by default.
        combination: how they are combined (``add_weighted_adapter``): LoRAs by their factors or updates, adapters of
            any other method that a weight equals by what they add to the weights. By default the exact sum.
        dtype: of the result; by default that of each tensor in the base's files. A wider one is merged in, too.
        safe_merge: refuse merged weights that are not finite.
        quantized: write a quantised base quantised again; by default it comes out dense, rounded to nothing.
        tell: called with (tensors written, tensors in all).
        ways: further arguments of ``add_weighted_adapter``: ``density``, and for LoRAs ``svd_rank``, ...

    Example::

        merge_files("SmolLM2-135M", {"tone": "runs/tone/adapter"}, "merged", dtype=torch.bfloat16)

    Raises:
        ConfigError: no such base, or ``output`` is its folder. ValueError: the adapters cannot be merged or combined.
            Nothing is written then.
    """
    import transformers

    folder = _folder_of(base)
    if os.path.abspath(folder) == os.path.abspath(output):
        raise ConfigError(f"the output {os.fspath(output)!r} is the folder of the base model: name another one.")
    config = transformers.AutoConfig.from_pretrained(folder)
    job = _Job(folder, config, adapters, output, weights, combination, ways, dtype, safe_merge, quantized)
    entries = Shards(folder).entries if has_weights(folder) else {}
    reason = _only_in_memory(config, entries)
    if reason is not None:
        return _in_memory(job, reason)
    model = _without_memory(config, entries, dtype)
    if isinstance(model, str):
        return _in_memory(job, model)
    adapted, names, mixture = _adapted(model, job)
    if (reason := _needs_more(adapted.get_base_model(), names)) is not None:
        return _in_memory(job, reason)
    changed = _changed(adapted.get_base_model(), mixture)
    with replacing(output) as path:
        files = _write_shards(entries, changed, path, job, tell)
        _copy_rest(job, path(""))
    return MergeReport(os.fspath(output), files, len(entries), len(changed))


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
    model.tie_weights()
    index = {}
    for name, entry in entries.items():
        kept = str(_dtype(entry, dtype)).removeprefix("torch.")
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


def _adapted(base: nn.Module, job: _Job) -> tuple[Any, list[str], _Mixture | None]:
    """The model with the adapters, those to merge active, their names; how they are combined, if they are no LoRAs."""
    from peft.peft_model import PeftModel

    if not job.adapters:
        raise ConfigError("no adapter to merge was given.")
    model: Any = None
    for name, folder in job.adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    config = model.peft_config[next(iter(job.adapters))]
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        raise NoEqualWeightError(
            f"{method} trains tokens or prefixes, which no weight equals: keep the adapter beside the model."
        )
    names = list(job.adapters)
    if len(names) > 1 or job.weights is not None or job.combination is not None:
        numbers = [1.0] * len(names) if job.weights is None else list(job.weights)
        pairs = method == "LORA"
        if job.combination is not None and not pairs:
            return model, names, _mixture(model, names, numbers, job)
        kind = {"combination_type": job.combination or "cat", **job.ways} if pairs else {}
        model.add_weighted_adapter(names, numbers, _MERGED, **kind)
        names = [_MERGED]
    model.set_adapter(names[0])
    return model, names, None


def _mixture(model: Any, names: list[str], numbers: list[float], job: _Job) -> _Mixture:
    """Adapters whose changes of each weight are combined, as they are no pairs; all are active then."""
    density, rank = job.ways.get("density"), job.ways.get("svd_rank")
    if rank is not None:
        raise ConfigError("svd_rank is the rank of a LoRA, and these adapters are none: leave it out.")
    numbers = checked_weights(model.base_model, names, numbers)
    model.base_model.set_adapter(names)
    return _Mixture(dict(zip(names, numbers)), Combination(str(job.combination), density))


def _needs_more(model: nn.Module, names: list[str]) -> str | None:
    """What merging changes beside the weights that are in the files."""
    if biases_of(model) is not None:
        return "the adapter trains biases of the base model"
    first, last = embeddings_of(model)
    ends = [site for site in walk(model) if site.wrappers and site.module in (first, last)]
    if ends and first is not None and getattr(first, "weight", 0) is getattr(last, "weight", 1):
        return "the adapter is on one end of a tied embedding"
    if new_biases(model, names):
        return "merging gives layers a bias"
    return None


def _changed(model: nn.Module, mixture: _Mixture | None) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    """Name of a tensor -> what gives it, with others of its module, as the active adapters make it, or mixed.

    Raises:
        NoEqualWeightError: an adapter is no weight; its layer and the reason are named.
    """
    found: dict[str, Callable[[], dict[str, torch.Tensor]]] = {}
    for site in walk(model):
        if not site.wrappers:
            continue
        wrapper: Any = site.wrappers[0][1]
        layer = getattr(wrapper, "token_adapter", None) if isinstance(wrapper, AuxiliaryTrainingWrapper) else wrapper
        if isinstance(layer, BaseTunerLayer):
            for adapter in (*layer.current(),):
                if reason := adapter.unmergeable():
                    raise NoEqualWeightError(f"{site.key}: adapter {adapter.name!r} cannot be merged: {reason}")
            stands = next((m for a in layer.current() if (m := a.stand_in()) is not None), None)
            give = _of_layer(layer, mixture) if stands is None else _of_module(stands)
        else:
            give = _of_module(wrapper.unload(True))
        for name in _names(site.module):
            found[join(site.key, name)] = _prefixed(give, site.key)
    return found


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _of_layer(layer: BaseTunerLayer, mixture: _Mixture | None) -> Callable[[], dict[str, torch.Tensor]]:
    if mixture is None:
        return lambda: effective(layer, layer.current())
    return lambda: _mixed(layer, mixture)


def _mixed(layer: BaseTunerLayer, mixture: _Mixture) -> dict[str, torch.Tensor]:
    """The tensors of a layer with the combination of what its active adapters add to them."""
    parts, kind = [(adapter, mixture.weights[adapter.name]) for adapter in layer.current()], layer.kind
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
            path(target), {n: (_dtype(entries[n], job.dtype), entries[n].shape) for n in names}
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


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def _dtype(entry: Entry, wanted: torch.dtype | None) -> torch.dtype:
    own = _DTYPES.get(entry.dtype)
    if own is None:
        raise ValueError(f"{entry.file} holds tensors of the dtype {entry.dtype}, which is not known here.")
    return wanted if wanted is not None and own.is_floating_point else own


class ShardWriter:
    """A safetensors file whose tensors are written one by one, in the order of ``plan``: name -> (dtype, shape).

    The format is an 8-byte length, a header of JSON, and the bytes of the tensors.
    """

    def __init__(self, file: str, plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.plan, header, end = dict(plan), {}, 0
        for name, (dtype, shape) in plan.items():
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        self.file = open(file, "wb")  # noqa: SIM115  (closed by __exit__)
        self.file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write the next tensor; returns its bytes.

        Raises:
            ValueError: it is not of the shape that was announced.
        """
        dtype, shape = self.plan[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} when merged, and {shape} in the base's files.")
        flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8)
        self.file.write(memoryview(flat.numpy()))
        return flat.numel()


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
        values.pop("torch_dtype", None)
        values["dtype"] = str(job.dtype).removeprefix("torch.")
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _in_memory(job: _Job, reason: str) -> MergeReport:
    """The same with the whole model in memory."""
    base = class_of(job.config).from_pretrained(job.folder, dtype=job.dtype or "auto")
    if getattr(job.config, "quantization_config", None) and not job.quantized:
        base = base.dequantize()
    adapted, names, mixture = _adapted(base, job)
    if mixture is not None:
        raise ConfigError(
            f"adapters that are no LoRAs are combined by {job.combination!r} in the files of the base alone, and "
            f"{reason}. peft.save_as_lora(..., combination_type={job.combination!r}) writes a LoRA to merge."
        )
    changed = [name for site in walk(adapted.get_base_model()) if site.wrappers for name in _names(site.module)]
    merged = adapted.merge_and_unload(safe_merge=job.safe_merge, adapter_names=names)
    with replacing(job.output) as path:
        merged.save_pretrained(path(""))
        shards = sum(name.endswith(".safetensors") for name in os.listdir(path("")))
        _copy_rest(job, path(""))
    tensors = sum(1 for _ in merged.parameters())
    return MergeReport(os.fspath(job.output), shards, tensors, len(changed), reason)

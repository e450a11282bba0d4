"""Adapters as state dicts and files: what belongs to an adapter, under which name, and how it gets in and out."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from peft.core.layer.layer import BaseTunerLayer
from peft.core.model import operations
from peft.core.model.auxiliary import bias_state
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import Site, embeddings_of, file_path, join, layers_of, walk
from peft.core.prompts import PromptTuner
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.error import CheckpointError


@dataclass
class Entry:
    """One tensor of an adapter: its name in the file and in memory, and the module that holds it (if any)."""

    saved: str
    memory: str
    tensor: torch.Tensor
    aliases: tuple[str, ...] = ()
    put: Callable[[torch.Tensor], None] | None = None
    as_saved: Callable[[torch.Tensor], torch.Tensor | dict[str, torch.Tensor]] = torch.Tensor.detach
    split: tuple[str, ...] = ()
    as_loaded: Callable[[dict[str, torch.Tensor]], torch.Tensor] | None = None
    takes: Callable[[torch.Size], bool] | None = None

    def names(self) -> list[str]:
        """All names by which a state dict may mean this tensor; some clients give those in memory."""
        return [name for name in (self.memory, *self.aliases, self.saved) if name]


class LoadResult(NamedTuple):
    """Names in the file: tensors that the adapter has and the file lacks, and the other way round."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def tuner_of(model: nn.Module) -> BaseTuner | None:
    """What manages adapters that change weights; None for a plain module that has some, and for prompts."""
    tuner = model if isinstance(model, BaseTuner) else model._modules.get("base_model")
    return tuner if isinstance(tuner, BaseTuner) else None


def anatomy(model: nn.Module) -> tuple[nn.Module, str]:
    """The adapted base model, and the prefix of its names in files."""
    if (tuner := tuner_of(model)) is not None:
        return tuner.model, "base_model.model."
    return (model.base_model, "base_model.") if prompts_of(model) else (model, "")


def prompts_of(model: nn.Module) -> PromptTuner | None:
    """What manages a model's prompts; None where its adapters change weights."""
    return model.__dict__.get("_prompts")


def entries(model: nn.Module, adapter: str) -> Iterator[Entry]:
    """All tensors of an adapter, found by walking the layers that hold them."""
    root, prefix = anatomy(model)
    shared: dict[str, Any] = {}
    labelled = False
    repeated: list[str] = []  # where files may say again what the layers share
    for site in walk(root):
        for depth, (path, wrapper) in enumerate(site.wrappers):
            place = file_path(path, adapter, [*site.above, *site.wrappers[:depth]]) if path else path
            for saved, memory, tensor in wrapper.adapter_state(adapter):
                bare = memory.removesuffix(".weight") != memory and not saved.endswith(".weight")
                aliases = (prefix + join(place, f"{saved}.weight"),) if bare else ()
                held = prefix + join(path, memory) if memory else ""
                entry = Entry(prefix + join(place, saved), held, tensor, aliases)
                if isinstance(wrapper, BaseTunerLayer):
                    entry.as_saved = partial(wrapper.as_saved, adapter, saved)
                    entry.split, entry.as_loaded = wrapper.split, partial(wrapper.as_loaded, adapter, saved)
                    entry.takes = partial(wrapper.takes, adapter, saved)
                yield entry
            if isinstance(wrapper, BaseTunerLayer) and adapter in wrapper and wrapper.shared:
                shared.update({attribute: getattr(wrapper, attribute) for attribute in wrapper.shared})
                labelled = wrapper.labelled
                repeated.append(prefix + place)
    for saved, memory, tensor in prompts.adapter_state(adapter) if (prompts := prompts_of(model)) else ():
        yield Entry(saved, memory, tensor, put=None if memory else partial(prompts.load_prompt, adapter))
    for saved, memory, tensor in tuner.adapter_state(adapter) if (tuner := tuner_of(model)) else ():
        yield Entry(saved, memory, tensor)
    for saved, memory, tensor in bias_state(root, adapter):
        yield Entry(prefix + saved, prefix + memory, tensor)
    for attribute, container in shared.items():
        value, memory = container[adapter], f"base_model.{attribute}.{adapter}"
        if isinstance(value, nn.Module):
            label = "default." if labelled else ""
            for sub, tensor in value.state_dict(keep_vars=True).items():
                yield Entry(f"base_model.{attribute}.{label}{sub}", f"{memory}.{sub}", tensor)
            continue
        put = None if isinstance(value, nn.Parameter) else _setter(container, adapter)
        yield Entry(f"base_model.{attribute}", memory, value, tuple(join(p, attribute) for p in repeated), put)


def _setter(container: Any, adapter: str) -> Callable[[torch.Tensor], None]:
    def put(value: torch.Tensor) -> None:
        old = container[adapter]
        if old.shape != value.shape or not torch.equal(old, value.to(old)):
            container[adapter] = value.to(old)  # not in place: another adapter may use the old one

    return put


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of one adapter, under the names that they have in files.

    Args:
        model: a :class:`PeftModel`, or any module with adapters.
        state_dict: take the values from this state dict of the whole model (as gathered by FSDP, say).
        unwrap_compiled: take ``torch.compile``'s wrapper off first.
        save_embedding_layers: also give the base weights of adapted embeddings; "auto": if any is adapted.

    Returns:
        name -> detached tensor; one that several layers share occurs once.

    Raises:
        ValueError: if the model has no such adapter.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    root, prefix = anatomy(model)
    config = (getattr(model, "peft_config", None) or {}).get(adapter_name)
    if config is None:
        operations.require_adapters(root, [adapter_name])
    found, seen = {}, set()
    own = list(entries(model, adapter_name))  # held until the end: an id is that of a living tensor only
    for entry in own:
        if id(entry.tensor) in seen or (entry.put is not None and not getattr(config, "save_projection", True)):
            continue
        seen.add(id(entry.tensor))
        value = (state_dict or {}).get(entry.memory, entry.tensor)
        written = entry.as_saved(value)
        parts = written if isinstance(written, dict) else {"": written}
        found.update({entry.saved + suffix: part.detach() for suffix, part in parts.items()})
    if save_embedding_layers:
        found.update(_embeddings(root, prefix, adapter_name, always=save_embedding_layers is True))
    return found


def _embedding_sites(root: nn.Module) -> Iterator[tuple[Site, nn.Parameter]]:
    """Where the input and the output embedding are, and their base weights."""
    ends = embeddings_of(root)
    for site in walk(root):
        weight = site.module._parameters.get("weight")
        if weight is not None and any(end is site.module for end in ends):
            yield site, weight


def _embeddings(root: nn.Module, prefix: str, adapter: str, always: bool) -> dict[str, torch.Tensor]:
    """Base weights of the input and output embeddings that the adapter adapts (or of both, if ``always``)."""
    found = {}
    for site, weight in _embedding_sites(root):
        adapted = any(isinstance(w, BaseTunerLayer) and adapter in w and not w.follows_ties for _, w in site.wrappers)
        if adapted or (always and not site.wrappers):
            path = file_path(join(site.path, "weight"), adapter, [*site.above, *site.wrappers])
            found[prefix + path] = weight.detach()
    return found


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: dict[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Fill an adapter with the tensors of a file.

    Args:
        ignore_mismatched_sizes: leave tensors of another shape as they are, with a warning.
        low_cpu_mem_usage: put the given tensors into the model instead of copying them.

    Raises:
        ValueError: if a tensor has another shape than its place; nothing has been changed then.
    """
    root, prefix = anatomy(model)
    if (prompts := prompts_of(model)) and adapter_name in prompts.peft_config:
        prompts.make_room(adapter_name, peft_model_state_dict)
    known: dict[str, Entry] = {}
    own = list(entries(model, adapter_name))
    if not own:
        operations.require_adapters(root, [adapter_name])
    for entry in own:
        for name in entry.names():
            known[name] = entry
    embeddings = base_weights(root, prefix)
    plan: list[tuple[Entry, torch.Tensor]] = []
    unexpected: list[str] = []
    wrong: list[tuple[Entry, torch.Tensor]] = []
    found: set[int] = set()
    for name, value in joined(peft_model_state_dict, own, prefix).items():
        names = (name, prefix + name, name.removeprefix("base_model.model."))
        place = next((known[n] for n in names if n in known), embeddings.get(name))
        if place is None:
            unexpected.append(name)
            continue
        found.add(id(place.tensor))
        fits = place.tensor.shape == value.shape or (place.takes is not None and place.takes(value.shape))
        (plan if fits else wrong).append((place, value))
    if wrong and not ignore_mismatched_sizes:
        raise CheckpointError(_mismatch(model, adapter_name, wrong))
    if wrong:
        warnings.warn("these tensors have another shape and were left out: " + ", ".join(e.saved for e, _ in wrong))
    _unmerge_for(root, adapter_name)
    with torch.no_grad():
        for entry, value in sorted(plan, key=lambda item: item[0].put is None):  # exact tensors after rounded ones
            _write(model, entry, value, low_cpu_mem_usage)
        for _, layer in layers_of(root):
            if adapter_name in layer:
                layer.loaded(adapter_name)
    missing = [e.saved for e in own if id(e.tensor) not in found and e.put is None]
    return LoadResult(missing, unexpected)


def joined(state_dict: dict[str, torch.Tensor], own: list[Entry], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, with those that stand for one tensor of the adapter put together."""
    joined = dict(state_dict)
    for entry in own:
        for saved in (entry.saved, entry.saved.removeprefix(prefix)):
            if entry.as_loaded and entry.split and all(saved + suffix in joined for suffix in entry.split):
                joined[saved] = entry.as_loaded({suffix: joined.pop(saved + suffix) for suffix in entry.split})
    return joined


def base_weights(root: nn.Module, prefix: str) -> dict[str, Entry]:
    """Base weights of embeddings, which files may hold beside the adapter."""
    found = {}
    for site, weight in _embedding_sites(root):
        entry = Entry(prefix + join(site.path, "weight"), "", weight)
        found[entry.saved] = found[prefix + join(site.key, "weight")] = entry
        found[prefix + join(site.key, "base_layer.weight")] = entry
    return found


def _mismatch(model: nn.Module, adapter: str, wrong: list[tuple[Entry, torch.Tensor]]) -> str:
    entry, value = wrong[0]
    config = (getattr(model, "peft_config", None) or {}).get(adapter)
    base = getattr(config, "base_model_name_or_path", None)
    return (
        f"size mismatch for {entry.saved}: "
        f"the checkpoint has {list(value.shape)}, the model {list(entry.tensor.shape)}"
        + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        + ". The adapter belongs to another base model or config"
        + (f"; it was trained on {base!r}" if base else "")
        + ". Pass ignore_mismatched_sizes=True to load the rest."
    )


def _unmerge_for(root: nn.Module, adapter: str) -> None:
    """An adapter that is in the base weights comes out before its tensors change."""
    for _, layer in layers_of(root):
        if adapter in layer.merged_adapters:
            layer.unmerge()


def _write(model: nn.Module, entry: Entry, value: torch.Tensor, assign: bool) -> None:
    if entry.put is not None:
        entry.put(value)
    elif not entry.memory:  # a view of another layer's tensor, or a weight of the base model
        if entry.tensor.device.type != "meta":
            entry.tensor.data.copy_(value)
    elif assign or entry.tensor.device.type == "meta" or entry.tensor.shape != value.shape:
        path, _, name = entry.memory.rpartition(".")
        holder = model if hasattr(model, "base_model") or not entry.memory.startswith("base_model.") else None
        parent = (holder or model).get_submodule(path if holder else path.removeprefix("base_model."))
        old = parent._parameters.get(name, entry.tensor)
        device = _device_near(model, entry) if old.device.type == "meta" else old.device
        value = value.to(device, old.dtype if old.shape != value.shape else None)
        if isinstance(old, nn.Parameter):
            parent._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
        else:
            parent._buffers[name] = value
    else:
        entry.tensor.data.copy_(value)


def _device_near(model: nn.Module, entry: Entry) -> torch.device:
    """The device of the base layer around a tensor that is on none yet."""
    parts = entry.memory.split(".")
    for end in range(len(parts), -1, -1):
        try:
            module = model.get_submodule(".".join(parts[:end]))
        except AttributeError:
            continue
        for p in module.parameters():
            if p.device.type != "meta":
                return p.device
    return torch.device("cpu")


# --- files ----------------------------------------------------------------------------------------------------


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Callable[[str], str]]:
    """Files that appear together, or not at all: write each to ``path(name)``; they are renamed at the end."""
    os.makedirs(folder, exist_ok=True)
    pending: list[tuple[str, str]] = []

    def path(name: str) -> str:
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        os.close(handle)
        pending.append((temporary, os.path.join(folder, name)))
        return temporary

    try:
        yield path
        for temporary, final in pending:
            os.chmod(temporary, 0o644)
            os.replace(temporary, final)
    finally:
        for temporary, _ in pending:
            if os.path.exists(temporary):
                os.remove(temporary)


def write_adapter(
    folder: str | os.PathLike, tensors: dict[str, torch.Tensor], config: Any, safe_serialization: bool = True
) -> None:
    """Write an adapter's tensors and its config into a folder; what was there stays until all is written."""
    with atomic_folder(folder) as path:
        write_weights(path, tensors, safe_serialization)
        config.save_pretrained(os.fspath(folder))
    stale = os.path.join(folder, WEIGHTS_NAME if safe_serialization else SAFETENSORS_WEIGHTS_NAME)
    if os.path.exists(stale):  # of an earlier save in the other format
        os.remove(stale)


def write_weights(path: Callable[[str], str], tensors: dict[str, torch.Tensor], safe_serialization: bool) -> None:
    """Write an adapter's tensors, as safetensors or as a pickle."""
    if safe_serialization:
        from safetensors.torch import save_file

        save_file(_separate(tensors), path(SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    else:
        torch.save({name: t.cpu() for name, t in tensors.items()}, path(WEIGHTS_NAME))


def _separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors takes contiguous tensors that share no memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | None = None,
    key_mapping: dict[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors from a folder, or from a repository on the hub.

    Args:
        device: where to put them; the CPU by default.
        key_mapping: regex -> replacement, applied to the names; the first that matches counts.

    Raises:
        FileNotFoundError: if there is no file of weights.
        ValueError: if the file is damaged.
    """
    tensors = read_tensors(find_weights(model_id, **hf_hub_download_kwargs), device)
    return tensors if not key_mapping else {_renamed(name, key_mapping): t for name, t in tensors.items()}


def read_tensors(file: str, device: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of one file, safetensors or a pickle.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    try:
        if file.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(file, device=str(device or "cpu"))
        return torch_load(file, map_location=torch.device(device or "cpu"))
    except Exception as error:
        raise CheckpointError(f"{file} is damaged or no file of adapter weights ({error}).") from error


def _renamed(name: str, key_mapping: dict[str, str]) -> str:
    for pattern, replacement in key_mapping.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """``torch.load`` that runs no code from the file unless told to."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def find_weights(model_id: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> str:
    """The local path of an adapter's weights, downloaded if need be."""
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    folder = os.path.join(model_id, subfolder or "")
    if os.path.isdir(model_id):
        for name in names:
            if os.path.isfile(os.path.join(folder, name)):
                return os.path.join(folder, name)
        there = sorted(os.listdir(folder))[:8] if os.path.isdir(folder) else "no such folder"
        raise FileNotFoundError(f"{folder} holds neither {names[0]} nor {names[1]}: {there}.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    hub.pop("use_auth_token", None)
    for name in names:
        try:
            return hf_hub_download(str(model_id), name, subfolder=subfolder, **hub)
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"the repository {model_id!r} holds neither {names[0]} nor {names[1]}.")

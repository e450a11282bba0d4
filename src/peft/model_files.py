"""Saving and loading the adapters of a model."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft.composition.config import CompositionConfig
from peft.composition.model import Compositions
from peft.config import PeftConfig
from peft.core.files.entries import entries
from peft.core.files.io import CONFIG_NAME, HUB_KEYWORDS, hub_options, load_peft_weights, write_adapter
from peft.core.files.state_dict import LoadResult, get_peft_model_state_dict, set_peft_model_state_dict
from peft.core.filling import filled_later
from peft.core.model import operations
from peft.core.model.replacing import restoring
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import layers_of, surveyed
from peft.errors import CheckpointError, ConfigError, ConfigFileError, PeftError, PeftWarning, some
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.peft_types import listed
from peft.tools.card import create_or_update_model_card
from peft.tuners.lora.experts import convert_peft_adapter_state_dict_for_transformers
from peft.usage import tell_misspelt


if TYPE_CHECKING:
    from peft.peft_model import PeftModel


_ALSO_READ = ("torch_device", "ignore_mismatched_sizes", "peft_config", "subfolder", *HUB_KEYWORDS)
"""Keywords that loading reads beside its parameters."""


class ModelFiles(Compositions):
    """Mixin of :class:`PeftModel`: an adapter as files, written, read, and put around a base model."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters: "default" into the folder, each other one into a sub-folder of its name.

        The files of an adapter are replaced when all of them are written; a save that fails leaves the old ones.

        Args:
            safe_serialization: safetensors; otherwise a pickle, ``adapter_model.bin``.
            selected_adapters: which ones; all by default.
            save_embedding_layers: also the base weights of adapted embeddings; "auto": if there are any.
            is_main_process: only gather (all processes of a sharded model have to), do not write.
            path_initial_model_for_weight_conversion: folder in which the adapter was saved before its training. Then
                plain LoRA of twice the rank is written, for the base as it was before a start such as PiSSA took a
                part of its weights.
            kwargs: ``state_dict``: take the values from this state dict of the whole model.

        Raises:
            ValueError: if ``save_directory`` is a file, or an adapter is unknown.

        Examples:
            >>> model.save_pretrained("adapter")
            >>> sorted(os.listdir("adapter"))
            ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
        """
        if os.path.isfile(save_directory):
            raise ConfigFileError(f"{save_directory} is a file; save_pretrained needs a folder.")
        tell_misspelt(ModelFiles.save_pretrained, kwargs, ["state_dict"])
        names = list(self.peft_config) if selected_adapters is None else operations.names_of(selected_adapters)
        operations.require_adapters(self, names, self.peft_config)
        if not is_main_process and kwargs.get("state_dict") is not None:
            return  # gathered already
        state = self.state_dict() if kwargs.get("state_dict") is None else kwargs["state_dict"]
        if is_main_process and not state:
            raise CheckpointError("the state_dict to save is empty: give that of the main process.")
        tensors = {
            name: get_peft_model_state_dict(self, state, name, save_embedding_layers=save_embedding_layers)
            for name in names
        }
        if not is_main_process:
            return
        to_write = {name: (tensors[name], self._config_to_save(name)) for name in names}
        if (start := path_initial_model_for_weight_conversion) is not None:
            to_write = {name: self._without_start(name, *held, start) for name, held in to_write.items()}
        elif isinstance(self.base_model, BaseTuner):
            own = [name for name in to_write if not isinstance(self.peft_config[name], CompositionConfig)]
            for message in filter(None, map(self.base_model.lost_in_a_file, own)):
                warnings.warn(message, PeftWarning)
        for name, (held, config) in to_write.items():
            folder = os.path.join(save_directory, name) if name != "default" else save_directory
            write_adapter(folder, held, config, safe_serialization)
        self.create_or_update_model_card(save_directory)

    def _without_start(self, name: str, tensors: dict[str, torch.Tensor], config: PeftConfig, path: str) -> Any:
        tuner = self.base_model
        if not isinstance(tuner, BaseTuner):
            raise ValueError("path_initial_model_for_weight_conversion is for LoRA; leave it out.")
        return tuner.without_start(name, tensors, config, path)

    def _config_to_save(self, name: str) -> PeftConfig:
        config = copy.copy(self.peft_config[name])
        base = self.get_base_model()
        note_base(config, base)
        if config.task_type is None:
            library = type(base).__module__
            config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": library}
        config.inference_mode = True
        return config

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Write or update README.md with the facts that the hub reads; a user's own text is kept."""
        create_or_update_model_card(self, output_dir)

    @classmethod
    @surveyed()
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter around its base model.

        Args:
            model: the base model.
            model_id: a folder, or a repository on the hub (``subfolder``, ``revision``, ... as keywords).
            is_trainable: go on training it; otherwise it is frozen, and the model in evaluation mode.
            config: instead of the saved one.
            key_mapping: regex -> replacement for the names in the file.
            kwargs: ``torch_device``, on which to read the file; options of the hub; ``ignore_mismatched_sizes``.

        Raises:
            ValueError, FileNotFoundError: if the files are missing or damaged, or do not fit the model, which is
                then unchanged.

        Examples:
            >>> model.save_pretrained("adapter")
            >>> base = model.unload()
            >>> model = PeftModel.from_pretrained(base, "adapter", is_trainable=True)
        """
        hub = hub_options(kwargs)
        tell_misspelt(ModelFiles.from_pretrained, kwargs, _ALSO_READ)
        placing = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        model = plain_model(model, adapter_name)
        config = _read_config(model_id, config, is_trainable, hub)
        if isinstance(config, CompositionConfig):
            with restoring(model):
                return cls._from_composition(model, model_id, adapter_name, is_trainable, config, {**hub, **placing})
        weights = load_peft_weights(model_id, kwargs.get("torch_device"), key_mapping, **hub)
        with restoring(model):
            with _naming(model_id, CONFIG_NAME, config), filled_later() as filling:
                made = cls._class_for(config)(model, config, adapter_name, **placing)
            made._load(model_id, adapter_name, config, is_trainable, weights, kwargs, filling.skipped, **placing)
        return made

    @surveyed()
    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> LoadResult:
        """Load a further adapter, inactive, or new values for one that is there.

        Args:
            is_trainable: let it train already; otherwise the model is in evaluation mode afterwards.
            torch_device: device on which to read the file.

        Returns:
            The names that the file lacks, and those that it has beyond the adapter's.

        Raises:
            ValueError, FileNotFoundError: if the files are missing or damaged, or do not fit; the model is unchanged.

        Examples:
            >>> model.save_pretrained("adapter")
            >>> result = model.load_adapter("adapter", adapter_name="again")
            >>> model.set_adapter("again")
        """
        hub = hub_options(kwargs)
        config = _read_config(model_id, kwargs.pop("peft_config", None), is_trainable, hub)
        tell_misspelt(ModelFiles.load_adapter, kwargs, _ALSO_READ)
        weights = load_peft_weights(model_id, torch_device, key_mapping, **hub)
        fresh = adapter_name not in self.peft_config
        placing = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        with _naming(model_id, CONFIG_NAME, config), filled_later() as filling:
            if fresh and isinstance(config, CompositionConfig):
                self._load_members(model_id, config, {**hub, **placing})
            if fresh:
                self.add_adapter(adapter_name, config, **placing)
            elif isinstance(config, CompositionConfig):
                self._check_expression(adapter_name, config)
            else:
                self._check_method(config)
        try:
            return self._load(
                model_id, adapter_name, config, is_trainable, weights, kwargs, filling.skipped, **placing
            )
        except BaseException:
            if fresh:
                self.delete_adapter(adapter_name)
            raise

    def _load(
        self,
        model_id: str | os.PathLike,
        name: str,
        config: PeftConfig,
        is_trainable: bool,
        weights: dict[str, torch.Tensor],
        options: dict,
        without_values: bool,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
    ) -> LoadResult:
        """Give an adapter the values of a file; it then trains, or the model is in evaluation mode."""
        with _naming(model_id, "adapter_model", config):
            ignore = options.get("ignore_mismatched_sizes", False)
            weights = convert_peft_adapter_state_dict_for_transformers(self, self.peft_config[name], weights, name)
            result = set_peft_model_state_dict(self, weights, name, ignore, low_cpu_mem_usage)
            if result.missing_keys and result.unexpected_keys:
                self._check_something_fits(name, result)
            if without_values and (result.missing_keys or ignore) and not low_cpu_mem_usage:
                self._start_over(name, autocast_adapter_dtype)  # what the file does not hold has to be drawn
                result = set_peft_model_state_dict(self, weights, name, ignore)
            left = entries(self, name) if low_cpu_mem_usage else ()
            if empty := [entry.saved for entry in left if entry.tensor.device.type == "meta"]:
                raise CheckpointError(
                    f"the file lacks {some(empty)}, and low_cpu_mem_usage leaves nothing else to put there."
                )
            for _, layer in layers_of(self.get_base_model()):
                if name in layer:
                    layer.adapters[name].upgrade(config.peft_version or "0.0")  # older files do not say
        if result.missing_keys:
            warnings.warn(_listed("Found missing adapter keys while loading the checkpoint", result.missing_keys))
        if result.unexpected_keys:
            warnings.warn(_listed("the checkpoint has tensors that the adapter does not", result.unexpected_keys))
        config.inference_mode = not is_trainable
        if is_trainable:
            self.set_requires_grad(name, True)
        else:
            self.eval()
        return result

    def _check_something_fits(self, name: str, result: LoadResult) -> None:
        """Raise CheckpointError where the adapter has other tensors than the file, and none in common."""
        own, base = list(entries(self, name)), self.peft_config[name].base_model_name_or_path
        if {entry.key for entry in own} <= set(result.missing_keys):
            raise CheckpointError(
                f"no tensor of the file belongs to adapter {name!r} of this {type(self.get_base_model()).__name__}: "
                f"the file has {result.unexpected_keys[0]!r}, the adapter {own[0].saved!r}. The adapter was trained "
                f"on another base model{f', {base!r}' if base else ''}: load that one. If it is the same with other "
                "names, pass key_mapping={regex of the file: replacement}."
            )

    def _start_over(self, name: str, autocast_adapter_dtype: bool) -> None:
        """Allocate an adapter anew, with its initial values."""
        model, active = self.get_base_model(), self.active_adapters
        operations.remove(model, name)
        self.base_model.inject_adapter(model, name, autocast_adapter_dtype)
        if name in active:
            self.set_adapter(active, self.peft_config[name].inference_mode)


def note_base(config: PeftConfig, base: nn.Module) -> None:
    """Note in a config what its base model was loaded from."""
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None


def plain_model(model: nn.Module, adapter_name: str) -> nn.Module:
    """The base model, without what manages its adapters; a warning tells of those in it that stay."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be an nn.Module, got {type(model).__name__}.")
    base = model.get_base_model() if isinstance(model, ModelFiles) else model
    base = base.model if isinstance(base, BaseTuner) else base
    adapters = [] if base is None else operations.adapters_of(base)
    if adapter_name in adapters:  # replaced, which is told where it happens
        return base
    if base is not model or adapters:
        warnings.warn(
            f"the model is a {type(model).__name__}"
            + (f" with the adapters {', '.join(adapters)} in it" if adapters else "")
            + ", and gets a further one. For several adapters in one PeftModel call add_adapter on that; to replace "
            "the adapters, call unload() on it first.",
            stacklevel=3,
        )
    return base


@contextmanager
def _naming(where: str | os.PathLike, part: str, config: PeftConfig) -> Iterator[None]:
    """A context in which errors name the files that they are about; those that no check foresaw are of our kind."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, but none of the files'
        raise
    except (ValueError, OSError, PeftError) as error:
        if len(error.args) == 1 and os.fspath(where) not in str(error):
            error.args = (f"{where} ({part}): {error}",)
        raise
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, re.error) as error:
        numbers = {name: value for name, value in vars(config).items() if type(value) is int}
        largest = max(numbers, key=lambda name: numbers[name], default=None)
        raise CheckpointError(
            f"{where} ({part}): what it says cannot be made an adapter of this model "
            f"({type(error).__name__}: {error}). The files are damaged, or belong to another model"
            + (f". The largest size in the config is {largest}={numbers[largest]}." if largest else ".")
        ) from error


def _listed(what: str, names: list[str]) -> str:
    return f"{what}: {some(map(repr, names))}."


def _read_config(model_id: str | os.PathLike, config: PeftConfig | None, is_trainable: bool, hub: dict) -> PeftConfig:
    if config is None:
        config = PeftConfig.from_pretrained(model_id, **hub)
    elif not isinstance(config, PeftConfig):
        raise ValueError(f"config should be a PeftConfig, got {type(config).__name__}.")
    if config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING and not isinstance(config, CompositionConfig):
        what = f"is a {config.peft_type} adapter" if config.peft_type else "has a config that names no peft_type"
        raise ConfigError(f"{model_id} {what}; this version has {listed(PEFT_TYPE_TO_TUNER_MAPPING)}.")
    config.inference_mode = not is_trainable
    for member in config.members:  # virtual tokens start as the file says, not the config
        member.inference_mode |= member.is_prompt_learning
    return config

"""A model with adapters: :class:`PeftModel`, and one class for each task."""

from __future__ import annotations

import copy
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils import PushToHubMixin

from peft.compat.model import ModelCompat
from peft.config import PeftConfig
from peft.core.blocks.skipping import blocks_skipped
from peft.core.composition.config import CompositionConfig
from peft.core.composition.dividing import divided
from peft.core.composition.expressions import Composition
from peft.core.composition.model import Compositions
from peft.core.files.card import create_or_update_model_card
from peft.core.files.entries import entries, prompts_of
from peft.core.files.io import CONFIG_NAME, hub_options, load_peft_weights, write_adapter
from peft.core.files.state_dict import LoadResult, get_peft_model_state_dict, set_peft_model_state_dict
from peft.core.filling import filled_later
from peft.core.layer.rows import require_unmerged
from peft.core.model import operations
from peft.core.model.context import BASE
from peft.core.model.manager import INTERFACE, check_adapter_name
from peft.core.model.record import context_of
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import layers_of, surveyed, walk, wrappers_of
from peft.core.prompts import PromptTuner, Task, backbone_of
from peft.kernels import chunked_loss
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.options import value_of
from peft.tools.out_of_memory import add_way_out
from peft.tools.status import (
    TunerLayerStatus,
    TunerModelStatus,
    count_parameters,
    get_layer_status,
    get_model_status,
)
from peft.tuners.lora.experts import convert_config_for, convert_peft_adapter_state_dict_for_transformers
from peft.utils.error import CheckpointError, ConfigError, ConfigFileError, PeftError
from peft.utils.warning import PeftWarning


class PeftModel(ModelCompat, Compositions, PushToHubMixin, nn.Module):
    """A base model with adapters of one method around it.

    Args:
        model: the base model; changed in place.
        peft_config: the config of the first adapter.
        adapter_name: its name.
        autocast_adapter_dtype: hold 16-bit adapters in float32.
        low_cpu_mem_usage: allocate the adapter on the meta device; fill it by loading a checkpoint.

    Attributes:
        base_model: the tuner that manages the adapters; ``base_model.model`` is the adapted base model. For methods
            that train a prompt it is the base model itself.
        prompt_encoder: adapter name -> what a prompt method trains; only for those.
        peft_config: adapter name -> config.

    An attribute that is not the wrapper's own is that of the base model.

    Raises:
        ValueError: if the config does not fit the model; the model is then unchanged.
    """

    # modules that the task trains whole where the base model has them, its inputs, and what prompts do to those
    _heads: ClassVar[tuple[str, ...]] = ()
    _inputs: ClassVar[tuple[str, ...]] = ()
    _task: ClassVar[Task] = Task(token_inputs=("labels",))

    @surveyed()
    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_adapter_name(adapter_name)
        self.peft_type: Any = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names"}
        self._add_heads(peft_config)
        convert_config_for(model, peft_config)
        options = {
            "low_cpu_mem_usage": low_cpu_mem_usage,
            "autocast_adapter_dtype": autocast_adapter_dtype,
            **kwargs,
        }
        configs = {adapter_name: peft_config}
        if peft_config.is_prompt_learning:
            tuner = PromptTuner(model, configs, adapter_name, **options, task=self._task)
            self.__dict__["_prompts"] = tuner
            self.base_model = model
            self.prompt_encoder, self.prompt_tokens = tuner.prompts.encoders, tuner.prompts.tokens
        else:
            self.base_model = self._tuner_class(peft_config)(model, configs, adapter_name, **options)
            self.base_model.take_task(self._task)
        if hasattr(model, "config"):
            self.config = model.config

    def _tuner_class(self, peft_config: PeftConfig) -> type[BaseTuner]:
        return PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type]

    def _add_heads(self, peft_config: PeftConfig) -> None:
        """Let the task's heads be trained whole."""
        if self._heads and hasattr(peft_config, "modules_to_save"):
            own = list(peft_config.modules_to_save or ())
            peft_config.modules_to_save = own + [head for head in self._heads if head not in own]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give a task class a ``forward`` that shows which inputs it takes."""
        super().__init_subclass__(**kwargs)
        if not cls._inputs:
            return

        def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
            if len(args) > len(cls._inputs):
                raise TypeError(f"forward() takes {len(cls._inputs)} positional inputs, got {len(args)}.")
            given = dict(zip(cls._inputs, args), **kwargs)
            return PeftModel.forward(self, **{k: v for k, v in given.items() if v is not None or k not in cls._inputs})

        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, keyword, default=None) for name in cls._inputs]
        parameters.insert(0, inspect.Parameter("self", keyword))
        parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        forward.__doc__ = f"The base model's forward with the active adapters; {PeftModel.forward.__doc__}"
        cls.forward = forward  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "base_model" not in self.__dict__.get("_modules", ()):
                raise
        tuner, base = self._tuner, self.get_base_model()
        if name in INTERFACE and (tuner is self.base_model or hasattr(type(tuner), name) or name in tuner.MEANINGLESS):
            return getattr(tuner, name)
        try:
            return getattr(base, name)
        except AttributeError:
            return getattr(self.base_model, name)

    @property
    def _tuner(self) -> Any:
        """What manages the adapters: ``base_model``, or the :class:`PromptTuner` beside it."""
        return self.__dict__.get("_prompts") or self.base_model

    # --- what it is -------------------------------------------------------------------------------------------
    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self._tuner.peft_config

    @property
    def active_adapter(self) -> str | list[str]:
        return self._tuner.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self._tuner.active_adapters

    @property
    def active_peft_config(self) -> PeftConfig:
        """The config of the (first) active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def _is_prompt_learning(self) -> bool:
        return bool(self.active_adapters) and self.active_peft_config.is_prompt_learning

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that adapters train whole, or None."""
        names = (getattr(config, "modules_to_save", None) or () for config in self.peft_config.values())
        return {name for some in names for name in some} or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.get_base_model(), "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether some active adapter acts, or none since all are switched off."""
        if (prompts := prompts_of(self)) and prompts.active_adapters and not prompts.disable_adapters:
            return True
        wrappers = [w for _, w in wrappers_of(self.get_base_model())]
        return any(not w.disable_adapters and any(n in w for n in w.active_adapters) for w in wrappers)

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapters in it."""
        return self._tuner.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; packed 4-bit weights count as what they stand for."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters and their share."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """One record for each adapted layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """One record for the whole model; "irregular" where layers differ."""
        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter's updates are weights that a LoRA can approximate."""
        return self._tuner.supports_lora_conversion(adapter_name)

    # --- prompts ----------------------------------------------------------------------------------------------
    @property
    def transformer_backbone_name(self) -> str | None:
        """Path of the stack of layers under the task's head, for methods that train a prompt."""
        backbone = backbone_of(self.get_base_model())
        return next((n for n, m in self.get_base_model().named_modules() if m is backbone), None)

    def get_prompt(
        self, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None
    ) -> Any:
        """The active prompt: embeddings ``[batch, tokens, width]``, or a cache that holds its keys and values.

        Args:
            task_ids: the task of each row, for methods that know of tasks.
            max_cache_len: make a cache of this fixed length, not one that grows.

        Raises:
            ValueError: if the model's method trains no prompt.
        """
        return self._require_prompt().prompts.prompt(batch_size, task_ids, max_cache_len)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """What the file of an adapter has as ``prompt_embeddings``, ``[tokens, width]``, on the CPU."""
        prompts = self._require_prompt()
        operations.require_adapters(self, [adapter_name], prompts.adapter_names)
        state = {saved: tensor for saved, _, tensor in prompts.adapter_state(adapter_name)}
        return state["prompt_embeddings"].detach().cpu()

    def _require_prompt(self) -> PromptTuner:
        if (prompts := prompts_of(self)) is None:
            raise ValueError(f"{self.peft_type.value} adapters change weights, and have no prompt.")
        return prompts

    # --- calls ------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``adapter_names`` gives one adapter for each sample (``"__base__"`` for none), in training too.

        ``task_ids`` gives one task number for each sample, ``[batch]``, or one for all, to methods that know of tasks.

        When memory runs out, a note on the error says what a step takes and what would take less.

        Raises:
            ValueError: for unknown adapters, or a number of names or tasks that is not the number of samples.
        """
        try:
            return self._call(self._tuner.forward, args, kwargs, keep=torch.is_grad_enabled())
        except RuntimeError as error:
            add_way_out(error, self, args, kwargs)
            raise

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate`` with the active adapters, or with ``adapter_names`` for each sample."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        with context_of(self.get_base_model()).prompted(ids):
            return self._call(self._tuner.generate, args, kwargs, keep=False)

    def _call(self, function: Callable, args: tuple, kwargs: dict, keep: bool) -> Any:
        """Tell the layers each row's adapter and task; kept for a backward, which may run the forward again."""
        names = kwargs.pop("adapter_names", None)
        if names is not None:
            self._check_rows(names, args, kwargs)
        elif (dividing := self._dividing()) is not None:
            args, kwargs, names = divided(dividing, self._batch(args, kwargs) or 0, args, kwargs)
            self._check_unmerged()
        tasks = kwargs.pop("task_ids", None)
        context = context_of(self.get_base_model())
        before, tasks_before, held = context.adapter_names, context.task_ids, context.held
        if names is None and tasks is None and before is None and tasks_before is None:
            return function(*args, **kwargs)
        if tasks is not None:
            tasks = torch.as_tensor(tasks).reshape(-1)
            if len(tasks) != 1:  # one stands for the batch
                self._check_length("task_ids", len(tasks), args, kwargs)
        context.set_adapter_names(names)
        context.task_ids = tasks
        context.held = names is not None or tasks is not None
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(fast_path and names is None)  # it knows one weight for all rows
        try:
            return function(*args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            context.held = held
            if not keep:  # a backward may still need them
                context.set_adapter_names(before)
                context.task_ids = tasks_before

    def _check_rows(self, names: Sequence[str], args: tuple, kwargs: dict) -> None:
        known = [*self.peft_config, BASE]
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ValueError(f"adapter_names has unknown adapters: {unknown}. There are {known}.")
        self._check_length("adapter_names", len(names), args, kwargs)
        self._check_no_division(names)
        self._check_unmerged()

    def _check_unmerged(self) -> None:
        for _, layer in layers_of(self.get_base_model()):
            require_unmerged(layer)

    def _check_length(self, what: str, count: int, args: tuple, kwargs: dict) -> None:
        batch = self._batch(args, kwargs)
        if batch is not None and count != batch:
            raise ValueError(f"{what} has {count} entries, but the batch has {batch} samples; give as many.")

    def _batch(self, args: tuple, kwargs: dict) -> int | None:
        """How many samples a call has, None where no tensor tells."""
        main = (kwargs.get(name) for name in (getattr(self.get_base_model(), "main_input_name", ""), "inputs_embeds"))
        given = (v for v in (*args[:1], *main, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() > 0)
        return next((len(value) for value in given), None)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Make the model's embedding give outputs that require grad. Adapted models do so by themselves."""
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        return model

    # --- adapters ---------------------------------------------------------------------------------------------
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Give the model a further adapter, inactive and frozen until :meth:`set_adapter`.

        Raises:
            ValueError: if the name is taken, the method is another one than the model's, or the config does not fit;
                the model is then unchanged.

        Examples:
            >>> model.add_adapter("other", LoraConfig(r=2, task_type="CAUSAL_LM"))
            >>> model.set_adapter("other")
        """
        check_adapter_name(adapter_name, list(self.peft_config))
        if isinstance(peft_config, CompositionConfig):
            self._add_composition(adapter_name, peft_config, autocast_adapter_dtype, low_cpu_mem_usage)
            return
        self._check_method(peft_config)
        self._add_heads(peft_config)
        convert_config_for(self.get_base_model(), peft_config)
        self.peft_config[adapter_name] = peft_config
        try:
            self._tuner.inject_adapter(self.get_base_model(), adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        _note_base(peft_config, self.get_base_model())

    def _check_method(self, peft_config: PeftConfig) -> None:
        given: Any = peft_config.peft_type
        if given != self.peft_type and not self._tuner.mixes:
            raise ValueError(
                f"this model has {self.peft_type.value} adapters, so no {given.value} adapter can be "
                "added. For different methods in one model use get_peft_model(..., mixed=True)."
            )

    def set_adapter(self, adapter_name: str | list[str] | Composition, inference_mode: bool = False) -> None:
        """Make one adapter (or several) active, and the only ones that train (none in ``inference_mode``).

        Args:
            adapter_name: one name, a list, or an expression, such as ``Stack("language", "task")``. Of an expression
                all adapters train but those in a ``Fuse``; :meth:`set_requires_grad` chooses others.

        Raises:
            ValueError: if there is no such adapter, or the expression has no meaning for these adapters.

        Examples:
            >>> from peft import Stack
            >>> model.add_adapter("other", LoraConfig(r=2, task_type="CAUSAL_LM"))
            >>> model.set_adapter(Stack("default", "other"))
        """
        with self._composing(adapter_name) as names:
            self._tuner.set_adapter(names, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Choose whether these adapters train, active or not."""
        self._tuner.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was active, another becomes active.

        Raises:
            ValueError: if there is no such adapter, or a composition is made of it.
        """
        self._part_with(adapter_name)
        self._tuner.delete_adapter(adapter_name)
        self._forget_composition(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model is its base.

        Examples:
            >>> with model.disable_adapter():
            ...     logits = model(**batch).logits  # the base model's
        """
        with self._tuner.switched_off():
            yield

    @contextmanager
    def skip_layers(self, layers: Iterable[int]) -> Iterator[None]:
        """A context in which the adapters of some transformer blocks do nothing (AdapterDrop, arXiv 2010.11918).

        A step of training belongs into it as a whole: checkpointed blocks run again in the backward pass.

        Args:
            layers: numbers of the blocks, counted from 0; an encoder's come before its decoder's.

        Raises:
            ValueError: if the model has no such block, or adapters that are no part of blocks (prompts).

        Examples:
            >>> with model.skip_layers([0]):  # the first block is the base model's
            ...     logits = model(**batch).logits
        """
        with blocks_skipped(self.get_base_model(), layers):
            yield

    # --- files ------------------------------------------------------------------------------------------------
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
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
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
        _note_base(config, base)
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

        Raises:
            ValueError, FileNotFoundError: if the files are missing or damaged, or do not fit the model, which is
                then unchanged.

        Examples:
            >>> model.save_pretrained("adapter")
            >>> base = model.unload()
            >>> model = PeftModel.from_pretrained(base, "adapter", is_trainable=True)
        """
        hub = hub_options(kwargs)
        model = plain_model(model, adapter_name)
        config = _read_config(model_id, config, is_trainable, hub)
        if isinstance(config, CompositionConfig):
            placing = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
            return cls._from_composition(model, model_id, adapter_name, is_trainable, config, {**hub, **placing})
        _start_from_file(config)
        weights = load_peft_weights(model_id, key_mapping=key_mapping, **hub)
        held = [p for site in walk(model) for p in site.module._parameters.values() if p is not None]
        frozen = [p for p in held if not p.requires_grad]
        placing = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
        with _naming(model_id, CONFIG_NAME, config), filled_later() as filling:
            peft_model = cls._class_for(config)(model, config, adapter_name, **placing)
        try:
            with _naming(model_id, "adapter_model", config):
                peft_model._load(adapter_name, weights, config.peft_version, kwargs, filling.skipped, **placing)
        except Exception:
            peft_model._tuner.unload().requires_grad_(True)
            for p in frozen:
                p.requires_grad_(False)
            raise
        config.inference_mode = not is_trainable
        if is_trainable:
            peft_model.set_requires_grad(adapter_name, True)
        return peft_model if is_trainable else peft_model.eval()

    @classmethod
    def _class_for(cls, config: PeftConfig) -> type[PeftModel]:
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", cls) if cls is PeftModel else cls

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
        _start_from_file(config)
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
            with _naming(model_id, "adapter_model", config):
                result = self._load(adapter_name, weights, config.peft_version, kwargs, filling.skipped, **placing)
        except Exception:
            if fresh:
                self.delete_adapter(adapter_name)
            raise
        config.inference_mode = not is_trainable
        if is_trainable:
            self.set_requires_grad(adapter_name, True)
        else:
            self.eval()
        return result

    def _load(
        self,
        name: str,
        weights: dict[str, torch.Tensor],
        written_by: str | None,
        options: dict,
        without_values: bool,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
    ) -> LoadResult:
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
                f"the file lacks {empty[:5]}, and low_cpu_mem_usage leaves nothing else to put there."
            )
        for _, layer in layers_of(self.get_base_model()):
            if name in layer:
                layer.adapters[name].upgrade(written_by or "0.0")  # older files do not say
        if result.missing_keys:
            warnings.warn(_listed("Found missing adapter keys while loading the checkpoint", result.missing_keys))
        if result.unexpected_keys:
            warnings.warn(_listed("the checkpoint has tensors that the adapter does not", result.unexpected_keys))
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


def _note_base(config: PeftConfig, base: nn.Module) -> None:
    """Note in a config what its base model was loaded from."""
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base.__dict__.get("name_or_path") or None


def plain_model(model: nn.Module, adapter_name: str) -> nn.Module:
    """The base model, without what manages its adapters; a warning tells of those in it that stay."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be an nn.Module, got {type(model).__name__}.")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
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
    except torch.OutOfMemoryError:
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
    return f"{what}: {names[:5]}" + (f" and {len(names) - 5} more." if len(names) > 5 else ".")


def _read_config(model_id: str | os.PathLike, config: PeftConfig | None, is_trainable: bool, hub: dict) -> PeftConfig:
    if config is None:
        config = PeftConfig.from_pretrained(str(model_id), **hub)
    elif not isinstance(config, PeftConfig):
        raise ValueError(f"config should be a PeftConfig, got {type(config).__name__}.")
    if config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING and not isinstance(config, CompositionConfig):
        known = sorted(str(value_of(t)) for t in PEFT_TYPE_TO_TUNER_MAPPING)
        what = f"is a {config.peft_type} adapter" if config.peft_type else "has a config that names no peft_type"
        raise ConfigError(f"{model_id} {what}; this version has {', '.join(known)}.")
    config.inference_mode = not is_trainable
    return config


def _start_from_file(config: PeftConfig) -> None:
    """Have virtual tokens start as the file says, not the config."""
    for member in config.members:
        member.inference_mode |= member.is_prompt_learning


_COMMON = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")
_ENCODER = ("input_ids", "attention_mask", "inputs_embeds", "labels")


class PeftModelForSequenceClassification(PeftModel):
    """For ``TaskType.SEQ_CLS``; the classification head is trained whole."""

    _heads = ("classifier", "score")
    _inputs = (*_ENCODER, *_COMMON)
    _task = Task(heads_read_ids=True)


class PeftModelForTokenClassification(PeftModel):
    """For ``TaskType.TOKEN_CLS``; the classification head is trained whole."""

    _heads = ("classifier", "score")
    _inputs = (*_ENCODER, *_COMMON)


class PeftModelForQuestionAnswering(PeftModel):
    """For ``TaskType.QUESTION_ANS``; the head is trained whole.

    Positions of answers count from the first virtual token in the loss, as they do in the logits: what a head has
    learned to point at is what the largest logit points at.
    """

    _heads = ("qa_outputs",)
    _inputs = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "start_positions",
        "end_positions",
        *_COMMON,
    )


class PeftModelForFeatureExtraction(PeftModel):
    """For ``TaskType.FEATURE_EXTRACTION``."""

    _inputs = ("input_ids", "attention_mask", "inputs_embeds", *_COMMON)


class _Generates:
    """What models that generate have beside ``generate``."""

    base_model_prepare_inputs_for_generation: Any

    def prepare_inputs_for_generation(self, *args: Any, task_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForCausalLM(_Generates, PeftModel):
    """For ``TaskType.CAUSAL_LM``.

    Attributes:
        chunked_loss: compute the loss of training calls without the logits of the whole batch in memory; the output's
            logits are then the last token's. A call may say otherwise: ``forward(..., chunked_loss=True)``. Off until
            set.
    """

    _inputs = (*_ENCODER, *_COMMON)
    chunked_loss: bool

    def _call(self, function: Callable, args: tuple, kwargs: dict, keep: bool) -> Any:
        chunked = kwargs.pop("chunked_loss", None)
        chunked = vars(self).get("chunked_loss", False) and self.training if chunked is None else chunked
        if not chunked or kwargs.get("labels") is None:
            return super()._call(function, args, kwargs, keep)
        with chunked_loss(self.get_base_model()):
            return super()._call(function, args, kwargs, keep)


class PeftModelForSeq2SeqLM(_Generates, PeftModel):
    """For ``TaskType.SEQ_2_SEQ_LM``."""

    _inputs = (
        "input_ids",
        "attention_mask",
        "inputs_embeds",
        "decoder_input_ids",
        "decoder_attention_mask",
        "decoder_inputs_embeds",
        "labels",
        *_COMMON,
    )


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}

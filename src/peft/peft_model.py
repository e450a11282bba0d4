"""A model with adapters: :class:`PeftModel`, and one class for each task."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils import PushToHubMixin

from peft._lazy import also_known
from peft.compat.model import ModelCompat
from peft.composition.config import CompositionConfig
from peft.composition.dividing import divided
from peft.config import PeftConfig
from peft.core.composition import Composition
from peft.core.files.entries import leave_out_repeats, prompts_of
from peft.core.layer.rows import require_unmerged, without_fast_path
from peft.core.model import operations
from peft.core.model.auxiliary import biases_of
from peft.core.model.context import BASE
from peft.core.model.manager import INTERFACE, check_adapter_name
from peft.core.model.record import behind, context_of
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import layers_of, surveyed, wrappers_of
from peft.core.prompts import Prompts, PromptTuner, Task, backbone_of
from peft.errors import MeaninglessError, NoSuchAttributeError, PeftWarning
from peft.kernels import chunked_loss
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.model_files import ModelFiles, note_base
from peft.options import value_of
from peft.tools.check_training import tell_untrained
from peft.tools.out_of_memory import add_way_out
from peft.tools.skipping import blocks_skipped
from peft.tools.status import TunerLayerStatus, TunerModelStatus, count_parameters, get_layer_status, get_model_status
from peft.tuners.lora.experts import convert_config_for


class PeftModel(ModelCompat, ModelFiles, PushToHubMixin, nn.Module):
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
        self._add_heads(model, peft_config)
        convert_config_for(model, peft_config)
        options = {
            "low_cpu_mem_usage": low_cpu_mem_usage,
            "autocast_adapter_dtype": autocast_adapter_dtype,
            **kwargs,
        }
        configs = {adapter_name: peft_config}
        if peft_config.is_prompt_learning:
            tuner = PromptTuner(model, configs, adapter_name, **options, task=self._task)
            if type(self).get_prompt is not PeftModel.get_prompt:
                tuner.prompts.replaced = self.get_prompt
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

    def _add_heads(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Let the task's heads be trained whole."""
        if self._heads and hasattr(peft_config, "modules_to_save"):
            own = list(peft_config.modules_to_save or ())
            peft_config.modules_to_save = own + [head for head in self._heads if head not in own]
            if not own and not any(name.rpartition(".")[2] in self._heads for name, _ in model.named_modules()):
                warnings.warn(
                    f"task_type={value_of(peft_config.task_type)!r} trains the head of the model whole, and "
                    f"{type(model).__name__} has no module called {' or '.join(map(repr, self._heads))}. Load the "
                    "model by the class for this task, name its head in modules_to_save, or choose another task_type.",
                    PeftWarning,
                )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give a task class a ``forward`` that shows which inputs it takes."""
        super().__init_subclass__(**kwargs)
        if not cls._inputs:
            return

        def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
            if len(args) > len(cls._inputs):
                raise TypeError(f"forward() takes {len(cls._inputs)} positional inputs, got {len(args)}.")
            given = dict(zip(cls._inputs, args), **kwargs)
            # What is not given is not handed on: base models differ in the inputs that they know.
            return PeftModel.forward(self, **{k: v for k, v in given.items() if v is not None or k not in cls._inputs})

        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, keyword, default=None) for name in cls._inputs]
        parameters.insert(0, inspect.Parameter("self", keyword))
        parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        forward.__doc__ = f"The base model's forward with the active adapters; {PeftModel.forward.__doc__}"
        cls.forward = forward  # type: ignore[method-assign]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        leave_out_repeats(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

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
            pass
        try:
            return getattr(self.base_model, name)
        except MeaninglessError:
            raise
        except AttributeError as error:
            raise NoSuchAttributeError(name, self, base) from error

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
        """The first active adapter, which names an entry of ``peft_config``; an empty list if there is none."""
        return self.active_adapters[0] if self.active_adapters else []

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
        return self._require_prompt().prompt(batch_size, task_ids, max_cache_len)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """What the file of an adapter has as ``prompt_embeddings``, ``[tokens, width]``, on the CPU."""
        prompts = self._require_prompt()
        operations.require_adapters(self, [adapter_name], prompts.adapter_names)
        state = {saved: tensor for saved, _, tensor in prompts.adapter_state(adapter_name)}
        return state["prompt_embeddings"].detach().cpu()

    def _require_prompt(self) -> Prompts:
        if (prompts := prompts_of(self)) is None:
            raise ValueError(f"{self.peft_type.value} adapters change weights, and have no prompt.")
        return prompts

    # --- calls ------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``adapter_names`` gives one adapter for each sample (``"__base__"`` for none), in training too.

        ``task_ids`` gives one task number for each sample, ``[batch]``, or one for all, to methods that know of tasks.

        When memory runs out, a note on the error says what a step takes and what would take less. A warning tells of a
        loss in training that depends on nothing that trains.

        Raises:
            ValueError: for unknown adapters, or a number of names or tasks that is not the number of samples.
        """
        try:
            output = self._call(self._tuner.forward, args, kwargs, keep=torch.is_grad_enabled())
        except RuntimeError as error:
            add_way_out(error, self, args, kwargs)
            raise
        if self.training:
            tell_untrained(self, output)
        return output

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
            names = list(names) or None  # of no rows, none has an adapter of its own
        elif (dividing := self._dividing()) is not None:
            args, kwargs, names = divided(dividing, self._batch(args, kwargs) or 0, args, kwargs)
            self._check_unmerged()
        if kwargs.pop("alora_offsets", None) is not None:
            warnings.warn("alora_offsets does nothing: an aLoRA finds its invocation tokens in input_ids itself.")
        tasks = kwargs.pop("task_ids", None)
        context = context_of(self.get_base_model())
        context.begin()
        if names is None and tasks is None and context.adapter_names is None and context.task_ids is None:
            return function(*args, **kwargs)
        if tasks is not None:
            tasks = torch.as_tensor(tasks).reshape(-1)
            if len(tasks) != 1:  # one stands for the batch
                self._check_length("task_ids", len(tasks), args, kwargs)
        with context.told(names, tasks, keep), nullcontext() if names is None else without_fast_path():
            return function(*args, **kwargs)  # the fast path knows one weight for all rows

    def _check_rows(self, names: Sequence[str], args: tuple, kwargs: dict) -> None:
        known = [*self.peft_config, BASE]
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ValueError(f"adapter_names has unknown adapters: {unknown}. There are {known}.")
        self._check_length("adapter_names", len(names), args, kwargs)
        self._check_no_division(names)
        self._check_unmerged()
        base = self.get_base_model()
        if record := biases_of(base):
            record.check_rows({name: behind(base, [name]) for name in names})

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
    @surveyed()
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
        self._add_heads(self.get_base_model(), peft_config)
        convert_config_for(self.get_base_model(), peft_config)
        self.peft_config[adapter_name] = peft_config
        try:
            self._tuner.inject_adapter(self.get_base_model(), adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        note_base(peft_config, self.get_base_model())

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

    @classmethod
    def _class_for(cls, config: PeftConfig) -> type[PeftModel]:
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", cls) if cls is PeftModel else cls


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
        chunked = self.__dict__.get("chunked_loss", False) and self.training if chunked is None else chunked
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


also_known(__name__)

"""How much memory a training step takes: weights + gradients + optimizer states + what autograd keeps.

Nothing is guessed from a formula of an architecture: the model's own forward runs on the meta device, where tensors
have a shape and a dtype and no memory, and the tensors that autograd keeps there are counted.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from peft.core.base.kinds import kind_of
from peft.core.base.storage import hooks_of, storage_of, tensors_in, without_hooks
from peft.core.model.gradient_checkpointing import is_switched_on
from peft.core.model.walk import Site, embeddings_of, walk
from peft.tools.architecture import build
from peft.tools.status import count_parameters
from peft.utils.error import nearest


OPTIMIZERS = {"adamw": 2.0, "adamw_8bit": 0.5, "momentum": 1.0, "sgd": 0.0}
"""Optimizer -> how many times the bytes of the (32-bit) trained parameters its states take."""

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_BLOCK_OF_4_BITS = 64  # entries that share a 4-byte scale in a 4-bit weight


@dataclass(frozen=True)
class MemoryEstimate:
    """What one training step needs, in bytes; ``str`` gives a table.

    Attributes:
        weights: parameters and buffers of the model, adapter included, each as it is stored.
        gradients: of the trained parameters.
        optimizer: states of the optimizer.
        activations: the most that autograd keeps at once between forward and backward, the inputs included.
        trained, parameters: how many parameters train, and how many there are.
        batch_size, sequence_length: of the batch; None where example inputs were given.
        gradient_checkpointing: whether blocks keep their inputs alone and are computed again.
        unit: of the weights, those of the largest transformer layer, or of what is outside of all.
        gathered: weights that a process has whole for the time of a layer, beside its own parts (:meth:`spread`).
        host: what the CPU holds instead of the device.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    trained: int
    parameters: int
    batch_size: int | None = None
    sequence_length: int | None = None
    gradient_checkpointing: bool = False
    unit: int = 0
    gathered: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """The sum on the device. Not in it: the library's context, fragments, and buffers of single operations."""
        return self.weights + self.gathered + self.gradients + self.optimizer + self.activations

    def spread(
        self, shards: int = 1, *, stage: int = 3, tensor_parallel: int = 1, units: int = 2, offload: bool = False
    ) -> MemoryEstimate:
        """What each process needs if several share the work; ``self`` is for one of them with its own batch.

        Args:
            shards: processes among which FSDP, or ZeRO, splits. stage: what it splits: 1 the optimizer's states, 2 the
                gradients too, 3 the weights too, as FSDP does.
            tensor_parallel: processes that compute a layer together. All base weights are taken to be split;
                adapters, and activations, are whole in each.
            units: layers that are whole at once: the one that computes, and the next one, which is fetched.
            offload: the CPU holds what is split of weights and optimizer states.

        Raises:
            ValueError: for a number below 1, or an unknown stage.

        Example::

            print(peft.estimate_memory(config, lora, bits=4).spread(8))
        """
        if min(shards, tensor_parallel) < 1 or stage not in (1, 2, 3):
            raise ValueError(
                f"shards and tensor_parallel are at least 1, stage is 1, 2 or 3; got "
                f"{shards}, {tensor_parallel}, {stage}."
            )
        weights = -(-self.weights // (tensor_parallel * (shards if stage == 3 else 1)))
        optimizer, gradients = -(-self.optimizer // shards), self.gradients // (shards if stage >= 2 else 1)
        gathered = units * self.unit // tensor_parallel if stage == 3 and (shards > 1 or offload) else 0
        held = (weights if stage == 3 else 0) + optimizer if offload else 0
        return replace(
            self,
            weights=0 if offload and stage == 3 else weights,
            gathered=gathered,
            gradients=gradients,
            optimizer=0 if offload else optimizer,
            host=held,
        )

    def __str__(self) -> str:
        batch = f"batch of {self.batch_size} x {self.sequence_length}" if self.batch_size else "the inputs given"
        rows = {
            "weights": (self.weights, f"{self.parameters:,} parameters"),
            **({"gathered": (self.gathered, "for the time of a layer")} if self.gathered else {}),
            "gradients": (self.gradients, f"{self.trained:,} trained"),
            "optimizer": (self.optimizer, ""),
            "activations": (self.activations, batch + ", checkpointed" * self.gradient_checkpointing),
            "total": (self.total, ""),
            **({"on the CPU": (self.host, "")} if self.host else {}),
        }
        return "\n".join(f"{name:<12}{readable(n):>10}  {note}".rstrip() for name, (n, note) in rows.items())


def readable(n: float) -> str:
    """Bytes with a unit: ``1.5 GB``, of powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}" if unit != "B" else f"{n:.0f} B"
        n /= 1000
    return f"{n:,.3g} TB"


def estimate_memory(
    model_or_config: Any,
    peft_config: Any = None,
    batch_size: int = 1,
    sequence_length: int = 512,
    *,
    gradient_checkpointing: bool | None = None,
    bits: int | None = None,
    optimizer: str = "adamw",
    dtype: torch.dtype | None = None,
    device: str | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> MemoryEstimate:
    """Estimate the memory of one training step, without needing it: everything is computed on the meta device.

    Of the bytes that autograd saves in a real step, the estimate of ``activations`` is within 5 %; weights, gradients
    and optimizer states are exact, those of ``bits`` within 2 %.

    Args:
        model_or_config: a model, adapted or not, which is left as it is; or a config of transformers.
        peft_config: the adapter, for a model that has none; None: what the model trains now, all of a config's model.
        batch_size, sequence_length: of the batch, in samples and tokens.
        gradient_checkpointing: whether blocks are recomputed; None: as the model has it.
        bits: 4 or 8: as if the linear layers but the head were loaded in so many bits.
        optimizer: of :data:`OPTIMIZERS`; its states have the dtype of what is trained.
        dtype: of the weights of a model made from a config; by default what the config says, else float32.
        device: type of the device that trains, "cuda" or "cpu": they keep different things of attention and dropout.
            None: the model's, and "cuda" for a config.
        inputs: keyword arguments of the model's forward, for models whose input is not token ids; only shapes and
            dtypes are read.

    Raises:
        ValueError: for an adapted model together with a ``peft_config``, for an unknown option, and for a model for
            which no inputs can be made.

    Examples:
        >>> estimate_memory(base, LoraConfig(r=4, task_type="CAUSAL_LM"), batch_size=8, sequence_length=32).trained
        512
    """
    _check_options(optimizer, bits)
    task = getattr(peft_config, "task_type", None)
    real = _unadapted(model_or_config, peft_config, task, dtype)
    model, stored = meta_copy(real), _stored(real) - sum(_saving(site, real, bits) for site in walk(real))
    if peft_config is not None:
        before, model = _stored(model), _adapted(model, peft_config)
        stored += _stored(model) - before
    checkpointing = is_switched_on(real) if gradient_checkpointing is None else gradient_checkpointing
    given = _on_meta(inputs) if inputs is not None else _inputs(model, task, batch_size, sequence_length)
    trained = [p for p in model.parameters() if p.requires_grad]
    return MemoryEstimate(
        weights=stored,
        gradients=(gradients := sum(p.nbytes for p in trained)),
        optimizer=int(OPTIMIZERS[optimizer] * gradients),
        activations=_count(model, (), given, checkpointing, device or _device_of(real)),
        trained=sum(p.numel() for p in trained),
        parameters=count_parameters(model)[1],
        **({} if inputs else {"batch_size": batch_size, "sequence_length": sequence_length}),
        gradient_checkpointing=checkpointing,
        unit=_unit(model, stored),
    )


def _unadapted(model_or_config: Any, peft_config: Any, task: str | None, dtype: torch.dtype | None) -> nn.Module:
    """The model that is meant, which has no adapters if a config of one is given."""
    model = model_or_config if isinstance(model_or_config, nn.Module) else _built(model_or_config, task, dtype)
    if peft_config is not None and hasattr(model, "peft_config"):
        raise ValueError("the model has adapters already: leave peft_config out, or give the base model.")
    return model


def _unit(model: nn.Module, stored: int) -> int:
    """Bytes of the largest block, or of what is outside of all, in the share in which the whole is stored."""
    blocks = [sum(p.nbytes for p in block.parameters()) for block in _blocks(model)]
    dense = sum(p.nbytes for p in model.parameters())
    return int(max([dense - sum(blocks), *blocks]) * min(1.0, stored / max(dense, 1)))


def _check_options(optimizer: str, bits: int | None) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer {optimizer!r}.{nearest(optimizer, OPTIMIZERS)} There are {[*OPTIMIZERS]}."
        )
    if bits not in (None, 4, 8):
        raise ValueError(f"bits should be 4, 8 or None, got {bits!r}.")


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
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) if _is_dense(p) else None
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return without_hooks(copy.deepcopy(model, {k: v for k, v in memo.items() if v is not None}))


def _is_dense(p: torch.Tensor) -> bool:
    return type(p) is nn.Parameter and p.is_floating_point()


def _built(config: Any, task: Any, dtype: torch.dtype | None) -> nn.Module:
    """The model of a transformers config, on the meta device."""
    import transformers

    if not isinstance(config, transformers.PreTrainedConfig):
        raise ValueError(f"estimate_memory needs a model or a config of transformers, got {type(config).__name__}.")
    config = copy.deepcopy(config)
    name = _AUTO_CLASSES.get(str(getattr(task, "value", task)))
    with torch.device("meta"):
        return build(config, name, dtype=dtype or getattr(config, "dtype", None) or torch.float32)


def _adapted(model: nn.Module, peft_config: Any) -> nn.Module:
    from peft.mapping_func import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the real call's business, which will say so itself
        return get_peft_model(model, copy.deepcopy(peft_config), low_cpu_mem_usage=True)


# --- bytes of weights -----------------------------------------------------------------------------------------


def _stored(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once, with what storages keep beside them."""
    own = [t for whole in (*model.parameters(), *model.buffers()) for t in tensors_in(whole)]
    for m in model.modules():
        storage = storage_of(m, "weight")
        own += storage.tensors(m, "weight") if storage.name is not None else ()
    return sum({t.untyped_storage()._cdata: t.nbytes for t in own}.values())


def _saving(site: Site, model: nn.Module, bits: int | None) -> int:
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
        elif func in _QUESTIONS and len(args) == 1 and not kwargs and args[0].is_meta:
            return torch.tensor(_QUESTIONS[func])
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


def _count(model: nn.Module, args: tuple, kwargs: dict[str, Any], checkpointing: bool, device: str) -> int:
    """The most bytes that autograd keeps at once in a step of this model, which is on the meta device."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False  # the blocks are told apart here
    blocks = _blocks(model)
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
    with torch.enable_grad(), _KeepsAs(device), saved_tensors_hooks(ledger.note, lambda t: t), _quiet():
        model(*args, **kwargs)
    outside = ledger.in_block.pop(None, 0)
    return outside + ledger.into_blocks + max(ledger.in_block.values(), default=0)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that gradient checkpointing recomputes."""
    return [m for m in model.modules() if any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(m).__mro__)]


# --- inputs ---------------------------------------------------------------------------------------------------


def _inputs(model: nn.Module, task: Any, batch: int, length: int) -> dict[str, Any]:
    """Inputs and labels of a transformer, on the meta device."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, main = getattr(base, "config", None), getattr(base, "main_input_name", None)
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    if config is None or main not in ("input_ids", "pixel_values"):
        raise ValueError(
            f"the inputs of {type(base).__name__} cannot be guessed. Give an example batch: estimate_memory(..., "
            "inputs={'x': torch.empty(8, 16, device='meta')})."
        )
    given: dict[str, Any] = {main: ids}
    if main == "pixel_values":
        size = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
        given = {main: torch.zeros(batch, config.num_channels, *size, device="meta", dtype=_dtype(base))}
    name = type(base).__name__
    if config.is_encoder_decoder and not name.endswith("ForConditionalGeneration"):
        given["decoder_input_ids"] = ids
    one = torch.zeros(batch, dtype=torch.long, device="meta")
    if "SequenceClassification" in name or "ImageClassification" in name:
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
        given["labels"] = one
    elif "QuestionAnswering" in name:
        given.update(start_positions=one, end_positions=one)
    elif any(part in name for part in ("LMHead", "ForCausalLM", "ConditionalGeneration", "TokenClass", "MaskedLM")):
        given["labels"] = ids
    return given


def _device_of(model: nn.Module) -> str:
    found = next((p.device.type for p in model.parameters()), "meta")
    return "cuda" if found == "meta" else found


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _on_meta(value: Any) -> Any:
    """The same with tensors of the meta device."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {name: _on_meta(part) for name, part in value.items()}
    return type(value)(_on_meta(part) for part in value) if type(value) in (list, tuple) else value


# --- out of memory --------------------------------------------------------------------------------------------

_EXPLAINING: ContextVar[bool] = ContextVar("_EXPLAINING", default=False)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch has a class for accelerators, and a message for the CPU."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def explain_out_of_memory(model: nn.Module) -> Iterator[None]:
    """In this context, errors for want of memory get a note: what a step takes, by estimate, and what would take less.

    The forward of an adapted model explains its own errors. This is for what it does not see: backward, optimizer, or
    a training as a whole::

        with peft.explain_out_of_memory(model):
            trainer.train()

    The figures are those of the last forward of ``model`` in the context. The errors stay what they are otherwise.

    Examples:
        >>> with explain_out_of_memory(model):
        ...     loss = model(**batch).loss
    """
    given: list[Any] = [(), {}]

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            given[:] = _on_meta(args), _on_meta(kwargs)  # their shapes, so that no batch is kept

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    except RuntimeError as error:
        add_way_out(error, model, *given)
        raise
    finally:
        handle.remove()


def add_way_out(error: Exception, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Add the note of :func:`explain_out_of_memory` to the error of a forward with these arguments, or after it.

    Errors of other kinds, and those that have the note, stay as they are. It never raises, and needs no memory of the
    device that has none left.
    """
    if not _is_out_of_memory(error) or _EXPLAINING.get() or hasattr(error, "_has_way_out"):
        return  # the estimate itself is a forward
    token = _EXPLAINING.set(True)
    try:
        note = _way_out(model, args, kwargs)
    except Exception as failure:
        reason = str(failure).strip().splitlines()[:1]
        note = f"{_WAYS_OUT} (No figures: {type(failure).__name__}{': ' + reason[0] if reason else ''})"
    finally:
        _EXPLAINING.reset(token)
    error._has_way_out = True  # type: ignore[attr-defined]
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        error.args = (f"{error}\n{note}", *error.args[1:])


_WAYS_OUT = (
    "Out of memory. What helps: a smaller batch (with gradient_accumulation_steps to make up for it), gradient "
    "checkpointing (model.gradient_checkpointing_enable()), a base loaded in 4 bits "
    "(quantization_config=BitsAndBytesConfig(load_in_4bit=True))."
)


def _way_out(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str:
    device, copied = _device_of(model), meta_copy(model)
    args, kwargs = _on_meta(args), _on_meta(kwargs)
    kwargs.pop("attention_mask", None)  # its values, which the model may look at, are of no account here
    on = is_switched_on(model)
    batch = next((t.shape[0] for t in [*args, *kwargs.values()] if isinstance(t, torch.Tensor) and t.dim()), 1)
    now = _count(copied, args, kwargs, on, device)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    lines = [
        f"Out of memory with a batch of {batch}. A training step is estimated at {readable(_stored(model))} for "
        f"weights, {readable(trained)} for gradients, {readable(OPTIMIZERS['adamw'] * trained)} for AdamW's states "
        f"and {readable(now)} for activations (peft.estimate_memory). What helps:"
    ]
    if batch > 1:
        half, (less, fewer) = batch // 2, _first(args, kwargs, batch, batch // 2)
        left = readable(_count(meta_copy(model), less, fewer, on, device))
        lines.append(f"- a smaller batch: {half} takes {left} of activations; gradient_accumulation_steps makes up")
    if not on and _blocks(model):
        left = readable(_count(meta_copy(model), args, kwargs, True, device))
        lines.append(f"- gradient checkpointing, model.gradient_checkpointing_enable(): {left} of activations")
    saved = sum(_saving(site, model, 4) for site in walk(model))
    if saved > 0:
        left = readable(_stored(model) - saved)
        lines.append(
            f"- a base loaded in 4 bits, quantization_config=BitsAndBytesConfig(load_in_4bit=True): {left} of weights"
        )
    return "\n".join(lines)


def _first(args: tuple, kwargs: dict[str, Any], batch: int, count: int) -> tuple[tuple, dict[str, Any]]:
    """Only the first samples of the tensors that have one entry for each sample."""

    def cut(value: Any) -> Any:
        sliced = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == batch
        return value[:count] if sliced else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}

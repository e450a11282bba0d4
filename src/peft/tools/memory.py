"""How much memory a training step takes: weights + gradients + optimizer states + what autograd keeps.

Nothing is guessed from a formula of an architecture: the model's own forward runs on the meta device, where tensors
have a shape and a dtype and no memory, and the tensors that autograd keeps there are counted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from peft.core.model.gradient_checkpointing import is_switched_on
from peft.core.model.walk import walk
from peft.errors import nearest
from peft.mapping_func import get_peft_model
from peft.options import value_of
from peft.tools.architecture import AUTO_CLASSES, build
from peft.tools.footprint import (
    OPTIMIZERS,
    activation_bytes,
    blocks_of,
    bytes_saved,
    device_of,
    meta_copy,
    on_meta,
    quiet,
    readable,
    stored_bytes,
)
from peft.tools.status import count_parameters


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
        optimizer: of :data:`peft.tools.footprint.OPTIMIZERS`; its states have the dtype of what is trained.
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
    model, stored = meta_copy(real), stored_bytes(real) - sum(bytes_saved(site, real, bits) for site in walk(real))
    if peft_config is not None:
        before, model = stored_bytes(model), _adapted(model, peft_config)
        stored += stored_bytes(model) - before
    checkpointing = is_switched_on(real) if gradient_checkpointing is None else gradient_checkpointing
    given = on_meta(inputs) if inputs is not None else _inputs(model, task, batch_size, sequence_length)
    trained = [p for p in model.parameters() if p.requires_grad]
    return MemoryEstimate(
        weights=stored,
        gradients=(gradients := sum(p.nbytes for p in trained)),
        optimizer=int(OPTIMIZERS[optimizer] * gradients),
        activations=activation_bytes(model, (), given, checkpointing, device or device_of(real)),
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
    blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(model)]
    dense = sum(p.nbytes for p in model.parameters())
    # What is quantised takes less than its dense form, in every block alike.
    return int(max([dense - sum(blocks), *blocks]) * min(1.0, stored / max(dense, 1)))


def _check_options(optimizer: str, bits: int | None) -> None:
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer {optimizer!r}.{nearest(optimizer, OPTIMIZERS)} There are {[*OPTIMIZERS]}."
        )
    if bits not in (None, 4, 8):
        raise ValueError(f"bits should be 4, 8 or None, got {bits!r}.")


def _built(config: Any, task: Any, dtype: torch.dtype | None) -> nn.Module:
    """The model of a transformers config, on the meta device."""
    import transformers

    if not isinstance(config, transformers.PreTrainedConfig):
        raise ValueError(f"estimate_memory needs a model or a config of transformers, got {type(config).__name__}.")
    config = copy.deepcopy(config)
    name = AUTO_CLASSES.get(str(value_of(task)))
    with torch.device("meta"):
        return build(config, name, dtype=dtype or getattr(config, "dtype", None) or torch.float32)


def _adapted(model: nn.Module, peft_config: Any) -> nn.Module:
    with quiet():
        return get_peft_model(model, copy.deepcopy(peft_config), low_cpu_mem_usage=True)


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
    if config.is_encoder_decoder and not name.endswith("ForConditionalGeneration"):  # these make them of the labels
        given["decoder_input_ids"] = ids
    one = torch.zeros(batch, dtype=torch.long, device="meta")
    if "SequenceClassification" in name or "ImageClassification" in name:
        # A classifier looks for the last token by it.
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
        given["labels"] = one
    elif "QuestionAnswering" in name:
        given.update(start_positions=one, end_positions=one)
    elif any(part in name for part in ("LMHead", "ForCausalLM", "ConditionalGeneration", "TokenClass", "MaskedLM")):
        given["labels"] = ids
    return given


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

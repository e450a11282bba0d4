"""X-LoRA on a whole model: loads the experts, runs the model twice, and lets the context carry the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from peft.core.adapter import Adapter
from peft.core.files.io import PREFIX
from peft.core.model import operations
from peft.core.model.record import context_of
from peft.core.model.registry import define_tuner
from peft.core.model.sequence import length_of
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import layers_of
from peft.tuners.xlora.config import XLoraConfig
from peft.tuners.xlora.experts import check, load_experts
from peft.tuners.xlora.layer import Expert, Routing, XLoraClassifier, XLoraLayer
from peft.tuners.xlora.scalings import Scalings


class XLoraTuner(Scalings, BaseTuner):
    """Weighs LoRA adapters, the experts, by what a classifier makes of a first pass of the model.

    Args:
        model: the base model, which has to give ``hidden_states``; changed in place.
        config: the config, or a dict with it under ``adapter_name``.
        adapter_name: name of the router; the experts have those of the config.
        torch_device: where to read the experts' files.
        autocast_adapter_dtype: hold 16-bit experts, and the classifier, in float32.

    Attributes:
        internal_xlora_classifier: hidden states -> weights.

    Raises:
        ValueError: if there are no experts, they are no LoRA, or they do not fit; the model is then unchanged.
    """

    layer_cls = XLoraLayer

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, XLoraConfig] | XLoraConfig,
        adapter_name: str,
        torch_device: str | None = None,
        ephemeral_gpu_offload: bool = False,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)  # BaseTuner's would give the layers an adapter of the router's
        self.peft_config = dict(config) if isinstance(config, dict) else {adapter_name: config}
        self.router, self.active_adapter = adapter_name, adapter_name
        self.model = model
        self.start_log()
        own = self.config
        check(own, model)
        load_experts(model, own, torch_device, autocast_adapter_dtype)
        self.experts = list(own.adapters or ())
        layers = [layer for _, layer in layers_of(model) if isinstance(layer, XLoraLayer)]
        routing = Routing(adapter_name, own, {name: i for i, name in enumerate(self.experts)})
        for i, layer in enumerate(layers):
            layer.routing, layer.number = routing, i
        self.internal_xlora_classifier = XLoraClassifier(own, len(layers), len(self.experts))
        like = next(p for p in model.parameters() if p.is_floating_point())
        dtype = like.dtype if not autocast_adapter_dtype and like.dtype.itemsize > 1 else torch.float32
        self.internal_xlora_classifier.to(like.device, dtype)
        self.hook = model.register_forward_pre_hook(self._weigh, with_kwargs=True)
        model.peft_config = self.peft_config  # in place of the experts' configs
        self.set_adapter(adapter_name, inference_mode=own.inference_mode)

    # --- calls ------------------------------------------------------------------------------------------------
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate``, which reads the whole sequence anew for each token."""
        if kwargs.get("use_cache"):
            raise ValueError("X-LoRA weighs all tokens anew at each step, so use_cache has to be False.")
        return self.model.generate(*args, **{**kwargs, "use_cache": False})

    def _weigh(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook of the model: find the weights by a first pass, and leave them in the context for the call itself."""
        context = context_of(self.model)
        if context.looks_ahead:
            return
        context.begin()
        names = context.adapter_names
        context.set_adapter_names(None)  # the rows of the base model get the weight 0 instead
        context.scalings = None  # of an earlier call; without any, experts are silent
        if next(layer for _, layer in layers_of(self.model)).disable_adapters:
            return
        if kwargs.get("past_key_values") is not None and length_of(kwargs["past_key_values"]):
            raise ValueError("X-LoRA weighs all tokens of a sequence; call it without past_key_values.")
        scalings = self.internal_xlora_classifier(self._hidden(args, kwargs))
        self.latest = scalings
        if self.logging:
            self.log.append(scalings)
        if names is not None:
            chosen = torch.tensor([name == self.router for name in names], device=scalings.device)
            scalings = scalings * chosen.repeat_interleave(len(scalings) // len(names)).view(-1, 1, 1, 1)
        context.scalings = scalings

    @torch.no_grad()
    def _hidden(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The last hidden state of the first pass, ``[batch, tokens, hidden_size]``."""
        context, (layers, experts) = context_of(self.model), self._size()
        value = 1 / experts if self.config.scaling_pass_value is None else self.config.scaling_pass_value
        first = {k: v for k, v in kwargs.items() if k != "labels"} | {  # no loss of the first pass is needed
            "output_hidden_states": True,
            "return_dict": True,
        }
        if value:
            given = next(v for v in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if v is not None)
            context.scalings = torch.full((*given.shape[:2], layers, experts), float(value), device=given.device)
        context.looks_ahead = True
        try:
            states = getattr(self.model(*args, **first), "hidden_states", None)
        finally:
            context.looks_ahead = False
        if not states:
            raise ValueError(f"X-LoRA reads hidden_states, which {type(self.model).__name__} does not give.")
        return states[-1]

    def _size(self) -> tuple[int, int]:
        return self.internal_xlora_classifier.n_layers, self.internal_xlora_classifier.n_classes

    # --- life -------------------------------------------------------------------------------------------------
    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"the model has the X-LoRA router {self.router!r}, and can have one only; name all experts in its config."
        )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make the router active: the one adapter that there is."""
        self._require(operations.names_of(adapter_name))
        operations.set_adapter(self.model, self.experts, inference_mode=True)
        self.set_requires_grad(adapter_name, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Choose whether the classifier trains, and the experts where the config says that they do."""
        self._require(operations.names_of(adapter_names))
        self.internal_xlora_classifier.requires_grad_(requires_grad)
        operations.set_requires_grad(self.model, self.experts, requires_grad and self.config.use_trainable_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Refused: the classifier's outputs belong to its experts, and the router is all that there is."""
        raise ValueError(
            f"{adapter_name!r} cannot be deleted: the classifier has an output for each of {self.experts}. Call "
            "unload() for the plain model, or make a new router with other experts."
        )

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        if name == self.router:
            for part, tensor in self.internal_xlora_classifier.named_parameters():
                path = f"base_model.internal_xlora_classifier.{part}"
                yield path, path, tensor
        if name == self.router and self.config.use_trainable_adapters:
            for path, adapter in self._placed():
                for _, memory, tensor in Adapter.state(adapter):  # an expert's own is nothing beneath a router
                    yield f"{PREFIX}{path}.{memory}", f"{PREFIX}{path}.{memory}", tensor

    def _placed(self) -> Iterator[tuple[str, Adapter]]:
        """All experts, each with the name of its layer."""
        for path, layer in layers_of(self.model):
            if isinstance(layer, XLoraLayer):
                yield from ((path, adapter) for adapter in layer.adapters.values())

    def _require(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name != self.router]:
            raise ValueError(f"there is no adapter {unknown[0]!r}; the router is {self.router!r}.")

    def _leave(self, plain: nn.Module) -> nn.Module:
        self.hook.remove()
        return super()._leave(plain)


XLoraModel = define_tuner(
    Expert, XLoraConfig, prefix="xlora_", mixed=False, base=XLoraTuner, layer=XLoraLayer, __module__=__name__
)

"""What others call on the tuners of single methods; each class is a mixin of the tuner that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from peft.compat.asked import Asked, is_theirs
from peft.compat.parameters import _LoraParameterProxy
from peft.core.combine.combined import checked_weights, combined_config
from peft.core.combine.ways import Combination
from peft.core.files.entries import anatomy, entries
from peft.core.files.state_dict import get_peft_model_state_dict
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.context import Context
from peft.core.model.record import context_of
from peft.core.model.walk import layers_of, wrappers_of
from peft.meanwhile import having
from peft.tuners.adalora_utils import kept_of


class LoraCompat:
    """Of ``LoraModel``."""

    def _check_add_weighted_adapter(
        self, adapters: list[str], combination_type: Any, svd_rank: int | None
    ) -> tuple[str, int, Any]:
        """The way, the rank and the targets of a weighted sum. Those who average weights themselves ask for them."""
        tuner: Any = self
        checked_weights(tuner, adapters, [1.0] * len(adapters))
        combination = Combination(combination_type, density=1.0)
        tuner._check_combination(adapters, svd_rank, None)
        rank = tuner._combined_rank(adapters, combination, svd_rank)
        return combination.name, rank, combined_config(tuner, adapters).target_modules

    def subtract_mutated_init(
        self, output_state_dict: dict[str, torch.Tensor], adapter_name: str, kwargs: Any = None
    ) -> dict[str, torch.Tensor]:
        """A trained adapter's tensors less its start's, as plain LoRA of twice the rank: A' = [A; A0], B' = [B, -B0].

        A start such as PiSSA takes B0 A0 out of the base's weight, so B A - B0 A0 is what the base itself lacks.

        Args:
            output_state_dict: the trained tensors, by their names in files.
            adapter_name: the adapter of this model that holds the start.
        """
        model: Any = self
        start = {entry.saved: entry.tensor.detach() for entry in entries(model, adapter_name)}
        return beside_start(model, adapter_name, output_state_dict, start)


def beside_start(
    model: nn.Module, adapter_name: str, trained: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A' = [A; A0] and B' = [B, -B0] of an adapter of LoRA, by the names of its tensors in files.

    Raises:
        ValueError: if the start lacks a tensor, or has one of another shape.
    """
    axes = {}
    for _, layer in layers_of(anatomy(model)[0]):
        adapter = layer.adapters.get(adapter_name)
        for name, _, held in adapter.held() if adapter is not None else ():
            if name in AXES:
                axes[id(getattr(held, "weight", held))] = AXES[name]
    found = dict(trained)
    for entry in entries(model, adapter_name):
        axis = axes.get(id(entry.tensor))
        if axis is not None:
            now, then = trained[entry.saved], start.get(entry.saved)
            if then is None or then.shape != now.shape:
                held = "no such tensor" if then is None else f"one of shape {tuple(then.shape)}"
                raise ValueError(
                    f"{entry.saved} has the shape {tuple(now.shape)}, and the adapter as it started has {held}: it "
                    "belongs to another adapter. Save the start with save_pretrained before training."
                )
            found[entry.saved] = torch.cat([now, -then.to(now) if axis else then.to(now)], axis)
    return found


class LoraLayerCompat:
    """Of ``LoraLayer``: starts by the names of their methods, for layers of third parties.

    Attributes:
        says_own_delta: what an adapter adds to the weight is what it says itself, whatever a third party's class says.
    """

    says_own_delta: bool = False
    reset_lora_parameters: Any
    get_base_layer: Any
    adapters: Any
    parameter_name: str

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the base weight, in the layout in which the layer stores it.

        Raises:
            ValueError: if no weight equals the adapter.
        """
        with having([self], says_own_delta=True):
            return super().get_delta_weight(adapter)  # type: ignore[misc]

    def pissa_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Start as PiSSA: "pissa" or "pissa_niter_<n>"."""
        self.reset_lora_parameters(adapter_name, init_lora_weights)

    def olora_init(self, adapter_name: str) -> None:
        """Start as OLoRA."""
        self.reset_lora_parameters(adapter_name, "olora")

    def corda_init(self, adapter_name: str, init_lora_weights: str) -> None:
        """Start as CorDA, from what ``preprocess_corda`` has left on the base layer."""
        self.reset_lora_parameters(adapter_name, init_lora_weights)

    def lora_ga_init(self, adapter_name: str, lora_ga_config: Any) -> None:
        """Start as LoRA-GA, from what ``preprocess_loraga`` has left on the base layer."""
        self.reset_lora_parameters(adapter_name, "lora_ga", lora_ga_config=lora_ga_config)

    def loftq_init(self, adapter_name: str, config: Any) -> None:
        """Start as LoftQ, as ``config.loftq_config`` says."""
        self.reset_lora_parameters(adapter_name, "loftq", loftq_config=config.loftq_config)

    def mica_init(self, adapter_name: str) -> None:
        """Start an adapter that is one of MiCA's anew."""
        self.reset_lora_parameters(adapter_name, "mica")

    def _embed(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        input_fn: Callable[[tuple[torch.Tensor]], torch.Tensor] | None = None,
        output_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Rows ``input`` of a table ``[entries, r]``, looked up as an adapted embedding's own are.

        Layers of third parties take it over (optimum-neuron). ``input_fn`` and ``output_fn`` change what goes in, in
        a tuple, and what comes out.
        """
        base: Any = self.get_base_layer()
        found = F.embedding(
            input if input_fn is None else input_fn((input,)),
            weight,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )
        return found if output_fn is None else output_fn(found)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """An adapted parameter reads as changed by these adapters, in whole, while this lasts; axolotl wraps it."""
        deltas = [self.get_delta_weight(name) for name in active_adapters if name in self.adapters]
        if not deltas:
            yield
            return
        base, name = self.get_base_layer(), self.parameter_name
        register_parametrization(base, name, _LoraParameterProxy(sum(deltas[1:], deltas[0])))
        try:
            yield
        finally:
            chain: Any = base.parametrizations[name]
            if len(chain) == 1:
                remove_parametrizations(base, name, leave_parametrized=False)
            else:  # those of somebody else stay
                del chain[-1]

    def orthogonal_init(self, adapter_name: str) -> None:
        """Start from one orthogonal matrix for both factors."""
        self.reset_lora_parameters(adapter_name, "orthogonal")


class LoraVariantCompat:
    """Of LoRA's adapters: copies of 0.21's forward find those that are more than plain in ``layer.lora_variant``."""

    output: Any
    layer: Any
    name: str
    kind: Any
    base: nn.Module

    def forward(
        self, module: nn.Module, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The layer's output with this adapter; ``result`` is the output without it."""
        return self.output(x, result, result)

    def given_delta(self) -> torch.Tensor | None:
        """What a third party's ``get_delta_weight`` gives, ``[out, in, *kernel]``: merging follows it.

        None where there is none, and while it asks the one here.
        """
        if not is_theirs(type(self.layer).get_delta_weight) or self.layer.says_own_delta:
            return None
        with having([self.layer], says_own_delta=True):
            return self.kind.orient(self.layer.get_delta_weight(self.name), self.base)


class AdaLoraCompat:
    """Of ``AdaLoraModel``."""

    ranked: Any

    def resize_modules_by_rank_pattern(self, rank_pattern: dict[str, Any], adapter_name: str) -> None:
        """Take the ranks that a pattern (``"<module>.lora_E"`` -> mask, or how many) leaves out of an adapter."""
        for adapter, index in self._resized(rank_pattern, adapter_name):
            for name in adapter.parts:
                old = getattr(adapter, name)
                new = nn.Parameter(old.detach().index_select(AXES[name], index.to(old.device)))
                setattr(adapter, name, new.requires_grad_(old.requires_grad))
            adapter.left = None

    def resize_state_dict_by_rank_pattern(
        self, rank_pattern: dict[str, Any], state_dict: dict[str, torch.Tensor], adapter_name: str
    ) -> dict[str, torch.Tensor]:
        """The same for the adapter's tensors in a state dict, under their names in files or in memory."""
        cut = {}
        for adapter, index in self._resized(rank_pattern, adapter_name):
            cut.update({id(tensor): (AXES[name], index) for name, tensor in adapter.tensors()})
        model: Any = self
        found = dict(state_dict)
        for entry in entries(model, adapter_name):
            if id(entry.tensor) in cut:
                axis, index = cut[id(entry.tensor)]
                for name in entry.names():
                    if name in found:
                        found[name] = found[name].index_select(axis, index.to(found[name].device))
        return found

    def _resized(self, rank_pattern: dict[str, Any], adapter_name: str) -> Iterator[tuple[Any, torch.Tensor]]:
        """The adapters, at their layers, of which a pattern keeps some ranks, and the indices of those."""
        for key, adapter in self.ranked(adapter_name).items():
            if (index := kept_of(rank_pattern, key)) is not None:
                yield adapter, index


AXES = {"lora_A": 0, "lora_E": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
"""The axis of each of LoRA's and AdaLoRA's tensors along which the ranks stand."""


class VBLoRACompat:
    """Of ``VBLoRAModel``."""

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """How many numbers a file of the adapter holds: VB-LoRA's, in units of 32 bits, and all others."""
        model: Any = self
        state = get_peft_model_state_dict(model, adapter_name=adapter)
        total = sum(t.numel() * t.itemsize for t in state.values())
        beside = [
            tensor
            for _, wrapper in wrappers_of(anatomy(model)[0])
            if not isinstance(wrapper, BaseTunerLayer) and adapter in wrapper
            for _, _, tensor in wrapper.adapter_state(adapter)
        ]
        own = total - sum(t.numel() * t.itemsize for t in beside)
        return own // 4, sum(t.numel() for t in beside)

    def print_savable_parameters(self) -> None:
        """Print what :meth:`get_nb_savable_parameters` counts."""
        own, others = self.get_nb_savable_parameters()
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}"
        )


class LycorisCompat:
    """Of ``LoHaModel`` and ``LoKrModel``."""

    layer_cls: Any

    @Asked
    def layers_mapping(self) -> dict[type[nn.Module], type[nn.Module]]:
        """The class of an adapted layer by that of the base layer."""
        names = {nn.Conv2d: "Conv2d", nn.Conv1d: "Conv1d", nn.Linear: "Linear"}
        return {base: self.layer_cls.by_name[name] for base, name in names.items()}


class PolyCompat:
    """Of ``PolyModel``."""

    model: Any

    def forward(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        """The base model's ``forward``, with the task of each row."""
        return self._with_tasks(super().forward, task_ids, args, kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        """The base model's ``generate``, with the task of each row."""
        return self._with_tasks(self.model.generate, task_ids, args, kwargs)

    def _with_tasks(self, function: Any, task_ids: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if task_ids is None:
            return function(*args, **kwargs)
        context: Context = context_of(self.model)
        context.begin()
        with context.told(context.adapter_names, torch.as_tensor(task_ids).reshape(-1), torch.is_grad_enabled()):
            return function(*args, **kwargs)


class AdaptionPromptCompat:
    """Of ``AdaptionPromptModel``."""

    model: Any
    peft_config: dict[str, Any]
    inject_adapter: Any
    set_adapter: Any

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Give the model a further adapter, and make it the active one."""
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        self.set_adapter(adapter_name)

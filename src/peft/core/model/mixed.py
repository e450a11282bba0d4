"""Several methods in one model, and one adapter that is of several: layers of different methods nest around the same
base layer, and virtual tokens stand beside them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from peft.core.combine.combined import checked_weights
from peft.core.layer.classes import is_own
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.switch import Switch
from peft.core.layer.weight import layers_inside
from peft.core.model import operations
from peft.core.model.beside import add_auxiliary
from peft.core.model.manager import check_adapter_name
from peft.core.model.record import behind
from peft.core.model.replacing import replacing
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import layers_of
from peft.core.prompts import NOTHING_TO_MERGE, PLAIN, PromptTuner, Task
from peft.errors import CONVERSION, ConfigError, some
from peft.peft_types import PEFT_TYPE_TO_TUNER_MAPPING


class MembersOf(MutableMapping):
    """The configs of all adapters as one method's tuner sees them: of an adapter of several methods, that method's.

    Args:
        configs: adapter name -> config. method: the method; None for all that train virtual tokens.
    """

    def __init__(self, configs: dict[str, Any], method: str | None) -> None:
        self.configs, self.method = configs, method

    def __getitem__(self, name: str) -> Any:
        config = self.configs[name]
        return next((member for member in config.members if self._is_mine(member)), config)

    def _is_mine(self, member: Any) -> bool:
        return member.is_prompt_learning if self.method is None else member.peft_type == self.method

    def __setitem__(self, name: str, config: Any) -> None:
        self.configs[name] = config

    def __delitem__(self, name: str) -> None:
        del self.configs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.configs)

    def __len__(self) -> int:
        return len(self.configs)


class MixedModel(BaseTuner):
    """A tuner whose adapters may each be of another method, or of several at once.

    An adapter's ``config.members`` are one config for each of its methods, by default the config itself. Each is
    injected by its method's own tuner, under the adapter's name: layers of every method know their part of an adapter
    by that name, and virtual tokens theirs. So the rest of an adapter's life is the same for all methods.

    Nested layers act from the inside out: an outer adapter changes what the inner ones give.

    Attributes:
        task: what virtual tokens do to the inputs of the model's task.
        prompt_encoder: adapter name -> its virtual tokens, once there are some.
    """

    layer_cls: ClassVar[type[BaseTunerLayer]] = BaseTunerLayer
    mixes: ClassVar[bool] = True
    task: Task = PLAIN

    def take_task(self, task: Task) -> None:
        self.task = task
        if self.prompts is not None:
            self.prompts.calls.task = task

    @property
    def prompts(self) -> PromptTuner | None:
        """The manager of the adapters' virtual tokens; None while there are none."""
        return self.__dict__.get("_prompts")

    # --- calls ------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.model if self.prompts is None else self.prompts.forward
        return self.finished(run(*args, **kwargs))

    @property
    def generate(self) -> Any:
        """The base model's ``generate``, with the virtual tokens of the call."""
        return (self.model if self.prompts is None else self.prompts).generate

    def adds_to_loss(self) -> bool:
        parts = self.__dict__.get("_parts", {}).values()
        return super().adds_to_loss() or any(part.adds_to_loss() for part in parts)

    # --- life of the adapters ---------------------------------------------------------------------------------
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        config = self.peft_config[adapter_name]
        check_adapter_name(adapter_name)
        if not config.members:
            raise ConfigError(f"{type(config).__name__} has no parts: give it the config of each.")
        with replacing(model, adapter_name):
            self._forget_prompt(adapter_name)
            try:
                for member in config.members:
                    with _naming(config, member):
                        part = self._part(member)
                        if isinstance(part, PromptTuner):
                            part.place(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
                            continue
                        part.place(model, adapter_name, low_cpu_mem_usage, state_dict)
                        for attribute in part.layer_cls.adapter_cls.common:
                            setattr(self, attribute, getattr(part, attribute))
                if config not in config.members:
                    add_auxiliary(model, adapter_name, config)
            except BaseException:
                self._forget_prompt(adapter_name)
                self._take_back(model, adapter_name)
                raise
        self.settle(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    def beside(self) -> Sequence[Switch]:
        return () if self.prompts is None else (self.prompts.prompts,)

    def _forget_prompt(self, adapter_name: str) -> None:
        if self.prompts is not None:
            self.prompts.prompts.delete_adapter(adapter_name)

    def forget(self, adapter_name: str) -> None:
        """Drop what the adapter's methods keep for it."""
        for member in self.peft_config[adapter_name].members:
            if not isinstance(part := self._part(member), PromptTuner):
                part.forget(adapter_name)

    # --- weights ----------------------------------------------------------------------------------------------
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters (default: the active ones) into the base weights; :meth:`unmerge_adapter` takes them out.

        Of an adapter of several methods, what no weight equals goes on acting beside the merged rest, which is told.

        Raises:
            ValueError: if an adapter cannot be merged, or nothing of it; nothing is merged then.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        operations.require_adapters(self.model, names, self.peft_config)
        several = [name for name in names if len(self.peft_config[name].members) > 1]
        stays = {name: reasons for name in several if (reasons := self._unmergeable(name))}
        for name, reasons in stays.items():
            if len(reasons) == len(self.peft_config[name].members):
                raise ValueError(f"nothing of adapter {name!r} can be merged: {_listed(reasons)}.")

        def left(layer: BaseTunerLayer) -> bool:
            around = (layer, *layers_inside(layer))
            return any(inner.adapters[name].unmergeable() for inner in around for name in stays if name in inner)

        operations.merge(self.model, adapter_names, safe_merge, left)
        for name, reasons in stays.items():
            warnings.warn(f"these parts of adapter {name!r} are not merged, and go on acting: {_listed(reasons)}.")

    def require_whole(self, adapter_names: list[str]) -> None:
        operations.require_adapters(self.model, adapter_names, self.peft_config)
        for name in adapter_names:
            members = self.peft_config[name].members
            if len(members) > 1 and (reasons := self._unmergeable(name)):
                rest = [member.method_name.lower() for member in members]
                rest = [method for method in rest if method not in reasons]
                way_out = (
                    f"merge_adapter() merges its {', '.join(rest)} and lets the others act; or k" if rest else "K"
                )
                raise ValueError(
                    f"adapter {name!r} cannot become part of the weights as a whole: {_listed(reasons)}. "
                    f"{way_out}eep the PeftModel, or call unload() for the base model."
                )

    def _unmergeable(self, adapter_name: str) -> dict[str, str]:
        """The methods of an adapter's members that no weight equals -> why."""
        found: dict[str, str] = {}
        for member in self.peft_config[adapter_name].members:
            method, part = member.method_name.lower(), self._part(member)
            if isinstance(part, PromptTuner):
                found[method] = NOTHING_TO_MERGE.format(method="it").partition(", so")[0]
                continue
            layers = (layer for _, layer in layers_of(self.model) if is_own(layer, part.layer_cls))
            here = (layer.adapters[adapter_name] for layer in layers if adapter_name in layer)
            if reason := next((reason for adapter in here if (reason := adapter.unmergeable())), None):
                found[method] = reason.partition(". ")[0]
        return found

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not any(adapter_name in held for held in self.beside()) and super().supports_lora_conversion(
            adapter_name
        )

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, **kwargs: Any
    ) -> None:
        """Combine adapters of one method, as its own tuner does.

        Raises:
            ValueError: as there, and if the adapters are of different methods.
        """
        checked_weights(self, adapters, weights)
        methods = {member.method_name for name in adapters for member in self.peft_config[name].members}
        if len(methods) > 1:
            raise ValueError(
                f"adapters of different methods ({some(methods)}) have no sum that is an adapter of one of them. "
                f"{CONVERSION} does their weighted sum."
            )
        self._part(self.peft_config[adapters[0]].members[0]).add_weighted_adapter(
            adapters, weights, adapter_name, **kwargs
        )

    def update_and_allocate(self, global_step: int) -> None:
        """Let the methods of the active adapters that share out a budget do so, after the backward pass of a step."""
        for part in self._acting():
            if hasattr(type(part), "update_and_allocate"):
                part.update_and_allocate(global_step)

    # --- files ------------------------------------------------------------------------------------------------
    def without_start(
        self, adapter_name: str, tensors: dict[str, torch.Tensor], config: Any, path: str
    ) -> tuple[dict[str, torch.Tensor], Any]:
        if len(config.members) != 1:
            return super().without_start(adapter_name, tensors, config, path)
        return self._part(config.members[0]).without_start(adapter_name, tensors, config, path)

    def lost_in_a_file(self, adapter_name: str) -> str | None:
        parts = map(self._part, self.peft_config[adapter_name].members)
        lost = (part.lost_in_a_file(adapter_name) for part in parts if not isinstance(part, PromptTuner))
        return next((message for message in lost if message), None)

    # --- the methods' own tuners ------------------------------------------------------------------------------
    def _acting(self) -> Iterator[BaseTuner]:
        """The tuners of the methods of active adapters."""
        acting = behind(self.model, self.active_adapters)
        for method, part in self.__dict__.get("_parts", {}).items():
            members = ((name, self.peft_config[name].members) for name in acting)
            part.active_adapter = [n for n, each in members if any(member.peft_type == method for member in each)]
            if part.active_adapter:
                yield part

    def _part(self, config: Any) -> Any:
        """The tuner of a member's method over the same model and configs, without an adapter of its own."""
        if config.is_prompt_learning:
            if self.prompts is None:
                configs: Any = MembersOf(self.peft_config, None)
                tuner = self.__dict__["_prompts"] = PromptTuner(self.model, configs, None, task=self.task)
                self.prompt_encoder = tuner.prompts.encoders
            return self.prompts
        parts, method = self.__dict__.setdefault("_parts", {}), config.peft_type
        if method not in parts:
            cls = PEFT_TYPE_TO_TUNER_MAPPING[method]
            part = cls.__new__(cls)
            nn.Module.__init__(part)
            configs = MembersOf(self.peft_config, method)
            part.__dict__.update(peft_config=configs, active_adapter=[])
            # Past `nn.Module`, which would register the model as a part of each of these tuners.
            part.__dict__["model"] = self.model
            parts[method] = part
        return parts[method]


@contextmanager
def _naming(config: Any, member: Any) -> Iterator[None]:
    """A context in which errors name the member that they are about."""
    try:
        yield
    except ValueError as error:
        if member is not config and len(error.args) == 1:
            error.args = (f"{type(config).__name__}, part {member.method_name.lower()!r}: {error}",)
        raise


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{part} ({reason})" for part, reason in reasons.items())

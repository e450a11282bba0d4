"""The prompts of a model: adding, switching, files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from peft.core.blocks.blocks import width_of
from peft.core.gates import Gate
from peft.core.model import operations
from peft.core.model.beside import add_auxiliary
from peft.core.model.manager import Manager, check_adapter_name
from peft.core.model.replacing import replacing
from peft.core.prompts.calls import PLAIN, Calls, Task
from peft.core.prompts.gating import attentions
from peft.core.prompts.generation import Generation
from peft.core.prompts.rows import Prompts
from peft.core.prompts.sizes import settle_sizes
from peft.core.prompts.tokens import ENCODER, VirtualTokens
from peft.utils.error import MeaninglessError
from peft.utils.meanwhile import in_mode
from peft.utils.peft_types import PEFT_TYPE_TO_TUNER_MAPPING


NOTHING_TO_MERGE = (
    "{method} changes what goes into the model, not its weights, so there is nothing to merge. Keep the PeftModel, or "
    "call unload() for the base model."
)


class PromptTuner(Manager):
    """Manages the prompts of a model: the manager of methods that change no module.

    Args:
        model: the base model. Only modules that an adapter trains whole are wrapped in it.
        peft_config: adapter name -> config, or the config of ``adapter_name``.
        adapter_name: the first one, which is made; None makes none, for a manager of adapters that are more than this.
        task: what virtual tokens do to the inputs of the model's task.

    Attributes:
        prompts: what the rows of a call get. calls: how the model receives it. generation: how ``generate`` does.
    """

    MEANINGLESS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("merge_adapter", "unmerge_adapter", "merge_and_unload"), NOTHING_TO_MERGE),
        "add_weighted_adapter": "what the virtual tokens of {method} do is not linear in them, so no sum of prompts "
        "does what the sum of their effects would. Train one prompt on both tasks, or pass adapter_names for rows "
        "of a batch that use different prompts.",
    }

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str | None,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        task: Task = PLAIN,
    ) -> None:
        whole = adapter_name is None or isinstance(peft_config, dict)
        configs: Any = peft_config if whole else {adapter_name: peft_config}
        self.peft_config = configs
        self.prompts = Prompts(model, configs)
        self.calls = Calls(self.prompts, task)
        self.generation = Generation(self.calls)
        self.forward, self.generate = self.calls.forward, self.generation.generate
        if adapter_name is None:
            self.model = model
        else:
            self.start(model, configs, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    def __getattr__(self, name: str) -> Any:
        if name in self.MEANINGLESS:
            kinds = {c.method_name for c in self.peft_config.values()}
            raise MeaninglessError(self.MEANINGLESS[name].format(method=", ".join(sorted(kinds))))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # --- life of the adapters ---------------------------------------------------------------------------------
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Make the virtual tokens of ``self.peft_config[adapter_name]``, inactive and frozen.

        Raises:
            ValueError: if the config does not fit the model, which is then unchanged.
        """
        check_adapter_name(adapter_name, self.adapter_names)
        with replacing(model, adapter_name):
            self.place(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)

    def place(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool, low_cpu_mem_usage: bool
    ) -> None:
        """Make them where nothing of that name is in the model, or only parts of the same adapter."""
        config = self.peft_config[adapter_name]
        cls, word_embeddings = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], self.word_embeddings
        settle_sizes(config, model, cls.as_prefix)
        cls.prepare_config(config)
        try:
            with torch.device("meta") if low_cpu_mem_usage else nullcontext():
                encoder = self._made(cls, config, word_embeddings)
                add_auxiliary(model, adapter_name, config)
        except BaseException:
            operations.remove(model, adapter_name)
            raise
        self.prompts.add(adapter_name, encoder, autocast_adapter_dtype)
        operations.settle(model, adapter_name, autocast_adapter_dtype=False)

    def _made(self, cls: type[VirtualTokens], config: Any, word_embeddings: nn.Module) -> VirtualTokens:
        """The virtual tokens that a config asks for, with their gates."""
        encoder = cls(config, word_embeddings)
        if encoder.gates_each:
            each = encoder.gates_each
            encoder.prefix_gates = nn.ModuleList(Gate(width_of(module), each) for module in attentions(self.model))
        return encoder

    @property
    def word_embeddings(self) -> nn.Module:
        """The input embedding of the base model."""
        return self.prompts.word_embeddings

    @property
    def adapter_names(self) -> list[str]:
        return list(self.prompts.encoders)

    @property
    def disable_adapters(self) -> bool:
        """Whether all prompts are switched off, as for a layer."""
        return self.prompts.disabled

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of one adapter's virtual tokens, as for a layer."""
        return list(self.prompts.encoders[name].parameters())

    @property
    def active_adapter(self) -> str | list[str]:  # type: ignore[override]
        return self.prompts.active

    @active_adapter.setter
    def active_adapter(self, names: str | list[str]) -> None:
        self.prompts.active = names

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one, and the only one that trains (none in ``inference_mode``).

        Raises:
            ValueError: for an unknown adapter, and for several.
        """
        names = operations.names_of(adapter_name)
        operations.require_adapters(self.model, names, self.peft_config)
        self.check_active(names)
        super().set_adapter(adapter_name, inference_mode)
        self.choose(names, inference_mode)

    def check_active(self, names: list[str]) -> None:
        """Raise ValueError where several of these adapters have virtual tokens."""
        here = [name for name in names if name in self.prompts.encoders]
        if len(here) > 1:
            raise ValueError(
                f"only one prompt can be active at a time, not {here}. For different prompts in the rows of one "
                "batch, pass adapter_names to the call."
            )

    def choose(self, names: list[str], inference_mode: bool) -> None:
        """Let the one of these adapters that has virtual tokens act, and train outside ``inference_mode``."""
        here = [name for name in names if name in self.prompts.encoders]
        self.prompts.active = here[0] if here else []
        for name, encoder in self.prompts.encoders.items():
            encoder.train_on(name in here and not inference_mode)

    def train_on(self, names: list[str], requires_grad: bool) -> None:
        """Let the virtual tokens of these adapters train, or not."""
        for name in names:
            if name in self.prompts.encoders:
                self.prompts.encoders[name].train_on(requires_grad)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self.train_on(operations.names_of(adapter_names), requires_grad)

    def drop(self, adapter_name: str) -> None:
        """Remove an adapter's virtual tokens, if it has some."""
        if adapter_name in self.prompts.encoders:
            del self.prompts.encoders[adapter_name], self.prompts.tokens[adapter_name]

    def take_out(self, adapter_name: str) -> list[str]:
        operations.remove(self.model, adapter_name)
        self.drop(adapter_name)
        rest = [name for name in self.peft_config if name != adapter_name]
        if adapter_name not in self.active_adapters or not rest:
            return [name for name in self.active_adapters if name != adapter_name]
        self.set_adapter(rest[0])
        return rest[:1]

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        self.prompts.disabled = False

    def disable_adapter_layers(self) -> None:
        super().disable_adapter_layers()
        self.prompts.disabled = True

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        with self.prompts.switched_off(), super().switched_off():
            yield

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a prompt is no change of a weight."""
        return False

    # --- files ------------------------------------------------------------------------------------------------
    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(name in the file, name in memory or "", tensor) of everything that belongs to a prompt."""
        if name not in self.prompts.encoders:
            return
        encoder = self.prompts.encoders[name]
        with in_mode(encoder, training=False):  # a dropout would be saved with it
            state = list(encoder.adapter_state())
        for file, memory, tensor in state:
            yield file, f"{ENCODER}{name}.{memory}" if memory else "", tensor

    def load_prompt(self, name: str, value: torch.Tensor) -> None:
        """Take what a file has as ``prompt_embeddings``, unless a network that is in the file too makes it."""
        encoder = self.prompts.encoders[name]
        if not encoder.has_network:
            encoder.load_prompt_embeddings(value)

    def make_room(self, name: str, state_dict: dict[str, torch.Tensor]) -> None:
        """Give a prompt the form in which a file has it: with its network, or as the table that the network made."""
        encoder = self.prompts.encoders[name]
        whole = any(key.startswith(ENCODER) for key in state_dict)
        if whole == encoder.has_network or not encoder.network or "prompt_embeddings" not in state_dict:
            return
        config = copy.copy(self.peft_config[name])
        config.inference_mode = not whole
        old = next(encoder.parameters())
        with torch.device(old.device):
            fresh = self._made(type(encoder), config, self.prompts.word_embeddings)
        self.prompts.encoders[name] = fresh.to(old.dtype).train(encoder.training).train_on(old.requires_grad)

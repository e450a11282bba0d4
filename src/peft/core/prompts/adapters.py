"""The manager of methods that train virtual tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import nn

from peft.core.layer.switch import Switch
from peft.core.model import operations
from peft.core.model.beside import add_auxiliary
from peft.core.model.manager import Manager, check_adapter_name
from peft.core.model.replacing import replacing
from peft.core.prompts.calls import PLAIN, Calls, Task
from peft.core.prompts.generation import Generation
from peft.core.prompts.rows import Prompts
from peft.core.prompts.sizes import settle_sizes
from peft.errors import MeaninglessError
from peft.peft_types import PEFT_TYPE_TO_TUNER_MAPPING


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
        check_adapter_name(adapter_name, self.prompts.adapter_names)
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
                encoder = self.prompts.made(cls, config, word_embeddings)
                add_auxiliary(model, adapter_name, config)
        except BaseException:
            operations.remove(model, adapter_name)
            raise
        self.prompts.add(adapter_name, encoder, autocast_adapter_dtype)
        operations.settle(model, adapter_name, autocast_adapter_dtype=False)

    @property
    def word_embeddings(self) -> nn.Module:
        """The input embedding of the base model."""
        return self.prompts.word_embeddings

    def beside(self) -> list[Switch]:
        return [self.prompts]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a prompt is no change of a weight."""
        return False

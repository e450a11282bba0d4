"""The experts: LoRA adapters, loaded as any are, into layers that weigh them."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft.config import PeftConfig
from peft.core.model.replacing import restoring
from peft.core.model.tuner import BaseTuner
from peft.errors import ConfigError
from peft.peft_types import PeftType
from peft.tuners.lora.model import LoraModel
from peft.tuners.xlora.config import XLoraConfig
from peft.tuners.xlora.layer import XLoraLayer


class ExpertModel(LoraModel):
    """LoRA whose layers can weigh their adapters by the token."""

    layer_cls = tuner_layer_cls = XLoraLayer


def check(config: XLoraConfig, model: nn.Module) -> None:
    """Fill in the width of the hidden state; refuse a config without experts, or of another width."""
    if not config.adapters:
        raise ConfigError("XLoraConfig: adapters is empty; give each expert: name -> folder of a LoRA adapter.")
    known: Any = getattr(model, "config", None)
    text = known.get_text_config() if hasattr(known, "get_text_config") else known
    width = getattr(text, "hidden_size", None)
    config.hidden_size = width if config.hidden_size is None else config.hidden_size
    if config.hidden_size is None:
        raise ConfigError(f"XLoraConfig: {type(model).__name__} does not tell its hidden_size; set it in the config.")
    if width not in (None, config.hidden_size):
        raise ConfigError(f"XLoraConfig: hidden_size={config.hidden_size}, but that of the model is {width}.")


def load_experts(model: nn.Module, config: XLoraConfig, device: str | None, autocast: bool) -> None:
    """Put the experts into the model, all or none."""
    from peft.peft_model import PeftModel

    class Experts(PeftModel):
        """Loads the experts as any LoRA is loaded."""

        def _tuner_class(self, peft_config: PeftConfig) -> type[BaseTuner]:
            return ExpertModel

    experts: PeftModel | None = None
    with restoring(model):
        for name, path in (config.adapters or {}).items():
            found = PeftConfig.from_pretrained(path)
            if found.peft_type != PeftType.LORA:
                raise ConfigError(
                    f"XLoraConfig: the expert {name!r} is a {found.method_name} adapter; experts have to be LoRA."
                )
            if getattr(found, "modules_to_save", None) or getattr(found, "bias", "none") != "none":
                raise ConfigError(
                    f"XLoraConfig: the expert {name!r} trains whole modules or biases, which cannot be weighed by "
                    "the token. Train it with modules_to_save=None and bias='none'."
                )
            options = {"config": found, "autocast_adapter_dtype": autocast}
            if experts is None:
                experts = Experts.from_pretrained(model, path, name, **options)
            else:
                options["peft_config"] = options.pop("config")  # as load_adapter names it
                experts.load_adapter(path, name, torch_device=device, **options)

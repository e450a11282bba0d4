"""Base models for the commands: loaded as a recipe says, with adapters, and their tokenizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from peft.cli.command import need
from peft.cli.recipe import ModelOptions
from peft.config import PeftConfig
from peft.errors import ConfigError
from peft.tools.architecture import AUTO_CLASSES


def device_of(wanted: str | None = None) -> torch.device:
    """The device to compute on."""
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def load_config(options: ModelOptions) -> Any:
    """The config of a model, without its weights.

    Raises:
        ConfigError: there is no such model here or on the hub.
    """
    import transformers

    with _named(options):
        return transformers.AutoConfig.from_pretrained(**_from(options))


def load_tokenizer(options: ModelOptions) -> Any:
    """The tokenizer of a model, with a padding token."""
    import transformers

    with _named(options):
        tokenizer = transformers.AutoTokenizer.from_pretrained(**_from(options))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # batches need one
    return tokenizer


def load_base(options: ModelOptions, task_type: str = "CAUSAL_LM", device: str | None = None, **more: Any) -> Any:
    """The base model of a task, on a device.

    Args:
        more: arguments of ``from_pretrained`` besides those that the options give.
    """
    import transformers

    if options.quantization is not None:
        need("quantization", "bitsandbytes")
        more["quantization_config"] = _quantization(options)
        more["device_map"] = {"": device_of(device)}
    auto = getattr(transformers, AUTO_CLASSES[task_type])
    with _named(options):
        dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
        model = auto.from_pretrained(**_from(options), dtype=dtype, **more)
    return model if options.quantization else model.to(device_of(device))


def _from(options: ModelOptions) -> dict[str, Any]:
    """Where a model is, for ``from_pretrained``."""
    where = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    return {"pretrained_model_name_or_path": options.name, **where}


def _quantization(options: ModelOptions) -> Any:
    import transformers

    if options.quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


@contextmanager
def _named(options: ModelOptions) -> Iterator[None]:
    """A context in which errors of transformers about a model that is not there name it in a line."""
    if options.name is None:
        raise ConfigError("the base model is missing: say it with --model NAME, or as model.name in the recipe.")
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the model {options.name!r} cannot be loaded: {reason}") from error


def pairs(given: list[str], what: str = "adapter") -> dict[str, str]:
    """``name=folder`` arguments as a dict; a bare folder is named by its last part.

    Raises:
        ConfigError: a name comes twice.
    """
    found: dict[str, str] = {}
    for word in given:
        name, mark, path = word.partition("=")
        if not mark:
            parts = [part for part in word.replace("\\", "/").split("/") if part]
            name = parts[-2] if len(parts) > 1 and parts[-1] == "adapter" else parts[-1]
            path = word
        if name in found:
            raise ConfigError(f"two {what}s are called {name!r}: name them, as in one={found[name]} two={path}.")
        found[name] = path
    return found


def base_for(name: str | None, adapters: Mapping[str, str]) -> ModelOptions:
    """The base model of this name; without one, that which the first adapter names.

    Raises:
        ConfigError: there is no such adapter.
    """
    if name is not None or not adapters:
        return ModelOptions(name=name)
    config = PeftConfig.from_pretrained(next(iter(adapters.values())))
    return ModelOptions(name=config.base_model_name_or_path, revision=config.revision)

"""A model with an Arrow router over LoRA adapters that are loaded from files."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft.core.model.walk import layers_of
from peft.tuners.lora.config import ArrowConfig, LoraConfig


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> Any:
    """A model that routes each token over LoRA adapters from files, without training.

    The adapters are called ``task_0``, ``task_1``, ..., the general ones ``gks_0``, ..., the active router
    ``arrow_router``. Their ranks may differ.

    Args:
        base_model: the model that they were trained on; changed in place.
        task_specific_adapter_paths: folder or repository of each adapter to route over.
        arrow_config: the router's options; the names of adapters in it are filled in.
        general_adapter_paths: adapters whose mean is subtracted from each of the others, for ``use_gks``.
        adapter_kwargs: arguments of ``PeftModel.from_pretrained`` and ``load_adapter``.

    Raises:
        ValueError: without adapters, without general ones where ``use_gks`` asks for them, or if one is no LoRA on
            linear layers.

    Example:
        >>> model = create_arrow_model(base, ["./law", "./code", "./chat"], ArrowConfig(top_k=2))
        >>> model.generate(**inputs)
    """
    from peft.peft_model import PeftModel

    if not task_specific_adapter_paths:
        raise ValueError("task_specific_adapter_paths is empty: give the folders of the adapters to route over.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("use_gks=True subtracts general adapters: give their folders as general_adapter_paths.")
    paths = {f"task_{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    general = {
        f"gks_{i}": path for i, path in enumerate((general_adapter_paths or ()) if arrow_config.use_gks else ())
    }
    (first, path), *rest = {**paths, **general}.items()
    model = PeftModel.from_pretrained(base_model, path, adapter_name=first, **adapter_kwargs)
    for name, path in rest:
        model.load_adapter(path, adapter_name=name, **adapter_kwargs)
    arrow_config.task_adapter_names, arrow_config.gks_adapter_names = list(paths), list(general)
    configs: list[Any] = [model.peft_config[name] for name in paths]
    targets = configs[0].target_modules
    if any(config.target_modules != targets for config in configs):
        targets = {key for key, layer in layers_of(model.get_base_model()) if any(name in layer for name in paths)}
    kept = ("r", "lora_alpha", "use_rslora", "task_type", "base_model_name_or_path", "fan_in_fan_out")
    fields = {name: getattr(configs[0], name) for name in kept}
    model.add_adapter("arrow_router", LoraConfig(**fields, target_modules=targets, arrow_config=arrow_config))
    model.set_adapter("arrow_router")
    return model

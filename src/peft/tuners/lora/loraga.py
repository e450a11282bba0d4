"""LoRA-GA's preparation: the gradient of each weight that is to be adapted (arXiv 2407.05000)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from peft.core.base.storage import storage_of
from peft.core.model.targeting import Target
from peft.meanwhile import having
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.initialize import PREPARED
from peft.tuners.lora.preparing import Means, read_cache, targets_of, write_cache


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Prepare a model for ``init_lora_weights="lora_ga"``; :func:`get_peft_model` comes next.

    Args:
        model: the plain model. Each adapted layer gets its mean gradient, float32 in the host's memory, which its
            adapter's start takes away again.
        lora_config: which modules.
        train_step: runs forward and backward passes on a few batches, without an optimizer's step.
        cache_file: keeps the gradients between runs; if it is there, nothing is run.

    Raises:
        ValueError: if a weight has no gradient: it is quantised, or not reached by the loss.

    Example:
        >>> config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        >>> preprocess_loraga(model, config, lambda: [model(**batch).loss.backward() for batch in batches])
        >>> peft_model = get_peft_model(model, config)
    """
    targets = targets_of(model, lora_config, "lora_ga")
    gradients = read_cache(cache_file, {f"{name}.{_ATTRIBUTE}" for name in targets})
    if gradients is None:
        gradients = {f"{n}.{_ATTRIBUTE}": g for n, g in measured(model, targets, train_step).items()}
        write_cache(gradients, cache_file)
    for name, target in targets.items():
        target.module.__dict__[_ATTRIBUTE] = gradients[f"{name}.{_ATTRIBUTE}"]


_ATTRIBUTE = PREPARED["lora_ga"][0]


def measured(model: nn.Module, targets: dict[str, Target], train_step: Callable[[], None]) -> dict[str, torch.Tensor]:
    """The mean of each weight's gradient over all backward passes, float32 and in the layout of the weight, by layer.

    No other gradient is kept, and none twice: each goes to the host's memory and is added up there while the backward
    pass goes on, so the device holds that of one layer at a time.

    Raises:
        ValueError: if a weight has none; nothing of the model is changed in any case.
    """
    weights = {name: _trainable(name, target) for name, target in targets.items()}
    means = Means()

    def take(p: torch.Tensor) -> None:
        assert p.grad is not None
        gradient, p.grad = p.grad.float().cpu(), None  # freed as it comes: no step holds all gradients
        means.add(p, gradient)

    with having(model.parameters(), requires_grad=False, grad=None), ExitStack() as hooks:
        for p in set(weights.values()):  # one that is tied has several names
            p.requires_grad_(True)
            hooks.enter_context(p.register_post_accumulate_grad_hook(take))
        train_step()
    return means.of(
        weights,
        "got no gradient from train_step: it has to call backward() on a loss that depends on all adapted layers. "
        "Leave those layers out of target_modules, or start in another way.",
    )


def _trainable(name: str, target: Target) -> nn.Parameter:
    """The weight of a layer, if it can have a gradient."""
    attribute = target.kind.weight
    storage, weight = storage_of(target.module, attribute), target.module._parameters.get(attribute)
    if storage.name is not None or weight is None or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"LoRA-GA needs the gradient of the weight of {name!r}, and "
            f"{'codes of ' + storage.name if storage.name else 'a weight without values, or a computed one,'} have "
            "none. Take the gradients from the unquantised model with cache_file, and start from that file."
        )
    return weight

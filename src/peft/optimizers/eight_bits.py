"""Optimizers of bitsandbytes, whose states take 8 bits (arXiv 2110.02861)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from peft.errors import nearest
from peft.import_utils import is_bnb_available


_NAMES = {"adamw": "AdamW", "adam": "Adam", "lion": "Lion"}


def create_8bit_optimizer(
    model: nn.Module, *, lr: float, optimizer: str = "adamw", paged: bool = False, **kwargs: Any
) -> Optimizer:
    """An optimizer over what trains, whose states take 8 bits a number (arXiv 2110.02861): a quarter of the usual.

    States are rounded in blocks, so steps differ a little from those with 32 bits. Tensors below 4,096 numbers, and
    trained embeddings, whose gradients vary widely, keep 32 bits.

    Args:
        model: a model with something that trains.
        lr: the learning rate.
        optimizer: "adamw", "adam" or "lion".
        paged: on a GPU, states wait in CPU memory where the GPU has no room for them.
        kwargs: arguments of the class of bitsandbytes, such as ``weight_decay``.

    Raises:
        ImportError: if bitsandbytes is not installed.
        ValueError: for another optimizer, or if nothing trains.

    Examples:
        >>> optimizer = create_8bit_optimizer(model, lr=1e-4)
        >>> Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    """
    if optimizer not in _NAMES:
        known = [*_NAMES]
        raise ValueError(f"unknown optimizer {optimizer!r}.{nearest(optimizer, known)} There are {known}.")
    if not is_bnb_available():
        raise ImportError(
            "create_8bit_optimizer needs bitsandbytes, which is not installed: pip install bitsandbytes. "
            "torch.optim.AdamW does the same with states of 32 bits."
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"nothing of this {type(model).__name__} trains: add an adapter, or call set_adapter(name).")
    import bitsandbytes.optim

    keep_embeddings_exact(model)
    cls = getattr(bitsandbytes.optim, f"{'Paged' * paged}{_NAMES[optimizer]}8bit")
    return cls(parameters, lr=lr, **kwargs)


def keep_embeddings_exact(model: nn.Module) -> None:
    """Have bitsandbytes keep the state of trained embeddings in 32 bits, as it advises: gradients vary widely."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})

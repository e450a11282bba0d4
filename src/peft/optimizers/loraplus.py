"""LoRA+: B learns faster than A (arXiv 2402.12354)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from peft._lazy import also_known
from peft.optimizers.eight_bits import keep_embeddings_exact
from peft.optimizers.pairs import pairs_of


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer that trains LoRA's B with the learning rate ``lr * loraplus_lr_ratio`` (arXiv 2402.12354).

    A, and whatever else trains and has at least two axes, keeps ``lr``. Vectors (biases, norms, DoRA's magnitudes) go
    with B, without weight decay. The factors of embeddings have a rate of their own.

    Args:
        model: a model with LoRA.
        optimizer_cls: any optimizer of torch's interface, 8-bit ones of bitsandbytes included; trained embeddings keep
            their state in 32 bits there.
        lr: the learning rate of A.
        loraplus_lr_ratio: how much faster B learns; at least 1. The paper uses 16, with ``lr`` half of the usual.
        kwargs: ``loraplus_lr_embedding`` (1e-6), ``loraplus_weight_decay`` (by default ``weight_decay``, else 0), and
            arguments of ``optimizer_cls``.

    Examples:
        >>> optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
        >>> Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    """
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    decay = kwargs.pop("weight_decay", 0.0)
    decay = kwargs.pop("loraplus_weight_decay", decay)
    factor = {}
    for pair in pairs_of(model):
        factor[id(pair.a)] = "embedding" if pair.lookup else "A"
        factor[id(pair.b)] = "embedding" if pair.lookup else "B"
    members: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "vector": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            members["vector" if parameter.dim() == 1 else factor.get(id(parameter), "A")].append(parameter)
    rates = {"A": lr, "embedding": embedding_lr, "B": lr * loraplus_lr_ratio, "vector": lr * loraplus_lr_ratio}
    groups = [
        {"params": params, "lr": rates[kind], "weight_decay": 0.0 if kind == "vector" else decay}
        for kind, params in members.items()
    ]
    if optimizer_cls.__module__.startswith("bitsandbytes."):
        keep_embeddings_exact(model)
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]


also_known(__name__)

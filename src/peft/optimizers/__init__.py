"""Optimizers that know which parameters are LoRA's A and B. Each is a ``torch.optim.Optimizer``."""

from peft.optimizers.lorafa import create_lorafa_optimizer
from peft.optimizers.loramuon import create_loramuon_optimizer
from peft.optimizers.loraplus import create_loraplus_optimizer
from peft.optimizers.lorarite import create_lorarite_optimizer
from peft.optimizers.riemannian import create_riemannian_optimizer


__all__ = [
    "create_lorafa_optimizer",
    "create_loramuon_optimizer",
    "create_loraplus_optimizer",
    "create_lorarite_optimizer",
    "create_riemannian_optimizer",
]

"""Optimizers that know LoRA's A and B, or take less memory. Each is a ``torch.optim.Optimizer``."""

from peft.optimizers.eight_bits import create_8bit_optimizer
from peft.optimizers.lorafa import create_lorafa_optimizer
from peft.optimizers.loramuon import create_loramuon_optimizer
from peft.optimizers.loraplus import create_loraplus_optimizer
from peft.optimizers.lorarite import create_lorarite_optimizer
from peft.optimizers.riemannian import create_riemannian_optimizer


__all__ = [
    "create_8bit_optimizer",
    "create_lorafa_optimizer",
    "create_loramuon_optimizer",
    "create_loraplus_optimizer",
    "create_lorarite_optimizer",
    "create_riemannian_optimizer",
]

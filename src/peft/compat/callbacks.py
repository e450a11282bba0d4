"""Callbacks of transformers' Trainer that 0.21 has; nothing imports this file but who asks for one."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class AdamssAsaCallback(TrainerCallback):
    """AdaMSS with ``use_asa`` in a Trainer: chooses the subspaces that train after each step of the optimizer.

    Example:
        ``Trainer(model=model, args=args, train_dataset=data, callbacks=[AdamssAsaCallback()])``
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        model = getattr(model, "module", model)  # of DistributedDataParallel
        tuner = getattr(model, "base_model", model)
        if hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(state.global_step)

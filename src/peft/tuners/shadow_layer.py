"""The layer of Shadow around a block, and its two formulas."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peft.core.base.rows import rows_of, with_rows_added
from peft.core.blocks.blocks import BlockLayer, first_output
from peft.core.model.threads import OfThread
from peft.tuners.shadow_utils import Call, loss_of


def shadow_update(apart: torch.Tensor, down: torch.Tensor, up: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha W_up W_down (h - s), which is added to h.

    Args:
        apart: h - s, what the block's input and the shadow's state differ in, ``[..., width]``.
        down: W_down ``[r, width]``. up: W_up ``[width, r]``.
    """
    return alpha * F.linear(F.linear(apart, down), up)


def shadow_state(s: torch.Tensor, gate: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """(1 - g) s + g T(h), the state after a block, with g = sigmoid(G(h)).

    Args:
        s: the state so far. gate: G(h). new: T(h); all ``[..., width]``.
    """
    g = torch.sigmoid(gate)
    return (1 - g) * s + g * new


class States(OfThread):
    """The states of a thread's last call, common to all layers: adapter -> s before the first block, s now."""

    def __init__(self) -> None:
        self.of: dict[str, list[torch.Tensor]] = {}


class ShadowLayer(BlockLayer, nn.Module):
    """Wraps a decoder block."""

    states: States

    def start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Hook of the transformer: run the shadow network on what it is called with."""
        call = Call(module, args, kwargs)
        self.states.of.clear()
        for name, rows in self.acting(call.embeds, self.networks()):
            state = call.run(name, self.shadow_backbone[name], rows)
            self.states.of[name] = [self.shadow_projection[name](state)] * 2
        return (), call.kwargs  # with the cache that was made, and everything by name

    def networks(self) -> dict[str, str]:
        """The adapters that have a shadow network in the model, at this layer or not."""
        return {name: name for name in self.shadow_backbone}

    def finish(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Hook of the model: add the loss of the shadow network to the model's."""
        labels: Any = kwargs.get("labels")
        loss: Any = getattr(output, "loss", None)
        self.loss: torch.Tensor | None = None
        acting = [] if labels is None or loss is None else self.acting(labels, self.networks())
        for name in [name for name, rows in acting if rows is None][:1]:  # a mixed batch has no one shadow network
            alone: Any = loss_of(self.logits(name, module), labels, kwargs.get("attention_mask"))
            self.loss = alone.detach()
            output.loss = loss + self.shadow_backbone[name].loss_weight * alone.to(loss.device)
        return output

    def head_of(self, name: str, model: Any) -> nn.Module:
        """What reads the shadow's states: a classifier's copied head, or the head of the language model."""
        own = self.shadow_head[name]
        return model.get_output_embeddings() if isinstance(own, nn.Identity) else own

    def logits(self, name: str, model: Any) -> torch.Tensor:
        """What the shadow network said alone in the last call."""
        head = self.head_of(name, model)
        return head(self.states.of[name][0].to(next(head.parameters()).dtype))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        h = args[0] if args else kwargs.pop("hidden_states")
        acting = self.acting(h)
        for adapter, rows in acting:
            own = adapter.cast(rows_of(h, rows))
            h = with_rows_added(h, adapter.change(own, self.states.of[adapter.name][1]).to(h.dtype), rows)
        output = self.base_layer(h, *args[1:], **kwargs)
        for adapter, rows in acting:
            states = self.states.of[adapter.name]
            states[1] = adapter.next_state(states[1], adapter.cast(rows_of(first_output(output), rows)))
        return output

    def release(self) -> None:
        for handle in self.__dict__.pop("handles", ()):
            handle.remove()

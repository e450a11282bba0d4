"""The experts' layers, which weigh their LoRA pairs by the token, and the classifier that gives the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from peft.core.base.kinds import Kind
from peft.kernels import Factors
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.xlora.config import XLoraConfig


class Routing(NamedTuple):
    """What the layers of one model know of their router.

    Attributes:
        adapter: the router's name. config: its config, whose top_k and factor may change.
        columns: expert -> its place among the weights.
    """

    adapter: str
    config: XLoraConfig
    columns: dict[str, int]


class XLoraLayer(LoraLayer):
    """y' = y + g sum_a s_a (LoRA_a(x) - y) with the weights s that the context has for each token.

    Where the positions of a layer are not the tokens, as in a convolution, s is the mean over the tokens of the
    sample. Until the layer is given its ``routing`` it holds plain LoRA adapters.
    """

    routing: Routing | None = None
    number = 0  # among the layers of the model that have experts

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: Any) -> str | None:
        if kind.through_weight or kind.read_by_parent:
            return "its weight is read by another computation, and experts are weighed by the token"
        return super().refusal(kind, module, config)

    def factors(self, name: str) -> Factors | None:
        return None  # the fused kernels know no weights of tokens

    def _adapted(self, names: list[str], args: tuple, kwargs: dict) -> Any:
        return super()._adapted(names if self.context.scalings is not None else [], args, kwargs)

    def transform_output(self, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        if self.routing is None or name not in self.routing.columns:
            return super().transform_output(name, x, y, base_y)
        change = self.kind.channels_last(super().transform_output(name, x, y, base_y) - y)
        weights = self._weights(self.routing.columns[name]).to(change)
        batch, tokens = weights.shape
        if change.shape[:2] == (batch, tokens) and change.dim() == 3:
            weights = weights.unsqueeze(-1)
        elif change.dim() == 2 and len(change) == batch * tokens:
            weights = weights.reshape(-1, 1)
        elif len(change) == batch:
            weights = self._mean(weights).view(-1, *[1] * (change.dim() - 1))
        else:
            raise ValueError(
                f"X-LoRA has weights for {batch} samples of {tokens} tokens, and cannot tell which of them the "
                f"{len(change)} rows of {self.key or 'a layer'} are. Use experts without this layer."
            )
        return y + self.kind.channels_back(weights * change)

    def _weights(self, column: int) -> torch.Tensor:
        """g s of one expert, ``[batch, tokens]``, 0 where others are larger and only the top k act."""
        assert self.routing is not None and self.context.scalings is not None
        scalings, config = self.context.scalings[:, :, self.number], self.routing.config
        if config.top_k_lora is not None and config.top_k_lora < scalings.shape[-1]:
            kept = torch.zeros_like(scalings, dtype=torch.bool)
            kept.scatter_(-1, scalings.topk(config.top_k_lora, dim=-1).indices, True)
            if config.enable_softmax_topk:
                scalings = scalings.masked_fill(~kept, -torch.inf).softmax(-1)
            scalings = scalings.masked_fill(~kept, 0)
        elif config.top_k_lora is not None and config.enable_softmax_topk:
            scalings = scalings.softmax(-1)
        return scalings[..., column] * config.global_scaling_weight

    def _mean(self, weights: torch.Tensor) -> torch.Tensor:
        mask = self.context.padding(len(weights), weights.shape[1], weights.device)
        if mask is None:
            return weights.mean(1)
        return (weights * mask).sum(1) / mask.sum(1).clamp(min=1)

    def unmergeable(self, name: str) -> str | None:
        return "X-LoRA weighs its experts anew for each token, so no one weight equals it. Keep the adapter unmerged."

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        """The tensors of an expert; once there is a router, its: those of the experts that train with it."""
        if self.routing is None:
            yield from super().adapter_state(name)
        elif name == self.routing.adapter and self.routing.config.use_trainable_adapters:
            for expert in self.routing.columns:
                if expert in self:
                    yield from ((memory, memory, t) for _, memory, t in super().adapter_state(expert))

    def as_saved(self, name: str, saved: str, tensor: torch.Tensor) -> torch.Tensor:
        return super().as_saved(name, saved, tensor) if self.routing is None else tensor

    def upgrade(self, name: str, written_by: str) -> None:
        if self.routing is None:
            super().upgrade(name, written_by)


class XLoraClassifier(nn.Module):
    """Weights of the experts from hidden states: ``layers`` is linear, or linear layers with ReLU and dropout between.

    Args:
        config: with ``hidden_size`` filled in. layers: how many layers have experts. experts: how many there are.
    """

    def __init__(self, config: XLoraConfig, layers: int, experts: int) -> None:
        super().__init__()
        self.config, self.n_layers, self.n_classes = config, layers, experts
        width, parts = int(config.hidden_size or 0), []
        for _ in range(config.xlora_depth - 1):
            parts += [nn.Linear(width, config.xlora_size), nn.ReLU()]
            if config.xlora_dropout_p > 0:
                parts.append(nn.Dropout(config.xlora_dropout_p))
            width = config.xlora_size
        parts.append(nn.Linear(width, experts * (layers if config.layerwise_scalings else 1)))
        self.layers = nn.Sequential(*parts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, hidden_size]`` -> ``[batch, tokens, layers, experts]``."""
        dtype = next(self.layers.parameters()).dtype
        logits = self.layers(hidden.to(dtype))
        if self.config.layerwise_scalings:
            logits = logits.unflatten(-1, (self.n_layers, self.n_classes))
        else:
            logits = logits.unsqueeze(2).expand(-1, -1, self.n_layers, -1)
        return (logits / self.config.softmax_temperature).softmax(-1) if self.config.enable_softmax else logits

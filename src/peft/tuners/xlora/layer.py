"""The experts' layers, which weigh their LoRA pairs by the token, and the classifier that gives the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from peft.core.adapter import Adapter
from peft.core.base.kinds import Kind
from peft.core.gates import mean_of_tokens
from peft.core.model.context import Context
from peft.kernels import Factors
from peft.tuners.lora.layer import Lora, LoraLayer
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


def xlora_weights(scalings: torch.Tensor, top_k: int | None, softmax: bool, factor: float) -> torch.Tensor:
    """g s, the weights of the experts: 0 where only the top k act and others are larger.

    Args:
        scalings: what the classifier gives, ``[..., experts]``. top_k: None for all.
        softmax: of those that act. factor: g.
    """
    if top_k is not None and top_k < scalings.shape[-1]:
        kept = torch.zeros_like(scalings, dtype=torch.bool)
        kept.scatter_(-1, scalings.topk(top_k, dim=-1).indices, True)
        if softmax:
            scalings = scalings.masked_fill(~kept, -torch.inf).softmax(-1)
        scalings = scalings.masked_fill(~kept, 0)
    elif top_k is not None and softmax:
        scalings = scalings.softmax(-1)
    return scalings * factor


class Expert(Lora):
    """y' = y + g s (LoRA(x) - y) with the weight s that the context has for each token; without one it does nothing.

    Where the positions of a layer are not the tokens, as in a convolution, s is the mean over the tokens of the
    sample. An expert that is a variant of LoRA is an :class:`Expert` and that variant, see :meth:`like`.

    Attributes:
        weighs_rank: LoRA(x) - y is B A x of a token alone, so s may weigh the r numbers A x instead.
    """

    experts: ClassVar[dict[type[Lora], type[Lora]]] = {}
    weighs_rank: ClassVar[bool] = True

    @classmethod
    def like(cls, variant: type[Lora]) -> type[Lora]:
        """The class of experts of a variant."""
        if issubclass(variant, cls):
            return variant
        if variant not in cls.experts:
            # The change by a variant with a forward pass of its own is weighed as a whole.
            alone = all(getattr(variant, name) is getattr(Lora, name) for name in ("output", "delta", "update"))
            members = {"__doc__": variant.__doc__, "__module__": cls.__module__, "weighs_rank": alone}
            cls.experts[variant] = type(f"{variant.__name__}Expert", (cls, variant), members)
        return cls.experts[variant]

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: Any) -> str | None:
        if kind.read_elsewhere:
            return "its weight is read by another computation, and experts are weighed by the token"
        return super().refusal(kind, module, config)

    def factors(self) -> Factors | None:
        return None  # the fused kernels know no weights of tokens

    @classmethod
    def kernel(cls, layer: Any, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        return None

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        weights = self.weights()
        if weights is None:
            return y
        if not self.weighs_rank or self.lora_bias:
            return y + self.weighed(super().output(x, y, base_y) - y, weights)
        kind, base, (a, b) = self.kind, self.base, self.acting_pair()
        weights = weights * self.scaling
        if kind.lookup:
            return y + self.weighed(kind.apply(base, x, a), weights) @ b.T
        inner = self.lora_dropout(x)
        h = kind.down(base, inner, a) if self.computes_pair else self.lora_A(inner)
        h = self.weighed(h, weights)
        return y + (kind.up(base, h, b.flatten(1)) if self.computes_pair else self.lora_B(h))

    def weighed(self, change: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the layer has for each position, times the weight of that position."""
        change = self.kind.channels_last(change)
        each = by_position(weights.to(change), change, self.context)
        if each is None:
            raise ValueError(
                f"X-LoRA has weights for {len(weights)} samples of {weights.shape[1]} tokens, and cannot tell which "
                f"of them the {len(change)} rows of {self.layer.key or 'a layer'} are. Use experts without this layer."
            )
        return self.kind.channels_back(each * change)

    def weights(self) -> torch.Tensor | None:
        """g s of this expert, ``[batch, tokens]``."""
        routing, scalings = self.layer.routing, self.context.scalings
        if routing is None or scalings is None:
            return None
        config, own = routing.config, scalings[:, :, self.layer.number]
        each = xlora_weights(own, config.top_k_lora, config.enable_softmax_topk, config.global_scaling_weight)
        return each[..., routing.columns[self.name]]

    def unmergeable(self) -> str | None:
        return "X-LoRA weighs its experts anew for each token, so no one weight equals it. Keep the adapter unmerged."

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """That of a LoRA while it is loaded as one; later the router says what is saved."""
        return super().state() if self.layer.routing is None else iter(())


def by_position(weights: torch.Tensor, change: torch.Tensor, context: Context) -> torch.Tensor | None:
    """Weights ``[batch, tokens]``, shaped to multiply ``[..., out]``; None where its rows are no tokens or samples.

    Args:
        context: knows the padding, which the mean over the tokens of a sample leaves out.
    """
    batch, tokens = weights.shape
    if change.shape[:2] == (batch, tokens) and change.dim() == 3:
        return weights.unsqueeze(-1)
    if change.dim() == 2 and len(change) == batch * tokens:
        return weights.reshape(-1, 1)
    if len(change) != batch:
        return None
    mean = mean_of_tokens(weights.unsqueeze(-1), context.padding(batch, tokens, weights.device))
    return mean.view(-1, *[1] * (change.dim() - 1))


class XLoraLayer(LoraLayer):
    """A layer with experts. Until it is given its ``routing`` they are being loaded."""

    adapter_cls: ClassVar[type[Adapter]] = Expert
    routing: Routing | None = None
    number = 0  # among the layers of the model that have experts

    def _class_of(self, name: str, config: Any) -> type[Adapter]:
        variant: Any = super()._class_of(name, config)
        return Expert.like(variant)


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

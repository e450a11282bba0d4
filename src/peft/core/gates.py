"""Gates: how much of a part of an adapter a sample gets, g = mean over its tokens of sigmoid(W h + b).

From UniPELT (Mao et al. 2022, arXiv 2110.07577), whose parts have one each. W and b are trained with the part.
"""

from __future__ import annotations

import torch
from torch import nn

from peft.core.model.context import Context


def mean_gate(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: torch.Tensor | None = None
) -> torch.Tensor:
    """g of each sample, ``[batch, gates]``.

    Args:
        h: hidden states ``[batch, ..., width]``. weight: W ``[gates, width]``. bias: b ``[gates]``.
        padding: 0 for tokens that do not count, else 1, ``[batch, tokens]``; None: all count.
    """
    each = torch.sigmoid(nn.functional.linear(h, weight, bias)).unsqueeze(1).flatten(1, -2)  # [batch, tokens, gates]
    return mean_of_tokens(each, padding)


def mean_of_tokens(each: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """The mean over the tokens of each sample, of ``[batch, tokens, n]``; 0 of none. ``padding`` as above."""
    if padding is None:
        return each.mean(1) if each.shape[1] else each.sum(1)
    counts = padding.to(each).unsqueeze(-1)
    return (each * counts).sum(1) / counts.sum(1).clamp(min=1)


class Gate(nn.Linear):
    """W ``[gates, width]``, which starts at N(0, 0.02^2), and b ``[gates]`` at 0: a new gate is half open.

    It averages over the tokens of the call, but for padding where an ``attention_mask`` tells of it. While a decoder
    generates with a cache, these are the tokens that the cache does not hold yet.
    """

    def __init__(self, width: int, gates: int = 1) -> None:
        super().__init__(width, gates)
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def of(self, h: torch.Tensor, context: Context | None) -> torch.Tensor:
        """g of each sample, ``[batch, gates]``.

        Args:
            h: hidden states ``[batch, ..., width]``. context: the call under way; None: nothing is padded.
        """
        padding = context.padding(h.shape[0], h.shape[1], h.device) if context and h.dim() == 3 else None
        return mean_gate(h, self.weight, self.bias, padding)

    def apply_to(self, u: torch.Tensor, h: torch.Tensor, context: Context | None) -> torch.Tensor:
        """g u for what a part with one gate gives, ``[batch, ...]``."""
        return u * self.of(h, context).view(-1, *[1] * (u.dim() - 1))

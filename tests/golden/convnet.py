"""The `convnet` of the golden cases. It stands alone, as other releases of `peft` read and write them too."""

from __future__ import annotations

import torch
from torch import nn


class ConvNet(nn.Module):
    """Embedding, Conv1d, LayerNorm, Conv2d and two Linear layers: the `convnet` of the golden cases."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(99, 16)
        self.conv1d = nn.Conv1d(16, 24, 3, padding=1)
        self.norm = nn.LayerNorm(24)
        self.conv2d = nn.Conv2d(1, 8, 3, padding=1)
        self.lin0 = nn.Linear(192, 40)
        self.lin1 = nn.Linear(40, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, tokens] -> logits [batch, 5]."""
        x = self.conv1d(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        x = torch.tanh(self.norm(x))
        x = self.conv2d(x[:, None]).mean(2)
        return self.lin1(torch.tanh(self.lin0(x.flatten(1))))

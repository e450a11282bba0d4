"""Small modules that several tests share."""

from __future__ import annotations

import torch
from golden.convnet import ConvNet as ConvNet
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from peft.testing.places import ScaledEmbedding, Stack


class Sequence(nn.Module):
    """Embedding, Linear, transposed Linear and a one-dimensional convolution over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 6)
        self.lin = nn.Linear(6, 8)
        self.trans = Conv1D(12, 8)
        self.conv = nn.Conv1d(12, 10, 3, stride=2, padding=2)
        self.head = nn.Linear(10, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, tokens] -> logits [batch, 4]."""
        x = torch.tanh(self.trans(torch.tanh(self.lin(self.emb(ids)))))
        return self.head(self.conv(x.transpose(1, 2)).mean(2))


class Picture(nn.Module):
    """Two-dimensional convolutions: non-square and strided, then grouped, then 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, (3, 2), stride=(2, 1), padding=(1, 0))
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.point = nn.Conv2d(12, 6, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, 2, height, width] -> [batch, 6]."""
        x = torch.tanh(self.first(x))
        return self.point(torch.tanh(self.grouped(x))).mean((2, 3))


class Volume(nn.Module):
    """One three-dimensional convolution and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 6, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, 2, depth, height, width] -> logits [batch, 3]."""
        return self.head(torch.tanh(self.conv(x)).mean((2, 3, 4)))


class Scaled(nn.Module):
    """A scaled embedding with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = ScaledEmbedding(11, 6, 2.5)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [batch, tokens] -> logits [batch, tokens, 4]."""
        return self.head(self.emb(ids))


class Attention(nn.Module):
    """`nn.MultiheadAttention` on itself, then a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, tokens, 8] -> [batch, tokens, 4]."""
        return self.head(self.attn(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    """A Linear layer, then an expert stack."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.stack = Stack(is_transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, 6] -> [batch, 6]."""
        return self.stack(self.lin(x))


class TransposedExperts(Experts):
    """The same with `is_transposed`, which tells that parameters are stored [experts, in, out]."""

    def __init__(self) -> None:
        super().__init__(is_transposed=True)


class Mlp(nn.Module):
    """Linear, LayerNorm, ReLU, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.act = nn.ReLU()
        self.lin1 = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, 6] -> [batch, 4]."""
        return self.lin1(self.act(self.norm(self.lin0(x))))


def tiny_llama(tie: bool = False) -> LlamaForCausalLM:
    """Build a llama of two layers, width 16 and 30 tokens; with `tie`, the head shares the embedding's weight."""
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config)


def tied_llama() -> LlamaForCausalLM:
    """`tiny_llama` with tied embeddings."""
    return tiny_llama(tie=True)


TOYS = {
    "sequence": Sequence,
    "picture": Picture,
    "volume": Volume,
    "scaled": Scaled,
    "attention": Attention,
    "experts": Experts,
    "transposed_experts": TransposedExperts,
    "mlp": Mlp,
    "tied_llama": tied_llama,
}
"""Name in the recorded cases -> how to build the module."""

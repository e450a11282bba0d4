"""The virtual tokens of one call, ``[P; E(x)]``, whose rows may have different ones, of different length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft.core.base.rows import joined


@dataclass
class Feed:
    """The virtual tokens of one call.

    Attributes:
        values: ``[batch, tokens, width]``; shorter rows are padded at their beginning.
        lengths: how many tokens each row has, ``[batch]``; None: all of them.
        attended: 1 for tokens that the text may see, 0 for others, ``[batch, tokens]``; None: it sees all.
        labels: labels of the virtual tokens, ``[batch, tokens]``; None: none of them is predicted.
    """

    values: torch.Tensor
    lengths: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    @property
    def size(self) -> int:
        return self.values.shape[1]

    def nothing(self, rows: int) -> Feed:
        """A feed of no tokens for some rows."""
        return Feed(self.values[:1, :0].expand(rows, -1, -1))

    def padded(self, rows: int, size: int) -> Feed:
        """The same, with padding in front up to ``size`` tokens."""
        gap, device = size - self.size, self.values.device
        attended = (
            torch.ones(rows, self.size, dtype=torch.long, device=device) if self.attended is None else self.attended
        )
        labels = attended.new_full((rows, self.size), -100) if self.labels is None else self.labels
        pad = nn.functional.pad
        return Feed(
            pad(self.values, (0, 0, gap, 0)),
            torch.full((rows,), self.size, device=device),
            pad(attended, (gap, 0)),
            pad(labels, (gap, 0), value=-100),
        )

    @classmethod
    def joined(cls, parts: list[Feed], order: torch.Tensor) -> Feed:
        """Padded feeds of groups of rows as one, with the rows in the order of the batch."""
        values, lengths, attended, labels = (
            joined([getattr(part, field) for part in parts], order)
            for field in ("values", "lengths", "attended", "labels")
        )
        even = bool((lengths == values.shape[1]).all())
        return cls(values, None if even else lengths, None if even and bool(attended.all()) else attended, labels)

    def mask(self, like: torch.Tensor) -> torch.Tensor:
        """1 for virtual tokens, 0 for padding: ``[batch, tokens]`` in the dtype of ``like``."""
        return like.new_ones(like.shape[0], self.size) if self.attended is None else self.attended.to(like)

    @property
    def needs_mask(self) -> bool:
        return self.lengths is not None or self.attended is not None

    def positions(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the virtual tokens, and those of the text, ``[batch, length]``, moved behind them."""
        if self.lengths is None:
            return torch.arange(self.size, device=text.device).expand(len(text), -1).to(text.dtype), text + self.size
        return self._index(text).clamp(min=0).to(text.dtype), text + self.lengths[:, None].to(text)

    def fill(self, like: torch.Tensor, value: int) -> torch.Tensor:
        return like.new_full((like.shape[0], self.size), value)

    def _index(self, like: torch.Tensor) -> torch.Tensor:
        lengths: Any = self.lengths
        return torch.arange(self.size, device=like.device) - (self.size - lengths.to(like.device))[:, None]

    def join(self, virtual: torch.Tensor, text: torch.Tensor, to_the_left: bool = False) -> torch.Tensor:
        """Both, one after the other; ``to_the_left`` moves the padding of shorter rows to their end."""
        whole = torch.cat([virtual.to(text), text], dim=1)
        if not to_the_left or self.lengths is None:
            return whole
        start = self.size - self.lengths.to(whole.device)
        index = (torch.arange(whole.shape[1], device=whole.device) + start[:, None]) % whole.shape[1]
        return whole[torch.arange(len(whole), device=whole.device)[:, None], index]

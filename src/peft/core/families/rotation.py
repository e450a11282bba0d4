"""W' = diag(s) W R^T: rotations of the input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from peft.core.adapter import Adapter
from peft.core.families.output import by_output
from peft.core.layer.weight import bias_below


class Rotation(Adapter):
    """W' = diag(s) W R^T, R square and invertible: a rotation of the input, y = W (x R), and a scale of the output.

    The bias stays as it is, and most methods have no s. On a table of embeddings, which has no input to rotate, R
    turns the output: y = (W x) R. On convolutions R acts on the flattened ``in * kernel`` axis, through the weight. A
    method defines :meth:`rotate` for vectors of :attr:`rotated_features`, as cheaply as its R allows: nothing in a
    training step needs the whole matrix. What a step draws at random (dropped blocks) is no part of a weight: a
    method draws only where ``drawn`` says so.
    """

    last_comes_first: ClassVar[bool] = False
    """Whether the adapter that was activated last turns the input first. Other releases differ here by method."""

    @property
    def rotated_features(self) -> int:
        shape = self.shape
        return shape[0] if self.kind.lookup else int(torch.Size(shape[1:]).numel())

    def rotate(self, x: torch.Tensor, back: bool = False, drawn: bool = False) -> torch.Tensor:
        """x R along the last axis; x R^T with ``back``; with what the step draws at random if ``drawn``."""
        raise NotImplementedError

    def draws(self) -> bool:
        """Whether a forward now draws blocks at random."""
        return False

    def scale_out(self) -> torch.Tensor | None:
        """s, ``[out]``, or None."""
        return None

    def rotation(self) -> torch.Tensor:
        """R, ``[features, features]``."""
        like = next(self.parameters())
        return self.rotate(torch.eye(self.rotated_features, device=like.device, dtype=like.dtype))

    def only_folds(self) -> bool:
        return len(self.shape) > 2

    prefers_folding = only_folds

    def folds_in_reverse(self) -> bool:
        return not (self.kind.lookup or self.last_comes_first)

    def input(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.kind.lookup else self.rotate(x, drawn=True)

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        s, bias = self.scale_out(), bias_below(self.layer)
        y = self.rotate(y.to(self.dtype), drawn=True) if self.kind.lookup else y
        if s is None:
            return y
        if bias is not None:
            return torch.addcmul(bias - bias * s, y, s)  # s scales W x alone: (y - b) s + b
        # It computes y once more in the backward pass, where a draw would come out otherwise.
        changed = None if self.draws() else by_output(self, x, y, lambda: (s,))
        return y * s if changed is None else changed

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        s = self.scale_out()
        if self.kind.lookup:
            weight = self.rotate(weight.T).T
        else:
            weight = self.rotate(weight.flatten(1), back=True).view_as(weight)
        return weight if s is None else weight * s.view(-1, *[1] * (weight.dim() - 1)).to(weight.dtype)

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        inverse = torch.linalg.inv(self.rotation().float()).to(weight.dtype)
        if self.kind.lookup:
            return inverse.T @ weight
        return (weight.flatten(1) @ inverse.T).view_as(weight)

    def keeps_base(self) -> bool:
        """A series that stands for a rotation can be far from one, even singular: then its inverse is of no use."""
        rotation: Any = self.rotation().float()
        eye = torch.eye(len(rotation), device=rotation.device)
        return bool((rotation @ rotation.T - eye).abs().max() > 0.01)


def block_rotated(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x blockdiag(R_1, ..., R_D) along the last axis, for blocks ``[D, size, size]``."""
    pieces = x.reshape(-1, *blocks.shape[:2]).transpose(0, 1)  # [D, rows, size]
    return torch.bmm(pieces, blocks).transpose(0, 1).reshape(x.shape)


def held_still(blocks: torch.Tensor, probability: float) -> torch.Tensor:
    """Blocks ``[..., size, size]``, each of which is the identity with this probability."""
    still = torch.rand(*blocks.shape[:-2], 1, 1, device=blocks.device) < probability
    return torch.where(still, torch.eye(blocks.shape[-1], device=blocks.device, dtype=blocks.dtype), blocks)

"""What takes the place of the base: a trained copy of the whole module, or trained rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from peft.core.adapter import Adapter, part, setting
from peft.core.addition import Addition, Replaces
from peft.core.base.kinds import Kind
from peft.core.base.storage import copied
from peft.core.layer.weight import base_bias, base_weight
from peft.errors import OutOfRangeError


class Copy(Adapter):
    """A trained copy of the whole module stands in for it. A method declares one part, a module."""

    any_module = True
    labelled_inside = True
    adds: ClassVar[Addition] = Replaces()

    def stand_in(self) -> nn.Module:
        (declared,) = type(self).parts.values()
        return declared.__get__(self)

    def create(self, config: Any, key: str) -> None:
        layer = self.layer
        if layer.base_layer is not self.base:
            raise ValueError(
                f"{key or 'the module'} has adapters of another method already, which a copy of the whole module "
                "would hide. Add this adapter before them, or leave that module out of its targets."
            )
        duplicate = copied(self.base)
        duplicate.requires_grad_(True)
        (declared,) = type(self).parts
        setattr(self, declared, duplicate)

    def origin(self) -> dict[str, torch.Tensor]:
        (declared,) = type(self).parts
        base = self.layer.originals.get("module", self.base)
        return {f"{declared}.{key}": tensor for key, tensor in base.state_dict().items()}

    def clash(self, others: Sequence[Adapter]) -> str | None:
        if not others:
            return None
        names = [adapter.name for adapter in (*others, self)]
        return f"{type(self.layer).__name__} replaces a module, so one adapter can be active at a time, not {names}."


class Rows(Adapter):
    """Some rows of a table are replaced by trained ones: token vectors of an embedding or of an output head.

    A method declares one part, the rows ``[n, dim]``.
    """

    token_indices = setting()
    reversible = False
    follows_ties = True
    adds: ClassVar[Addition] = Replaces("token_indices")

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: Any) -> str | None:
        if kind.name in ("Linear", "Embedding") and not kind.opaque:
            return None
        return "token rows exist only in embeddings and in linear output heads"

    @property
    def _declared(self) -> part:
        (declared,) = type(self).parts.values()
        return declared

    @property
    def rows(self) -> torch.Tensor:
        """The trained rows, ``[n, dim]``."""
        return self._declared.__get__(self)

    def index(self, device: torch.device) -> torch.Tensor:
        """The tokens that they are for, ``[n]``."""
        return torch.as_tensor(self.token_indices, device=device)

    def once(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their rows. Of a token that is given twice the last row counts; all its rows train alike."""
        last = {token: place for place, token in enumerate(self.token_indices)}
        rows = self.rows
        if len(last) == len(self.token_indices):
            return self.index(device), rows
        order = {token: place for place, token in enumerate(last)}
        home = torch.tensor([order[token] for token in self.token_indices], device=rows.device)
        values = rows.detach()[torch.tensor([*last.values()], device=rows.device)]
        return torch.tensor([*last], device=device), values.index_add(0, home, rows - rows.detach())

    def replace(self, indices: list[int], init: bool = True) -> None:
        """Allocate the trained rows: copies of the rows they replace (random ones without ``init``).

        A tied layer takes the very rows of the layer that it is tied to.

        Raises:
            ValueError: if there is no index, or one is negative or not in the table.
        """
        if not indices:
            raise ValueError("no token indices are given, so no row would train: name the tokens by their indices.")
        base = base_weight(self.layer)
        table = base.T if self.kind.lookup else base
        wrong = [i for i in indices if not 0 <= i < table.shape[0]]
        if wrong:
            raise OutOfRangeError(
                f"token indices (trainable_token_indices, token_indices) are outside the table of {table.shape[0]} "
                f"tokens: {wrong}. Resize the embeddings first if these tokens are new."
            )
        source: Any = self.tied_to
        if source is not None:
            rows = source.rows
        else:
            old = table[torch.as_tensor(indices, device=table.device)]
            rows = nn.Parameter(old.clone() if init else torch.randn_like(old))
        self.token_indices = list(indices)
        self._declared.__set__(self, rows)

    def origin(self) -> dict[str, torch.Tensor]:
        base = self.base_weight().detach()
        index = self.index(base.device)
        return {self._declared.name: base.T[index] if self.kind.lookup else base[index]}

    def aligned(self, like: Any) -> dict[str, torch.Tensor]:
        """Tokens that only the other adapter trains have the rows of the base."""
        ((key, rows),) = like.origin().items()
        position = {token: i for i, token in enumerate(like.token_indices)}
        index = torch.tensor([position[token] for token in self.token_indices], device=rows.device)
        return {key: rows.index_copy(0, index, self.rows.detach().to(rows.dtype))}

    def clash(self, others: Sequence[Any]) -> str | None:
        taken = {token for other in others for token in other.token_indices}
        both = sorted(taken & set(self.token_indices))
        if not both:
            return None
        return (
            f"adapters {[other.name for other in (*others, self)]} replace the same token rows ({both[:5]}), so they "
            "cannot be active together. Activate one of them."
        )

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        kind: Any = self.kind
        base = self.base
        index, rows = self.once(y.device)
        if not self.kind.lookup:
            trained = self.kind.apply(base, x, rows)
            if (bias := base_bias(self.layer)) is not None:
                trained = trained + bias[index]
            return y.index_copy(-1, index, trained.to(y.dtype))
        # By search: to compare each token with each trained row takes as many times the memory.
        ordered, rank = index.sort()
        found = torch.searchsorted(ordered, x).clamp_(max=len(index) - 1)
        trained = kind.scaled(base, rows[rank[found]].to(y.dtype))
        return torch.where((ordered[found] == x).unsqueeze(-1), trained, y)

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        index, rows = self.once(weight.device)
        rows = rows.to(weight.dtype)
        return weight.index_copy(1, index, rows.T) if self.kind.lookup else weight.index_copy(0, index, rows)

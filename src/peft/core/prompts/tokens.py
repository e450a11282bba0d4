"""What a prompt method says of itself: the virtual tokens ``P`` that it trains, or the prefix ``K_p, V_p``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from peft.compat import alias_submodules
from peft.core.base.storage.sharded import tensors_in
from peft.peft_types import register_peft_method


ENCODER = "prompt_encoder."  # how tensors in a file begin that only further training needs


class VirtualTokens(nn.Module):
    """What a prompt method trains; one for each adapter.

    Args:
        config: its config, with all sizes settled.
        word_embeddings: the base model's input embedding, for methods that start from it.

    Attributes:
        embedding: the table; saved as ``prompt_embeddings`` unless a network stands between it and the prompt.
        as_prefix: the output is keys and values ``[..., tokens, 2 layers width]``, not embeddings.
        in_decoder: an encoder-decoder's decoder gets virtual tokens too, the second half of them.
        uses_tasks: ``forward`` takes the task of each row as well.
        network: names of the submodules between table and prompt, which exist while such a network is trained.
        frozen: names of parameters, or of modules that hold them, which are not trained.
        inputs: names of inputs that are the method's, not the base model's.
        attended: 1 for virtual tokens that the text may see, 0 for others, ``[tokens]``; None: it sees all.
        own_labels: labels of the virtual tokens, ``[tokens]``; None: none of them is predicted.
        gates_each: how many gates a prefix has in each layer: 0, 1 for keys and values, or one for each.
    """

    as_prefix: ClassVar[bool] = False
    in_decoder: ClassVar[bool] = False
    uses_tasks: ClassVar[bool] = False
    network: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    inputs: ClassVar[tuple[str, ...]] = ()
    attended: torch.Tensor | None = None
    own_labels: torch.Tensor | None = None
    gates_each: int = 0
    embedding: Any

    def forward(self, indices: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        """indices ``[batch, tokens]`` -> ``[batch, tokens, width]``; ``task_ids``: ``[batch]``."""
        return self.embedding(indices)

    @classmethod
    def prepare_config(cls, config: Any) -> None:
        """Settle the fields of the method's own."""

    @classmethod
    def count(cls, config: Any) -> int:
        """How many virtual tokens the table has."""
        return config.num_virtual_tokens * (1 if cls.as_prefix else config.num_transformer_submodules)

    @property
    def has_network(self) -> bool:
        return any(hasattr(self, name) for name in self.network)

    @property
    def gates(self) -> Any:
        """The gates of a prefix, by layer; None where it has none."""
        return self._modules.get("prefix_gates")

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that are not constant."""
        return (p for name, p in self.named_parameters() if name.partition(".")[0] not in self.frozen)

    def saved(self) -> torch.Tensor:
        """What a file has as ``prompt_embeddings``, ``[tokens, width]``."""
        if not self.has_network:
            return self.embedding.weight
        rows = torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)
        with torch.no_grad():
            return self.eval()(rows[None])[0]

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Become a given prompt, ``[tokens, width]``.

        Raises:
            ValueError: if a network makes the prompt, or the shape is another one.
        """
        if self.has_network:
            raise ValueError("this prompt is the output of a network, which cannot be told what to give.")
        check_shape(prompt_embeddings, self.embedding.weight)
        put(self.embedding, "weight", prompt_embeddings)

    def label_weights(self, types: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
        """How much each token counts in the loss, ``[batch, tokens + length]``; None: all the same.

        Args:
            types: the input called ``inputs[0]``, ``[batch, length]``, or None.
        """
        return None

    def select_labels(self, labels: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Labels of a text, ``[batch, length]``, with -100 for tokens that its types exclude from the loss."""
        return labels

    def adapter_state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(name in the file, name in memory, tensor); a tensor that is computed has no name in memory."""
        made = ("embedding", *self.network) if self.has_network else ()
        for name, tensor in tensors_in(self).items():
            if name.partition(".")[0] in made:
                yield ENCODER + name, name, tensor
            elif name != "embedding.weight":
                yield name, name, tensor
        yield "prompt_embeddings", "" if self.has_network else "embedding.weight", self.saved()


@torch.no_grad()
def put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a parameter other values, or its first ones where it is on the meta device."""
    old = getattr(module, name)
    if old.is_meta:
        setattr(module, name, nn.Parameter(value.detach().to(old.dtype).clone(), old.requires_grad))
    else:
        old.copy_(value)


def check_shape(given: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise ValueError where a prompt has not the shape of its place."""
    if given.shape != wanted.shape:
        raise ValueError(f"the prompt is {list(given.shape)}, but its place {list(wanted.shape)} [tokens, width].")


def define_prompt(encoder_cls: type[VirtualTokens], config_cls: Any, *, prefix: str) -> None:
    """Register a prompt method.

    Args:
        encoder_cls: what it trains. config_cls: its config.
        prefix: how its tensors' names would start, if it had any in the model; others must not use it.
    """
    name = config_cls.METHOD.value.lower()
    register_peft_method(name=name, config_cls=config_cls, model_cls=encoder_cls, prefix=prefix)
    alias_submodules(sys.modules[encoder_cls.__module__])

"""The embeddings of a base model that are saved with an adapter: which they are, and what they are called."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from peft.core.base.storage import offloading_hook, onloaded, storage_of
from peft.core.base.storage.sharded import whole
from peft.core.files.entries import Entry
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.auxiliary import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.core.model.walk import Site, embeddings_of, file_path, join, plain, walk


def tell_no_embeddings(root: nn.Module) -> None:
    """Warn where a model does not say which its embeddings are."""
    if not any(embedding_sites(root)):
        warnings.warn(
            f"save_embedding_layers=True does nothing: {type(root).__name__} does not say which its embeddings are "
            "(get_input_embeddings). Name them in modules_to_save."
        )


def embedding_sites(root: nn.Module) -> Iterator[tuple[Site, nn.Parameter]]:
    """Where the input and the output embedding are, and their base weights."""
    ends = embeddings_of(root)
    for site in walk(root):
        weight = site.module._parameters.get("weight")
        if weight is not None and any(end is site.module for end in ends):
            yield site, weight


def embeddings_beside(root: nn.Module, prefix: str, adapter: str, always: bool) -> dict[str, torch.Tensor]:
    """Base weights of the input and output embeddings that the adapter adapts (or of both, if ``always``)."""
    found = {}
    for site, _ in embedding_sites(root):
        around = [w for _, w in site.wrappers if isinstance(w, BaseTunerLayer) and adapter in w]
        # Trained rows, and copies of whole modules, are tensors of the adapter itself.
        adapted = any(not (w.adapter_cls.follows_ties or w.adapter_cls.any_module) for w in around)
        copied = any(isinstance(w, ModulesToSaveWrapper) and adapter in w for _, w in site.wrappers)
        if adapted or (always and not copied):
            # the file format names the place below trained tokens, not that of the plain table
            here = [(p, w) for p, w in site.wrappers if not (isinstance(w, TrainableTokensWrapper) and adapter in w)]
            path = file_path(join(site.path, "weight"), adapter, [*site.above, *here])
            with onloaded(site.module):  # accelerate may keep it elsewhere
                found[prefix + plain(path)] = whole(site.module._parameters["weight"]).detach()  # type: ignore[arg-type]
    return found


def base_weights(root: nn.Module, prefix: str) -> dict[str, Entry]:
    """Base weights of embeddings, which files may hold beside the adapter."""
    found = {}
    for site, weight in embedding_sites(root):
        away = weight.is_meta and offloading_hook(site.module) is not None  # the copy is to reach where it is kept
        put = partial(_put_away, site.module) if away else None
        entry = Entry(prefix + plain(join(site.path, "weight")), "", weight, put=put)
        found[entry.saved] = found[prefix + join(site.key, "weight")] = entry
        found[prefix + join(site.key, "base_layer.weight")] = entry
    return found


def _put_away(module: nn.Module, value: torch.Tensor) -> None:
    weight = module.get_parameter("weight")
    storage_of(module, "weight").write(module, "weight", value.to(weight.dtype))

"""Intruder dimensions: directions that LoRA puts into a weight and the base's does not know (arXiv 2410.21228)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from peft.core.files.entries import anatomy
from peft.core.files.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from peft.core.layer.classes import is_own
from peft.core.layer.weight import base_weight
from peft.core.model.walk import layers_of
from peft.kernels.decompositions import svd
from peft.tuners.lora.factors import factors_of
from peft.tuners.lora.layer import LoraLayer


def without_intruders(
    base: torch.Tensor, delta: torch.Tensor, top_k: int, epsilon: float, keep: float
) -> tuple[torch.Tensor, int]:
    """A change of a weight whose intruders are scaled by ``keep``, and how many there are.

    An intruder is one of the ``top_k`` leading left singular vectors u of ``base + delta`` whose cosine to each left
    singular vector of ``base`` is below ``epsilon``; its part ``s u v^T`` is scaled.

    Args:
        base, delta: ``[out, in]``.
    """
    known, _, _ = svd(base)
    left, values, right = svd(base + delta)
    intrudes = (known.mT @ left[:, :top_k]).abs().amax(0) < epsilon
    left, values, right = left[:, :top_k][:, intrudes], values[:top_k][intrudes], right[:top_k][intrudes]
    return delta - (1 - keep) * (left * values) @ right, int(intrudes.sum())


@torch.no_grad()
def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Add an adapter that is another one with its intruder dimensions weakened, and make it the active one.

    That gives back some of what the base model knew before, and costs some of what the adapter has learnt. The new
    adapter has the ranks of the old one: it is the closest of its rank to the weakened change.

    Args:
        peft_model: a model with LoRA.
        top_k: how many leading singular vectors of each adapted weight are looked at.
        threshold_epsilon: below which cosine to every singular vector of the base's weight one is an intruder.
        mitigation_lambda: by what an intruder's singular value is multiplied: 1 leaves it, 0 takes it away.
        logging_sink: called with a line for each layer; None for silence.

    Raises:
        ValueError: if the adapter is unknown, merged, no plain LoRA, or of a start that has rewritten the base weight
            (PiSSA and the like), or the new name is taken.

    Examples:
        >>> reduce_intruder_dimension(model, mitigation_lambda=0.5)
        >>> model.save_pretrained("milder")
    """
    layers = plain_layers(peft_model, old_adapter_name, "reduce_intruder_dimension")
    say = logging_sink or (lambda line: None)
    write = beside(peft_model, old_adapter_name, new_adapter_name)
    for path, layer in layers:
        delta = layer.kind.orient(layer.get_delta_weight(old_adapter_name), layer.get_base_layer()).flatten(1)
        base = base_weight(layer).flatten(1).to(delta)
        change, count = without_intruders(base, delta, top_k, threshold_epsilon, mitigation_lambda)
        say(f"{path}: Intruders: {count}")
        if count:
            write(path, *svd(change / layer.scaling[new_adapter_name]))
    peft_model.set_adapter(new_adapter_name)
    say(f"Adapter {new_adapter_name!r} is active now.")


def plain_layers(model: Any, name: str, what: str) -> list[tuple[str, LoraLayer]]:
    """The layers of an adapter that is the product of its factors everywhere, with their paths.

    Raises:
        ValueError: there is no such adapter, it is merged, or it is more than that somewhere; ``what`` needs it.
    """
    if name not in model.peft_config:
        raise ValueError(f"no adapter {name!r}; there are {', '.join(map(repr, model.peft_config))}.")
    layers = [(path, layer) for path, layer in layers_of(anatomy(model)[0]) if name in layer]
    if any(layer.merged for _, layer in layers):
        raise ValueError("adapters are merged into the base weights; call unmerge_adapter() first.")
    for path, layer in layers:
        if layer.rewritten is not None and name in layer.rewritten.own:
            raise ValueError(
                f"adapter {name!r} stands on the weight that its start has made of {path!r}, and a copy of it would "
                f"not, so {what} has no meaning there. Save it with path_initial_model_for_weight_conversion, and "
                "load that into the original model."
            )
        if not is_own(layer, LoraLayer) or not _is_plain(layer, name):
            raise ValueError(
                f"{what} is defined for plain LoRA, and adapter {name!r} at {path!r} is more than the product of its "
                "two factors, or has one for each group of channels."
            )
    return layers  # type: ignore[return-value]


def beside(model: Any, old: str, new: str) -> Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """Add an adapter that is a copy of another one.

    Returns:
        a function that makes B A of a layer of it, by its path, the closest product to U diag(S) V^T, ``[out, k]``,
        ``[k]`` and ``[k, in]``.
    """
    config = copy.deepcopy(model.peft_config[old])
    config.init_lora_weights = True  # another start would take a part out of the base's weight, again
    model.add_adapter(new, config)
    state = get_peft_model_state_dict(model, adapter_name=old, save_embedding_layers=False)
    set_peft_model_state_dict(model, state, adapter_name=new)
    layers = dict(layers_of(anatomy(model)[0]))

    @torch.no_grad()
    def write(path: str, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> None:
        a, b = factors_of(layers[path], new)  # type: ignore[arg-type, misc]
        root, rank = values[: len(a)].sqrt(), min(len(a), len(values))
        a.zero_(), b.zero_()  # what a rank above that of the weight leaves over
        a[:rank] = (root[:, None] * right[:rank]).view(-1, *a.shape[1:])
        b[:, :rank] = (left[:, :rank] * root).view(-1, rank, *b.shape[2:])

    return write


@torch.no_grad()
def _is_plain(layer: LoraLayer, name: str) -> bool:
    """Whether what the adapter does to the weight is the product of its factors, and nothing more."""
    factors = factors_of(layer, name)
    if factors is None:
        return False
    a, b = (factor.flatten(1) for factor in factors)
    delta = layer.kind.orient(layer.get_delta_weight(name), layer.get_base_layer()).flatten(1)
    if b.shape[1] != a.shape[0] or delta.shape != (b.shape[0], a.shape[1]):
        return False
    return torch.allclose(delta, (layer.scaling[name] * (b @ a)).to(delta), rtol=1e-3, atol=1e-4 * delta.abs().max())

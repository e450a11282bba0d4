"""EVA: A from the principal components of each layer's inputs, ranks by what they explain (arXiv 2410.07170)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peft.core.base.kinds import innermost
from peft.core.files.entries import configs_of
from peft.core.layer.classes import is_own
from peft.core.layer.parallel import several_processes
from peft.core.model.walk import layers_of
from peft.errors import PeftWarning, some
from peft.tuners.lora.anew import start_from
from peft.tuners.lora.components import Watched, gathered
from peft.tuners.lora.config import EvaConfig, LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.preparing import rows, targets_of


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """``model(**inputs)``."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> torch.Tensor | None:
    """Which tokens count, ``[batch, length]``: those that are no padding and, with ``use_label_mask``, have a label.

    Raises:
        ValueError: if the batch is no dict.
    """
    if not isinstance(model_input, Mapping):
        raise ValueError(
            f"a batch is expected to be a dict of a language model's inputs, got a {type(model_input).__name__}. Give "
            "prepare_model_inputs_fn=None, or a function of your own."
        )
    options = peft_config.eva_config or EvaConfig()
    mask, labels = model_input.get("attention_mask"), model_input.get("labels")
    if labels is not None and options.use_label_mask:
        labelled = labels != options.label_mask_value
        mask = labelled if mask is None else mask.bool() & labelled
    return None if mask is None else mask.bool()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: torch.Tensor, model_input: torch.Tensor | None, layer_name: str
) -> torch.Tensor:
    """The rows ``[n, in]`` of a layer's input at the tokens that count.

    Args:
        model_input: a mask ``[batch, length]``, or the rows and columns of tokens ``[n, 2]``; None: all.

    Raises:
        ValueError: if it is something else, such as a batch that no ``prepare_model_inputs_fn`` has looked at.
    """
    if isinstance(layer_input, (tuple, list)):
        layer_input = layer_input[0]
    flat = layer_input.reshape(-1, layer_input.shape[-1])
    if model_input is None:
        return flat
    chosen = model_input.to(flat.device) if isinstance(model_input, torch.Tensor) else None
    if chosen is not None and chosen.dtype == torch.bool:
        return flat[chosen.reshape(-1)] if chosen.numel() == len(flat) else flat
    if chosen is None or chosen.is_floating_point() or chosen.dim() != 2 or chosen.shape[1] != 2:
        raise ValueError(
            "which tokens count is a mask [batch, length] or their places [n, 2], and none of these was given for "
            f"{layer_name}. Without prepare_model_inputs_fn give prepare_layer_inputs_fn=None, too, for all tokens."
        )
    return layer_input[chosen.T.unbind()]


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable | None,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | dict[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """What A is to start from: for each layer that gets a rank r the vectors ``[r, in * kernel]``, by module name.

    Batches are taken, over and over if need be, until the components that will be used turn no more (``tau``).

    Args:
        model: with its adapter, or plain with ``peft_config``.
        dataloader: batches for ``forward_fn(model, batch)``, by default ``model(**batch)``.
        prepare_model_inputs_fn: ``(batch, config)`` -> what the next function gets; by default a mask of tokens.
        prepare_layer_inputs_fn: ``(layer_input, that, layer_name)`` -> rows ``[n, in]``, or a dict of such functions
            by layer name. None: all rows; of a convolution all patches.
        gather_distributed_inputs: with several processes, all rows of all of them count, so all get the same.
            False: each process has all the data.

    Raises:
        ValueError: if there is no config, no layer, or a layer saw no input.
    """
    if (config := peft_config or configs_of(model).get(adapter_name)) is None:
        raise ValueError("peft_config is needed for a model without adapters.")
    if dataloader is None:
        raise ValueError("dataloader is required if eva_state_dict is not provided")
    options = config.eva_config or EvaConfig()
    layers, kinds, ranks = _layers(model, config, adapter_name)
    shapes = {name: kind.shape(innermost(layers[name])) for name, kind in kinds.items()}
    state: dict[str, Any] = {}
    several = gather_distributed_inputs and several_processes()

    def run(batch: Any) -> None:
        prepare = prepare_model_inputs_fn
        state["inputs"] = batch if prepare is None else prepare(batch, config)
        (forward_fn or forward_fn_dict)(model, _moved(batch, model))

    def take(name: str, x: torch.Tensor) -> torch.Tensor:
        chosen = prepare_layer_inputs_fn
        function = chosen.get(name) if isinstance(chosen, dict) else chosen
        if function is None or len(shapes[name]) > 2:
            found = rows(kinds[name], innermost(layers[name]), x)
        else:
            found = function(x, state["inputs"], name)
        return gathered(found) if several else found

    most = {n: min(round(r * options.rho), math.prod(shapes[n][1:])) for n, r in ranks.items()}
    watched = Watched(model, layers, ranks, most, options.tau, run, take)
    components, given = watched.components(dataloader, show_progress_bar)
    return {name: _leading(components[name].pca, rank, options.whiten) for name, rank in given.items() if rank}


def _leading(pca: Any, rank: int, whiten: bool) -> torch.Tensor:
    """The first components of a layer's inputs, ``[r, in * kernel]``."""
    vectors = pca.components_[:rank]
    return vectors / pca.singular_values_[:rank, None].sqrt() if whiten else vectors


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable | None = None,
    eva_state_dict: dict[str, torch.Tensor] | None = None,
    forward_fn: Callable | None = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | dict[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start a LoRA of ``init_lora_weights="eva"`` from data; call it after :func:`get_peft_model`.

    A becomes the principal components of the layer's inputs, B is zero. Ranks are shared out anew: a layer whose
    inputs are explained by few directions gets few, and none at all takes it out of the adapter. The config's
    ``rank_pattern`` and ``alpha_pattern`` say so afterwards.

    Args:
        dataloader, forward_fn, ...: see :func:`get_eva_state_dict`.
        eva_state_dict: what that has given; then no data are needed.

    Raises:
        ValueError: if there is neither, or the model has no such adapter.

    Example:
        >>> config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
        >>> peft_model = get_peft_model(model, config)
        >>> initialize_lora_eva_weights(peft_model, dataloader)
    """
    config = configs_of(model).get(adapter_name)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"the model has no LoRA called {adapter_name!r}: call get_peft_model first.")
    if config.init_lora_weights != "eva":
        raise ValueError(f"adapter {adapter_name!r} has init_lora_weights={config.init_lora_weights!r}, not 'eva'.")
    if eva_state_dict is None:
        functions = (forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn)
        options = (adapter_name, gather_distributed_inputs, show_progress_bar)
        eva_state_dict = get_eva_state_dict(model, dataloader, config, *functions, *options)
    start_from(model, config, adapter_name, _layers(model, config, adapter_name)[0], eva_state_dict)


def _layers(model: nn.Module, config: LoraConfig, name: str) -> tuple[dict[str, nn.Module], dict, dict[str, int]]:
    """The layers to look at by module name, their kinds, and their ranks now."""
    adapted = {path: layer for path, layer in layers_of(model) if is_own(layer, LoraLayer) and name in layer}
    unseen = {path for path, layer in adapted.items() if layer.kind.lookup or layer.kind.opaque}
    if adapted and unseen:
        warnings.warn(
            f"EVA looks at the inputs of linear and convolution layers; {some(unseen)} "
            f"({len(unseen)} in all) have none that it could take, and keep the default start and rank.",
            PeftWarning,
        )
    adapted = {path: layer for path, layer in adapted.items() if path not in unseen}
    if adapted:
        ranks = {path: layer.r[name] for path, layer in adapted.items()}
        return dict(adapted), {path: layer.kind for path, layer in adapted.items()}, ranks
    targets = targets_of(model, config, "eva")
    ranks = {key: config.rank_at(key) for key in targets}
    return {k: t.module for k, t in targets.items()}, {k: t.kind for k, t in targets.items()}, ranks


def _moved(batch: Any, model: nn.Module) -> Any:
    """A batch on the device of the model."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return {name: _moved(value, model) for name, value in batch.items()}
    return batch.to(device) if hasattr(batch, "to") else batch

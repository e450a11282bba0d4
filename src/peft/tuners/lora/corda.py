"""CorDA's preparation: the covariance of each layer's inputs, and what it decomposes (arXiv 2406.05223)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from peft.core.base.kinds import kind_of
from peft.core.base.storage import storage_of
from peft.core.model.targeting import Target
from peft.tuners.lora.config import CordaConfig, LoraConfig
from peft.tuners.lora.preparing import Means, evaluating, read_cache, rows, seen_by, targets_of, write_cache
from peft.tuners.lora.starts import corda


@dataclass
class CordaEigens:
    """W = U S V^T over r directions: ``S_WC`` ``[r]``, ``U_WC`` ``[out, r]``, ``V_WC`` ``[in, r]``."""

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Prepare a model for ``init_lora_weights="corda"``; :func:`get_peft_model` comes next.

    Args:
        model: the plain model. Each adapted layer gets an attribute ``eigens``, :class:`CordaEigens`.
        lora_config: with ``corda_config``: which directions, and files that keep covariances and results.
        run_model: runs the calibration data through the model. Not needed if a file has what it is for.
        hooked_model: the model that ``run_model`` calls, if that is another one with modules of the same names.

    Raises:
        ValueError: if ``run_model`` is missing, or a layer saw no input.

    Example:
        >>> config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))
        >>> preprocess_corda(model, config, run_model=lambda: [model(**batch) for batch in batches])
        >>> peft_model = get_peft_model(model, config)
    """
    options = lora_config.corda_config or CordaConfig()
    targets = targets_of(model, lora_config, "corda")
    results = {f"{name}.eigens.{part}" for name in targets for part in _PARTS}
    if stored := read_cache(options.cache_file, results):
        for name, target in targets.items():
            parts = {part: stored[f"{name}.eigens.{part}"] for part in _PARTS}
            target.module.__dict__["eigens"] = CordaEigens(**parts)
        return
    covariances = read_cache(options.covariance_file, set(targets))
    if covariances is None:
        if run_model is None:
            raise ValueError("CorDA needs run_model, which runs the calibration data, as no file has covariances yet.")
        seen = {n: hooked_model.get_submodule(n) if hooked_model else t.module for n, t in targets.items()}
        with evaluating(hooked_model or model):
            covariances = measured(seen, run_model, options.use_float16_for_covariance)
        write_cache(covariances, options.covariance_file)
    for name, target in tqdm(targets.items(), desc="CorDA", disable=not options.verbose and len(targets) < 32):
        rank = lora_config.rank_at(name)
        # Each is `[in, in]`: none is kept longer than it is needed.
        covariance = covariances[name] if not options.prune_temporary_fields else covariances.pop(name)
        target.module.__dict__["eigens"] = _eigens(target, covariance, rank, options)
        if not options.prune_temporary_fields:
            target.module.__dict__["covariance_matrix"] = covariance
    made = {name: target.module.__dict__["eigens"] for name, target in targets.items()}
    write_cache({f"{n}.eigens.{p}": getattr(e, p).cpu() for n, e in made.items() for p in _PARTS}, options.cache_file)


def measured(
    modules: dict[str, nn.Module], run_model: Callable[[], None], half: bool = False
) -> dict[str, torch.Tensor]:
    """The mean over all calls of X^T X, by layer, X being an input ``[n, in]`` over the magnitude of its maximum.

    That is of the uppermost entry, as the reference has it, and not of the one furthest from zero.

    Raises:
        ValueError: if a layer was not called.
    """
    means = Means()

    def see(name: str, module: nn.Module, x: torch.Tensor) -> None:
        kind = kind_of(module)
        assert kind is not None
        x = rows(kind, module, x).float()
        largest = x.max().abs()
        x = x / torch.where(largest > 0, largest, x.abs().max()).clamp_min(torch.finfo(x.dtype).tiny)
        means.add(name, (x.T @ x).to(torch.float16 if half else torch.float32))

    with seen_by(modules.items(), see):
        run_model()
    return means.of(
        {name: name for name in modules},
        "saw no input while the calibration data ran (a module that holds it may read its weight instead of calling "
        "it); leave it out of target_modules, or start with another method.",
    )


_PARTS = ("S_WC", "U_WC", "V_WC")


def _eigens(target: Target, covariance: torch.Tensor, rank: int, options: CordaConfig) -> CordaEigens:
    module, kind = target.module, target.kind
    weight = kind.orient(storage_of(module, kind.weight).read(module, kind.weight), module).flatten(1).float()
    u, s, v = corda(weight, covariance.to(weight), rank, least=options.corda_method == "kpm")
    return CordaEigens(s.contiguous(), u.contiguous(), v.contiguous())

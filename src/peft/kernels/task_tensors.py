"""Merging task tensors: the differences that fine-tuning on several tasks made to one tensor.

Task arithmetic (arXiv 2212.04089), TIES (arXiv 2306.01708), DARE (arXiv 2311.03099), DELLA (arXiv 2406.11617), model
breadcrumbs (arXiv 2312.06795), KnOTS (arXiv 2410.19735), greedy soups (arXiv 2203.05482).

Every function leaves its arguments as they are. ``task_tensors`` have one shape and one weight each; the result has
their shape and the dtype that tensors and weights promote to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from peft.combining import PruningMethod
from peft.errors import ConfigChoiceError


def reshape_weight_task_tensors(task_tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weights ``[tasks]`` with trailing axes of size one, so that they multiply ``task_tensors [tasks, ...]``."""
    return weights.reshape(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the ``int(density * numel)`` entries of largest magnitude, set the others to zero (TIES, "trim")."""
    magnitudes, count = tensor.abs().flatten(), int(density * tensor.numel())
    if count == 0:
        return torch.zeros_like(tensor)
    # The least that is kept, rather than all that is: topk holds an index beside each of these.
    least = magnitudes.kthvalue(magnitudes.numel() - count + 1).values
    mask = magnitudes > least
    missing = count - int(mask.sum())
    mask[(magnitudes == least).nonzero()[:missing, 0]] = True
    return torch.where(mask.view(tensor.shape), tensor, 0)


def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """Keep every entry with probability ``density``, set the others to zero (DARE, "drop").

    With ``rescale`` those kept are divided by ``density``, which keeps the expectation. The draw comes from torch's
    CPU generator in float32, so that a seed gives the same mask on every device and for every dtype.
    """
    mask = torch.bernoulli(torch.full(tensor.shape, density)).to(tensor.device, torch.bool)
    pruned = torch.where(mask, tensor, 0)
    return pruned / density if rescale and density > 0 else pruned


def magnitude_sampled_pruning(tensor: torch.Tensor, density: float, window: float | None = None) -> torch.Tensor:
    """Drop entries at random, small ones more often, and rescale those kept (DELLA's MagPrune, eq. 1 to 4).

    Within each row the entries are ranked by magnitude. With n in a row and drop rate p = 1 - density, that of rank i
    (0 the smallest) is dropped with probability ``p + window / 2 - i * window / n``; what is kept is divided by the
    probability of keeping it. The draw comes from torch's CPU generator, as in :func:`random_pruning`.

    Args:
        tensor: ``[..., n]``. window: between the smallest and the largest probability; by default as wide as it can
            be, up to 0.2.

    Raises:
        ValueError: for a window with which probabilities leave [0, 1].
    """
    drop = 1 - density
    widest = 2 * min(drop, 1 - drop)
    window = min(0.2, widest) if window is None else window
    if not 0 <= window <= widest + 1e-12:
        raise ValueError(f"with density {density} the window can be at most {widest}, got {window}")
    count = tensor.shape[-1]
    order = tensor.abs().argsort(-1).argsort(-1).cpu()
    dropped = (drop + window / 2 - order * (window / count)).clamp(0, 1)
    kept = 1 - dropped
    mask = torch.bernoulli(kept).to(tensor.device, torch.bool)
    return torch.where(mask, tensor / kept.to(tensor.device, tensor.dtype), 0)


def breadcrumbs_pruning(tensor: torch.Tensor, density: float, outliers: float = 0.01) -> torch.Tensor:
    """Zero the largest entries, as outliers, and the smallest, so that a fraction ``density`` is left (breadcrumbs).

    Args:
        tensor: of any shape. outliers: the fraction of the largest entries to drop (gamma).

    Raises:
        ValueError: if more than all entries would have to be dropped.
    """
    if not 0 <= outliers <= 1 - density:
        raise ValueError(f"with density {density} the outliers can be at most {1 - density:g}, got {outliers}")
    count = tensor.numel()
    top, kept = int(outliers * count), int(density * count)
    order = tensor.abs().flatten().argsort(descending=True)
    mask = torch.zeros(count, dtype=torch.bool, device=tensor.device)
    mask[order[top : top + kept]] = True
    return torch.where(mask.view(tensor.shape), tensor, 0)


def prune(tensor: torch.Tensor, density: float, method: PruningMethod, rescale: bool = False) -> torch.Tensor:
    """Set all but a fraction ``density`` of the entries to zero, by magnitude, at random, or in between.

    Args:
        tensor: of any shape.
        density: fraction to keep. 1 keeps everything, and so does more than 1, with a warning.
        method: `"magnitude"`, `"random"`, or `"sampled"` (:func:`magnitude_sampled_pruning`), `"breadcrumbs"`
            (:func:`breadcrumbs_pruning`).
        rescale: divide what is kept by ``density``; only for `"random"`.

    Raises:
        ValueError: for a density below 0 or another method.
    """
    if method not in ("magnitude", "random", "sampled", "breadcrumbs"):
        raise ValueError(
            f"Unknown pruning method {method!r}; choose 'magnitude' or 'random', or 'sampled' or 'breadcrumbs'"
        )
    if not density >= 0:
        raise ValueError(f"The density is the fraction of entries to keep and must be >= 0, got {density}")
    if density > 1:
        warnings.warn(f"A density of {density} keeps all entries, as 1 does: nothing is pruned", stacklevel=2)
    if density >= 1:
        return tensor
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "sampled":
        return magnitude_sampled_pruning(tensor, density)
    if method == "breadcrumbs":
        return breadcrumbs_pruning(tensor, density, outliers=min(0.01, 1 - density))
    return random_pruning(tensor, density, rescale)


def calculate_majority_sign_mask(
    tensor: torch.Tensor, method: Literal["total", "frequency"] = "total"
) -> torch.Tensor:
    """Where the entries have the sign that the tasks agree on (TIES, "elect sign").

    Args:
        tensor: task tensors ``[tasks, ...]``.
        method: the sign of the sum of the values (`"total"`) or of the sum of their signs (`"frequency"`). A tie
            counts as positive. Entries that are zero have neither sign.

    Returns:
        A mask, bool, of the shape of ``tensor``.

    Raises:
        ConfigChoiceError: for another method.
    """
    if method not in ("total", "frequency"):
        raise ConfigChoiceError(f"Unknown way to elect the majority sign: {method!r}; choose 'total' or 'frequency'")
    positive = (tensor if method == "total" else tensor.sign()).sum(dim=0) >= 0
    return torch.where(positive, tensor > 0, tensor < 0)


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """The mean over the tasks of the entries within the mask, and zero where there is none (TIES, "disjoint merge").

    Args:
        task_tensors: ``[tasks, ...]``.
        majority_sign_mask: bool, of the same shape.
    """
    kept = torch.where(majority_sign_mask, task_tensors, 0)
    return kept.sum(dim=0) / majority_sign_mask.sum(dim=0).clamp(min=1)


def _stacked(
    task_tensors: list[torch.Tensor] | torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors ``[tasks, ...]``, and the weights to multiply them by."""
    if len(task_tensors) != len(weights):
        raise ValueError(f"There are {len(task_tensors)} task tensors, but {len(weights)} weights; give one each")
    shapes = {tuple(tensor.shape) for tensor in task_tensors}
    if len(shapes) > 1:
        raise ValueError(f"Only task tensors of one shape can be merged, got {sorted(shapes)}")
    stacked = torch.stack(list(task_tensors))
    return stacked, reshape_weight_task_tensors(stacked, weights.to(stacked.device))


def task_arithmetic(task_tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the task tensors (arXiv 2212.04089).

    Raises:
        ValueError: if the tensors' shapes differ, or their number is not that of the weights.
    """
    stacked, factors = _stacked(task_tensors, weights)
    return (stacked * factors).sum(dim=0)


def magnitude_prune(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """The weighted sum of the task tensors, each pruned to its entries of largest magnitude.

    Raises:
        ValueError: as :func:`prune` and :func:`task_arithmetic`.
    """
    return task_arithmetic([prune(tensor, density, method="magnitude") for tensor in task_tensors], weights)


def _elect_and_merge(
    pruned: list[torch.Tensor], weights: torch.Tensor, majority_sign_method: Literal["total", "frequency"]
) -> torch.Tensor:
    stacked, factors = _stacked(pruned, weights)
    # The tasks vote before they are weighted: a negative weight subtracts a task, and does not turn its vote.
    mask = calculate_majority_sign_mask(stacked, majority_sign_method)
    return disjoint_merge(stacked * factors, mask)


def ties(
    task_tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> torch.Tensor:
    """TIES (arXiv 2306.01708): trim by magnitude, elect a sign for every entry, average what has it, weighted.

    Raises:
        ValueError: as :func:`prune`, :func:`task_arithmetic` and :func:`calculate_majority_sign_mask`.
    """
    pruned = [prune(tensor, density, method="magnitude") for tensor in task_tensors]
    return _elect_and_merge(pruned, weights, majority_sign_method)


def dare_linear(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """DARE (arXiv 2311.03099): drop entries at random, rescale the others, and sum them weighted.

    Raises:
        ValueError: as :func:`prune` and :func:`task_arithmetic`.
    """
    return task_arithmetic([prune(tensor, density, method="random", rescale=True) for tensor in task_tensors], weights)


def dare_ties(
    task_tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> torch.Tensor:
    """DARE's random drop and rescale, followed by the sign election and averaging of TIES.

    Raises:
        ValueError: as :func:`prune`, :func:`task_arithmetic` and :func:`calculate_majority_sign_mask`.
    """
    pruned = [prune(tensor, density, method="random", rescale=True) for tensor in task_tensors]
    return _elect_and_merge(pruned, weights, majority_sign_method)


def della(
    task_tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    window: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> torch.Tensor:
    """DELLA (arXiv 2406.11617): drop by magnitude and chance, elect a sign for every entry, average what has it.

    Raises:
        ValueError: as :func:`magnitude_sampled_pruning` and :func:`task_arithmetic`.
    """
    pruned = [magnitude_sampled_pruning(tensor, density, window) for tensor in task_tensors]
    return _elect_and_merge(pruned, weights, majority_sign_method)


def breadcrumbs(
    task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float, outliers: float = 0.01
) -> torch.Tensor:
    """Model breadcrumbs (arXiv 2312.06795): the weighted sum without the outliers and the small entries of each.

    Raises:
        ValueError: as :func:`breadcrumbs_pruning` and :func:`task_arithmetic`.
    """
    return task_arithmetic([breadcrumbs_pruning(tensor, density, outliers) for tensor in task_tensors], weights)


def aligned(task_tensors: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """KnOTS (arXiv 2410.19735): the tasks' updates in one basis, by a singular value decomposition of them all.

    ``[dW_1 ... dW_n] = U S [V_1 ... V_n]``, side by side; what is merged are the V_i.

    Args:
        task_tensors: matrices ``[..., out, in]``.

    Returns:
        (U S ``[..., out, k]``, the V_i ``[..., k, in]``).
    """
    u, s, vh = torch.linalg.svd(torch.cat(task_tensors, -1), full_matrices=False)
    return u * s.unsqueeze(-2), list(vh.split([tensor.shape[-1] for tensor in task_tensors], -1))


def knots(
    task_tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> torch.Tensor:
    """KnOTS with TIES: the updates are aligned, TIES merges what is the tasks' own, in the common basis.

    Raises:
        ValueError: as :func:`ties`.
    """
    basis, parts = aligned(task_tensors)
    return basis @ ties(parts, weights, density, majority_sign_method)


def greedy_soup(candidates: Sequence[str], metric: Callable[[list[str]], float]) -> list[str]:
    """The greedy soup (arXiv 2203.05482, recipe 1): which of several adapters to average.

    The candidates are tried from the best to the worst one; each stays if the average with it is no worse.

    Args:
        candidates: names of adapters. metric: how good the average of some is, on held-out data; higher is better.

    Example::

        def accuracy(names):
            model.add_weighted_adapter(names, [1 / len(names)] * len(names), "soup", combination_type="svd")
            ...

    Raises:
        ValueError: there are no candidates.
    """
    if not candidates:
        raise ValueError("There are no candidates to average")
    alone = {name: metric([name]) for name in candidates}
    first, *others = sorted(candidates, key=lambda name: alone[name], reverse=True)
    soup, best = [first], alone[first]
    for name in others:
        found = metric([*soup, name])
        if found >= best:
            soup, best = [*soup, name], found
    return soup

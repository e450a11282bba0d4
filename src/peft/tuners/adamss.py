"""AdaMSS: dW = B A V, with a pair A, B for each cluster of rows of W's singular vectors (openreview 8ZdWmpYxT0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from peft.config import LayerSelection, ModulesToSave, TargetModules, option
from peft.core.adapter import part, setting
from peft.core.base.kinds import fan
from peft.core.families import LowRank, Shift
from peft.core.layer.buffers import BufferDict
from peft.core.model.registry import define_tuner
from peft.core.model.walk import layers_of
from peft.errors import ConfigError, MissingPackageError
from peft.peft_types import PeftType
from peft.tuners.adalora_utils import BudgetTuner, Sensitivity, budget_at


_asa = partial(option, needs="use_asa")


@dataclass
class AdamssConfig(TargetModules, ModulesToSave, LayerSelection):
    """Config of AdaMSS: the outputs of a layer are divided into groups that behave alike, each with a small pair.

    For updates with fewer numbers than a LoRA of the same rank: about ``subspace_rank (out + num_subspaces r)`` a
    layer. Needs scikit-learn. With ``use_asa`` the training loop calls ``model.update_and_allocate(step)`` after each
    backward pass and before the gradients are cleared, and ever fewer of the pairs train.
    """

    METHOD: ClassVar[PeftType] = PeftType.ADAMSS

    r: int = option(100, "How many singular directions of W, with the bias as one more column, are kept.", minimum=1)
    num_subspaces: int = option(5, "Number of clusters of rows.", minimum=1)
    subspace_rank: int = option(1, "Rank of the pair of each cluster.", minimum=1)
    init_weights: Literal["orthogonal", False] | None = option(
        "orthogonal",
        "Start with B = 0, so that nothing changes; B is drawn at random for None and False.",
        choices=("orthogonal", False),
    )
    use_asa: bool = option(False, "Adaptive subspace allocation: train the most important pairs alone.")
    asa_target_subspaces: int = _asa(50, "How many pairs of the whole model train in the end.", minimum=1)
    init_warmup: int = _asa(50, "Step at which the number of pairs that train starts to fall.", minimum=0)
    final_warmup: int = _asa(1000, "Step at which it has fallen to asa_target_subspaces.", minimum=1)
    mask_interval: int = _asa(100, "Steps from one choice of pairs to the next.", minimum=1)
    asa_importance_beta: float = _asa(0.85, "Decay of the average of importances.", minimum=0, below=1)
    asa_uncertainty_beta: float = _asa(0.85, "Decay of the average of their uncertainty.", minimum=0, below=1)
    asa_schedule_exponent: float = _asa(3.0, "How fast the number of pairs falls at first: 1 is a line.", minimum=0)
    use_dynamic_rank: bool = option(False, "Leave out directions of a cluster with small singular values.")
    svd_threshold: float = option(
        0.1, "Squares kept: above this share of the largest's.", minimum=0, maximum=1, needs="use_dynamic_rank"
    )
    random_seed: int = option(
        0, "Seed of the randomised SVD. Clusters are not in the file: it must stay what it was in training."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_asa and self.init_warmup >= self.final_warmup:
            raise ConfigError(
                f"AdamssConfig: init_warmup={self.init_warmup} must be less than final_warmup={self.final_warmup}."
            )


def adamss_pair(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], v: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[dW | c] = P blockdiag(B_1 ... B_K) [A_1; ...; A_K] V as a pair of matrices.

    Args:
        a, b: A_k ``[q_k, r]`` and B_k ``[rows of the cluster, q_k]``. v: ``[r, in * kernel (+ 1)]``.
        places: of each output, which row of the diagonal it is, ``[out]``.

    Returns:
        ``[q, in * kernel (+ 1)]`` and ``[out, q]``, q the sum of the ranks.
    """
    stacked = torch.cat(list(a))
    return stacked @ v.to(stacked.dtype), torch.block_diag(*b)[places]


class Adamss(LowRank, Shift):
    """dW and the bias' change c: [dW | c] = P blockdiag(B_1 ... B_K) [A_1; ...; A_K] V.

    V ``[r, in * kernel (+ 1)]`` is frozen and in the file (``adamss_newB``): the largest singular directions of
    [W | b], or of W where there is no bias. A_k is ``[q, r]``, B_k ``[rows of the cluster, q]``, and P puts the rows
    in their places.
    """

    adamss_A, adamss_B = part(nn.ModuleDict), part(nn.ModuleDict)
    adamss_newB = part(BufferDict)
    adamss_places = part(BufferDict, remade=True)
    num_subspaces = setting()

    def create(self, config: AdamssConfig, key: str) -> None:
        weight, bias = self.base_weight().detach().flatten(1).float().cpu(), self.base_bias()
        if bias is not None:
            weight = torch.cat([weight, bias.detach().float().cpu()[:, None]], 1)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # the same clusters wherever the model is
            torch.default_generator.manual_seed(config.random_seed)
            u, _, v = torch.svd_lowrank(weight, q=min(config.r, *weight.shape), niter=2)
        clusters = cluster(u, config.num_subspaces)
        self.num_subspaces, self.adamss_newB = len(clusters), v.T.contiguous()
        self.adamss_places = torch.cat(clusters).argsort()
        pairs = [first_pair(u[rows], config) for rows in clusters]
        self.adamss_A, self.adamss_B = (nn.ParameterList(tensors) for tensors in zip(*pairs))

    def augmented(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair whose product is [dW | c]."""
        return adamss_pair(self.adamss_A, self.adamss_B, self.adamss_newB, self.adamss_places)

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        inner, outer = self.augmented()
        return inner[:, : fan(self.shape)[1]], outer

    def shift(self) -> torch.Tensor | None:
        if self.adamss_newB.shape[1] == fan(self.shape)[1]:
            return None
        inner, outer = self.augmented()
        return (outer @ inner[:, -1:]).flatten()

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        return self.shifted(super().output(x, y, base_y))


def first_pair(u: torch.Tensor, config: AdamssConfig) -> tuple[nn.Parameter, nn.Parameter]:
    """A_k and B_k as they start, for the cluster with these rows of singular vectors, ``[rows, r]``."""
    _, s, directions = torch.linalg.svd(u, full_matrices=False)
    q = min(config.subspace_rank, len(s))
    if config.use_dynamic_rank:
        q = max(1, min(q, int((s**2 > config.svd_threshold * s[0] ** 2).sum())))
    b = torch.zeros(len(u), q) if config.init_weights else torch.randn(len(u), q) * 0.01
    return nn.Parameter(directions[:q].clone()), nn.Parameter(b)


def cluster(rows: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The indices of similar rows, in at most ``count`` clusters, by k-means. The order is part of the file format.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise MissingPackageError("AdaMSS clusters weights by scikit-learn: pip install scikit-learn.") from None
    # One seed for all: the clusters are in no file.
    means = KMeans(min(count, len(rows)), init="random", n_init=1, random_state=123456789)
    labels = torch.from_numpy(means.fit(rows.numpy()).labels_)
    found = ((labels == k).nonzero()[:, 0] for k in range(means.n_clusters))
    return [indices for indices in found if len(indices)]


class AdamssTuner(BudgetTuner):
    """What AdaMSS does to a whole model: it chooses which pairs go on training."""

    def update_and_allocate(self, global_step: int) -> None:
        """Choose the pairs that train; call it in each step after the backward pass, with the number of the step.

        The others keep their values. Does nothing for adapters without ``use_asa``.

        Raises:
            ValueError: there are no gradients.
        """
        for name in self.active_adapters:
            config = self.peft_config[name]
            found = [layer.adapters.get(name) for _, layer in layers_of(self.model)]
            pairs = [pair for a in found if isinstance(a, Adamss) for pair in zip(a.adamss_A, a.adamss_B)]
            if not config.use_asa or not any(p.requires_grad for pair in pairs for p in pair):
                continue
            sensitivity = Sensitivity(config.asa_importance_beta, config.asa_uncertainty_beta)
            budget = self.kept(name, {"left": list(range(len(pairs))), "by": sensitivity})
            if config.init_warmup <= global_step <= config.final_warmup:
                budget["left"] = self._observe(config, global_step, pairs, **budget)
            for i in set(range(len(pairs))) - set(budget["left"]):
                for p in pairs[i]:
                    p.grad = None
                    p.requires_grad_(False)

    @staticmethod
    def _observe(config: Any, step: int, pairs: list, left: list[int], by: Sensitivity) -> list[int]:
        for i in left:
            for place, p in enumerate(pairs[i]):
                by.observe((i, place), p)
        if step % config.mask_interval and step != config.final_warmup:
            return left
        done = (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
        count = budget_at(done, len(pairs), config.asa_target_subspaces, config.asa_schedule_exponent)
        scores = {i: sum(by.score((i, place)).mean().item() for place in (0, 1)) for i in left}
        # A pair that was left out never comes back.
        return sorted(sorted(left, key=scores.__getitem__, reverse=True)[:count])


AdamssModel = define_tuner(Adamss, AdamssConfig, base=AdamssTuner)

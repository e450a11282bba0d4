"""MonteCLoRA: training draws A around its value, from a mixture that is learned (arXiv 2411.04358)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributions import Dirichlet, kl_divergence

from peft.core.adapter import part, setting
from peft.core.base.kinds import Kind
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Lora


def variances(std: torch.Tensor, chi: torch.Tensor) -> torch.Tensor:
    """The diagonal ``[r]`` of a covariance from Wishart(diag(exp(2 std)), r), at least 0.001.

    Args:
        std: logarithms of standard deviations, ``[r]``. chi: squares, ``[r]``, each a sum of r squared normal numbers.
    """
    return ((2 * std).exp() * chi).clamp_min(1e-3)


def mixture(logits: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Weights ``[N]`` from Dirichlet(alpha), alpha = exp(logits), by its logistic-normal approximation.

    The softmax of a normal vector with mean ln alpha_i - mean(ln alpha) and variance (1 - 2/N) / alpha_i + sum(1 /
    alpha) / N^2; z ``[N]`` is standard normal.
    """
    n, inverse = len(logits), (-logits).exp()
    spread = inverse * (1 - 2 / n) + inverse.sum() / n**2
    return (logits - logits.mean() + spread.clamp_min(0).sqrt() * z).softmax(0)


def deviation(z: torch.Tensor, weights: torch.Tensor, var: torch.Tensor, scale: float) -> torch.Tensor:
    """sum_n w_n e_n ``[r, in]``, the columns of e_n normal with covariance scale^2 diag(var).

    Args:
        z: ``[N, r, in]``, standard normal. weights: ``[N]``. var: ``[r]``.
    """
    return torch.einsum("n,nri->ri", weights, z) * (scale * var.sqrt())[:, None]


def divergence(std: torch.Tensor, logits: torch.Tensor, var: torch.Tensor, prior: float) -> torch.Tensor:
    """What the loss pays for leaving the priors: KL of the Wishart, of the N Gaussians, and of the Dirichlet.

    The priors are Wishart(I, r), N(0, I), and Dirichlet with all concentrations ``prior``. The last of the three is
    the divergence itself; the reference computes another term there, which can be below zero, so its loss differs.

    Args:
        std: ``[r]``. logits: ``[N]``. var: ``[r]``, as drawn.
    """

    def excess(v: torch.Tensor) -> torch.Tensor:
        return (v - v.log() - 1).sum() / 2

    alpha = logits.exp()
    dirichlet = kl_divergence(Dirichlet(alpha), Dirichlet(torch.full_like(alpha, prior)))
    return len(std) * excess((2 * std).exp()) + len(logits) * excess(var) + dirichlet


class Sampler(nn.Module):
    """What is learned of the draws, ``std_prior [r]`` and ``expert_weights_prior [N]``, and what was drawn last."""

    gaussian_var_prior: torch.Tensor
    expert_weights: torch.Tensor

    def __init__(self, r: int, samples: int) -> None:
        super().__init__()
        self.std_prior = nn.Parameter(torch.rand(r))
        self.expert_weights_prior = nn.Parameter(torch.rand(samples))
        self.register_buffer("gaussian_var_prior", torch.eye(r))
        self.register_buffer("expert_weights", torch.full((samples,), 1 / samples))


class MonteCLora(Lora):
    """In training A is A + sum_n w_n e_n, with N Gaussian samples e_n and their weights w_n; else this is plain LoRA.

    All of it is drawn in the forward from torch's generator of A's device: a seed repeats it, and so does a backward
    pass that computes the forward again. The loss gets :meth:`monteclora_penalty`, by
    :class:`peft.helpers.MontecloraTrainerMixin`.
    """

    option: ClassVar[str] = "monteclora_config"
    lora_monteclora_sampler = part(nn.ModuleDict)
    monteclora_options, monteclora_drawn = setting(), setting()
    fixed_rank: ClassVar[bool] = True
    random_in_training: ClassVar[bool] = True
    ties: ClassVar[bool] = False
    needs_dense_pair = "MonteCLoRA draws the pair of a whole weight"

    @classmethod
    def refuses(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        if kind.read_elsewhere:
            return "its weight is read by another computation, which would see none of MonteCLoRA's draws"
        if config.use_bdlora is not None and config.use_bdlora.target_modules_bd_a:
            return "MonteCLoRA's draws would fill the zeros between the blocks of BD-LoRA's A (target_modules_bd_a)"
        return super().refuses(kind, module, config)

    def make_pair(self, config: LoraConfig) -> None:
        super().make_pair(config)
        options: Any = config.monteclora_config
        self.monteclora_options = options
        self.lora_monteclora_sampler = Sampler(self.r, options.num_samples)

    def acting_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = super().acting_pair()
        return (a + self._draw(a), b) if self.training else (a, b)

    def _draw(self, a: torch.Tensor) -> torch.Tensor:
        """What is added to A, ``[r, in, *kernel]``, in this forward; zero for rows that are never trained."""
        sampler, options = self.lora_monteclora_sampler, self.monteclora_options
        std, logits = sampler.std_prior.float(), sampler.expert_weights_prior.float()
        r, n = len(std), len(logits)
        chi = torch.randn(r, r, device=std.device).square().sum(1)
        z = torch.randn(n, device=std.device)
        var, weights = variances(std, chi), mixture(logits, z)
        with torch.no_grad():
            sampler.gaussian_var_prior.copy_(var.diag())
            sampler.expert_weights.copy_(weights)
        self.monteclora_drawn = chi, z
        held = self.held_pair()[0]
        noise = torch.randn(n, r, held[0].numel(), device=std.device)
        added = self.of_inputs(deviation(noise, weights, var, options.sample_scaler).view_as(held)).to(a.dtype)
        return torch.cat([added, added.new_zeros(len(a) - r, *a.shape[1:])])

    def monteclora_penalty(self) -> torch.Tensor:
        """What the loss gets from this layer: the divergence of the last draw, and sum w^2 if that is asked for."""
        sampler, options = self.lora_monteclora_sampler, self.monteclora_options
        std, logits = sampler.std_prior.float(), sampler.expert_weights_prior.float()
        # Before the first draw: what chi and z are in the mean.
        chi, z = self.monteclora_drawn or (torch.full_like(std, len(std)), torch.zeros_like(logits))
        paid = options.kl_loss_weight * divergence(std, logits, variances(std, chi), options.dirichlet_prior)
        return paid + mixture(logits, z).square().sum() if options.use_entropy else paid

"""Two linear layers with block-diagonal LoRA, split over two processes. It imports little, as each starts anew."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F


def shard(rank: int, x: torch.Tensor, one: list[torch.Tensor], two: list[torch.Tensor]) -> torch.Tensor:
    """What this process computes of two layers: outputs of the first, inputs of the second, rank 4 and scale 2.

    Args:
        one: W ``[12, in]``, b, A ``[4, in]`` and the blocks of B ``[12, 2]``. two: W ``[out, 12]``, b, the blocks of A
            ``[4, 6]`` and B ``[out, 4]``.
    """
    own, ranks = slice(6 * rank, 6 * rank + 6), slice(2 * rank, 2 * rank + 2)
    weight, bias, a, b = one
    h = torch.tanh(F.linear(x, weight[own], bias[own]) + 2 * x @ a[ranks].T @ b[own].T)
    weight, bias, a, b = two
    y = F.linear(h, weight[:, own]) + 2 * h @ a[ranks].T @ b[:, ranks].T
    dist.all_reduce(y)  # the one exchange, which the base layers need without any adapter
    return y + bias


def process(rank: int, folder: str) -> None:
    """One of two; it leaves its output in the folder."""
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    x, layers = torch.load(f"{folder}/model.pt")
    torch.save(shard(rank, x, *layers), f"{folder}/{rank}.pt")
    dist.destroy_process_group()

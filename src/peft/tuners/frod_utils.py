"""What FROD computes with: the basis that like layers have in common, and a sparse product."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from peft.core.base.kinds import fan
from peft.core.layer.weight import unmerged_weight
from peft.kernels.linear import is_transformed
from peft.kernels.sparse import by_feature, paired_products
from peft.utils.error import ConfigError


def categories(layers: Sequence[Any]) -> list[str]:
    """What the layers are called within their blocks; those of one name and another size say their size as well."""
    sizes: dict[str, set[int]] = {}
    found = []
    for layer in layers:
        name = re.sub(r"^.*\.\d+\.", "", layer.key).replace(".", "_") or "model"
        if layer.kind.weight != "weight":
            name += f"_{layer.kind.weight}"
        found.append((name, layer.shape[0] if layer.kind.lookup else fan(layer.shape)[1]))
        sizes.setdefault(name, set()).add(found[-1][1])
    return [name if len(sizes[name]) == 1 else f"{name}_{size}" for name, size in found]


def directions(layer: Any) -> torch.Tensor:
    """W ``[out, in * kernel]``, or a table as ``[tokens, dim]``."""
    weight = unmerged_weight(layer).detach().flatten(1)
    return weight.T if layer.kind.lookup else weight


def common_basis(weights: Iterable[torch.Tensor], alpha: float) -> torch.Tensor:
    """V ``[n, n]`` of the higher-order generalised singular value decomposition (arXiv 1108.3371, section 3).

    Its columns are the eigenvectors, of length 1, of the mean over pairs of D_i D_j^-1, D = W^T W + alpha I. That is
    A B but for a shift and a factor, A and B the sums of all D and of all D^-1; with A = L L^T they are L times those
    of the symmetric L^T B L. One weight alone has its right singular vectors.

    Raises:
        ConfigError: some D has no inverse.
    """
    total, inverses, count = 0, 0, 0
    for weight in weights:
        wide = weight.double()
        d = wide.T @ wide + alpha * torch.eye(wide.shape[1], dtype=torch.double)
        factor, failed = torch.linalg.cholesky_ex(d)
        if failed:
            raise ConfigError(f"FrodConfig: with regularization_alpha={alpha} W^T W has no inverse. Raise it.")
        total, inverses, count = total + d, inverses + torch.cholesky_inverse(factor), count + 1
    if count == 1:
        v = torch.linalg.eigh(total)[1]
    else:
        factor = torch.linalg.cholesky(total)
        v = F.normalize(factor @ torch.linalg.eigh(factor.T @ inverses @ factor)[1], dim=0)
    largest = v.gather(0, v.abs().argmax(0, keepdim=True))
    return (v * largest.sign()).float().contiguous()  # the same signs on every machine


def coordinates(weight: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U ``[out, n]``, with columns of length 1, and l ``[n]`` for which W = U diag(l) V^T."""
    u = torch.linalg.solve(v.to(weight.device, torch.double), weight.double().T).T.contiguous()
    scales = u.norm(dim=0)
    return (u / scales.clamp_min(1e-30)).float(), scales.float()  # a direction that W lacks has no length


def sparse_product(h: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """S h along the last axis, for a sparse S given by its values and their places ``[2, nnz]``: rows, columns."""
    if is_transformed():  # torch.func knows no sparse tensors
        rows, columns = places
        return torch.zeros_like(h).index_add(-1, rows, (h[..., columns] * values).to(h.dtype))
    return SparseProduct.apply(h, values, places)


class SparseProduct(torch.autograd.Function):
    """S h along the last axis, for a sparse S given by its values and their places ``[2, nnz]``."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h, values, places)
        return _as_vectors(_sparse(values, places, h) @ _as_columns(h), h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        h, values, places = ctx.saved_tensors
        columns, of_h = _as_columns(gradient), None
        if ctx.needs_input_grad[0]:
            of_h = _as_vectors(_sparse(values, places.flip(0), h) @ columns, h)
        return of_h, paired_products(columns, _as_columns(h), *places).to(values.dtype), None


def _sparse(values: torch.Tensor, places: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """S, for vectors like h."""
    return torch.sparse_coo_tensor(places, values.to(_wide(h)), (h.shape[-1],) * 2, check_invariants=False)


def _as_columns(h: torch.Tensor) -> torch.Tensor:
    """Vectors as the columns of a matrix ``[n, tokens]``."""
    return by_feature(h.to(_wide(h)))


def _as_vectors(columns: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return columns.T.reshape(like.shape).to(like.dtype)


def _wide(h: torch.Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)  # CPUs have no sparse product of 16 bits

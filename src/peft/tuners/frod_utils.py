"""What FROD computes with: the basis that like layers have in common, and a sparse product."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from peft.core.base.kinds import fan
from peft.core.layer.weight import unmerged_weight
from peft.errors import ConfigError
from peft.kernels.linear import is_transformed
from peft.kernels.sparse import by_feature, paired_products


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


def common_basis(weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """V ``[n, n]`` of a higher-order generalised singular value decomposition (arXiv 2102.09822, section 3).

    The stacked weights ``[rows, n]`` are Q R, each weight Q_i R; V = R^T Z, the columns of Z the eigenvectors of the
    mean of (Q_i^T Q_i + alpha I)^-1. So V V^T is the sum of all W^T W. Fewer rows than n have no such R: there V has
    the right singular vectors of the stack.

    It is computed in single precision and in this order because one weight alone, or weights without a direction in
    common, leave Z to rounding, and files of 0.21.2 depend on what it makes of that.

    Raises:
        ConfigError: some Q_i^T Q_i + alpha I has no inverse.
    """
    stack = torch.cat([weight.float() for weight in weights])
    n = stack.shape[1]
    if len(stack) < n:
        return torch.linalg.svd(stack)[2].T.contiguous()
    q, r = torch.linalg.qr(stack)
    parts = q.split([len(weight) for weight in weights])
    try:
        inverses = [torch.linalg.inv(part.T @ part + alpha * torch.eye(n)) for part in parts]
    except torch.linalg.LinAlgError:
        raise ConfigError(
            f"FrodConfig: with regularization_alpha={alpha} there is no common basis, since a layer has fewer outputs "
            "than inputs. Raise it."
        ) from None
    return (r.T @ torch.linalg.eigh(torch.stack(inverses).mean(0))[1]).contiguous()


def off_diagonal_places(n: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    """Rows and columns ``[2, nnz]`` of different entries beside the diagonal of an ``[n, n]`` matrix.

    nnz is ``rate`` of all n^2 entries, rounded down, but one at least where the rate is above zero.
    """
    others = n * (n - 1)
    count = min(max(int(rate * n * n), 1 if rate > 0 else 0), others)
    chosen = torch.randperm(others, generator=generator, device="cpu")[:count]
    rows, columns = chosen // max(n - 1, 1), chosen % max(n - 1, 1)
    return torch.stack([rows, columns + (columns >= rows)])


def coordinates(weight: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U ``[out, n]``, with columns of length 1, and l ``[n]`` for which W = U diag(l) V^T."""
    wide, target = v.to(weight.device, torch.double), weight.double().T
    solved, failed = torch.linalg.solve_ex(wide, target)
    u = (torch.linalg.lstsq(wide.cpu(), target.cpu(), driver="gelsd").solution.to(wide) if failed else solved).T
    scales = u.norm(dim=0)
    u = (u / scales.clamp_min(1e-30)).float()  # a direction that W lacks has no length
    return u.contiguous(), scales.float()


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

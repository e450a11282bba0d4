"""The families of weight methods: what a method gives, and what follows from it for every operation."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from peft.core.base.kinds import Kind
from peft.core.filling import blank
from peft.core.layer.layer import BaseTunerLayer, check_adapters_to_merge
from peft.core.model.context import Groups
from peft.kernels.autocast import is_autocast
from peft.kernels.grouped import can_group, forget, grouped_linear
from peft.kernels.linear import Factors, active_rate, is_eager, is_plain, low_rank_linear, plain_weight
from peft.kernels.sparse import sparse_linear, with_entries
from peft.utils.error import NoEqualWeightError


class DeltaLayer(BaseTunerLayer):
    """W' = W + dW. A method defines :meth:`delta_weight`, and :meth:`delta` only where a cheaper way exists.

    Without one, dW is as large as W: where W can hold it, W + dW is multiplied by once, else dW on its own.

    Where dW is a low-rank product, :meth:`factors` says so, and the fused kernels compute with it. :meth:`delta`
    stays, as what they are tested against.
    """

    def factors(self, name: str) -> Factors | None:
        """dW of a linear layer as s B A with dropout on the input, or None where the adapter is something else.

        A and B may be computed from the adapter's tensors; gradients flow through that.
        """
        return None

    def _all_factors(self, names: Iterable[str], x: torch.Tensor) -> list[Factors] | None:
        """The factors of adapters, if all have them and the fused kernels can be used for this input."""
        if not self.kind.matrix or self.changes_input or not x.is_floating_point() or is_plain():
            return None
        found = []
        for name in names:
            factors = self.factors(name)
            if factors is None or not (self.cast_input_dtype_enabled or factors.down.dtype == x.dtype):
                return None
            found.append(factors)
        return found

    def fused(self, names: list[str], x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output by a kernel for all of it, where there is one (see :meth:`weight_for_kernels`)."""
        return None

    def weight_for_kernels(self, x: torch.Tensor) -> torch.Tensor | None:
        """W ``[out, in]`` in the dtype of x where kernels may compute the whole layer, outside autocast; else None."""
        if not self.kind.matrix or self.kind.through_weight or self.merged_adapters or is_plain() or not is_eager(x):
            return None
        weight = None if is_autocast(x.device.type) else self._plain_weight(x)
        return weight if weight is not None and weight.dtype == x.dtype else None

    def weight_to_add_to(self, names: list[str], x: torch.Tensor) -> torch.Tensor | None:
        """The same where W can hold these adapters' dW as well, computed in its dtype; else None."""
        weight = self.weight_for_kernels(x) if self.sums_exactly() else None
        return weight if weight is not None and all(self.dtype_of(name) == weight.dtype for name in names) else None

    def _plain_weight(self, x: torch.Tensor) -> torch.Tensor | None:
        """W where the base layer is nothing but W x + b, frozen."""
        base = self._modules["base_layer"]
        weight = plain_weight(base, x) if self.kind.is_plain(base) else None
        return weight if weight is None else self.kind.orient(weight, base)

    def _adapted(self, names: list[str], args: tuple, kwargs: dict) -> Any:
        if len(args) == 1 and not kwargs:
            y = self.fused(names, args[0])
            if y is not None:
                return y
            factors = None if self.by_weight else self._all_factors(names, args[0])
            if factors is not None:
                return low_rank_linear(self._modules["base_layer"], args[0], factors, self._plain_weight(args[0]))
        return super()._adapted(names, args, kwargs)

    def needs_weight(self) -> bool:
        return type(self).delta is DeltaLayer.delta and self.sums_exactly()

    def _mixed_rows(self, groups: Groups, args: tuple, kwargs: dict) -> torch.Tensor:
        if len(args) == 1 and not kwargs:
            x, names = args[0], [name for name, _ in groups.parts]
            found = self._all_factors([name for name in names if name in self], x)
            if found is not None:
                left = iter(found)
                factors = [next(left) if name in self else None for name in names]
                if can_group(x, factors):
                    base = self._modules["base_layer"]
                    return grouped_linear(self, base, x, groups.index, factors, self._plain_weight(x))
        return super()._mixed_rows(groups, args, kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        forget(self)
        super().delete_adapter(adapter_name)

    def train(self, mode: bool = True) -> DeltaLayer:
        forget(self)
        return super().train(mode)

    def delta_weight(self, name: str) -> torch.Tensor:
        """dW, ``[out, in, *kernel]``."""
        raise NotImplementedError

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """dW x."""
        return self.multiplied(x, lambda: self.delta_weight(name).to(dtype=_dtype_of(x)), [name])

    def transform_output(self, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        return y + self.delta(name, x)

    def fold(self, name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return weight + self.delta_weight(name).to(weight.dtype)

    def unfold(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight - self.delta_weight(name).to(weight.dtype)


class LowRankLayer(DeltaLayer):
    """dW = B A with a pair of matrices that the method makes of its parameters: :meth:`pair`.

    The weight is the matrix ``[out, in * kernel]``. ``dropout`` is the attribute that holds the dropout on the input.
    """

    dropout: ClassVar[str] = ""

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[r, in * kernel]`` and B ``[out, r]``, in the dtype of the adapter."""
        raise NotImplementedError

    def dropped(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x after dropout, which indices do not have."""
        return x if self.kind.lookup or not self.dropout else getattr(self, self.dropout)[name](x)

    def factors(self, name: str) -> Factors | None:
        rate = active_rate(getattr(self, self.dropout)[name]) if self.dropout else 0.0
        alone = type(self).transform_output is DeltaLayer.transform_output  # or else more than dW x is added
        return Factors(*self.pair(name), 1.0, rate) if alone and rate is not None else None

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        base, (a, b) = self.get_base_layer(), self.pair(name)
        return self.kind.up(base, self.kind.down(base, self.dropped(name, x), a), b)

    def delta_weight(self, name: str) -> torch.Tensor:
        a, b = self.pair(name)
        return (b @ a).view(self.shape)


class SparseLayer(DeltaLayer):
    """dW with few entries that are not zero. A method defines :meth:`entries`."""

    def entries(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in the flattened ``[out, in * kernel]`` and the values there; what has one position adds up."""
        raise NotImplementedError

    def fused(self, names: list[str], x: torch.Tensor) -> torch.Tensor | None:
        weight = self.weight_to_add_to(names, x)
        if weight is None:
            return None
        positions, values = (torch.cat(parts) for parts in zip(*map(self.entries, names)))
        return sparse_linear(x, values, positions, weight, self.get_base_bias())

    def delta_weight(self, name: str) -> torch.Tensor:
        positions, values = self.entries(name)
        return with_entries(values.new_zeros(self.shape), positions, values)

    def fold(self, name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        positions, values = self.entries(name)
        return with_entries(weight, positions, values.to(weight.dtype))

    def unfold(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        positions, values = self.entries(name)
        return with_entries(weight, positions, -values.to(weight.dtype))


class SampleLayer(BaseTunerLayer):
    """y' = y + f(x) with an f that depends on the sample: a method defines :meth:`update`. No weight equals it.

    Attributes:
        because: why not, for the errors.
    """

    because: ClassVar[str] = "its update depends on the sample"
    why_no_sum: ClassVar[str] = "what they do depends on the sample, so no sum of their tensors does their sum."

    def update(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """f(x), shaped like the output."""
        raise NotImplementedError

    def each_up(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``B h`` with a matrix for each sample.

        Args:
            h: what ``kind.down`` gives. b: ``[batch, r, out]``.
        """
        h = self.kind.channels_last(h)
        groups = getattr(self.get_base_layer(), "groups", 1)
        pieces = h.reshape(len(h), -1, groups, b.shape[1])  # [batch, positions, groups, r]
        if groups == 1:
            y = pieces.squeeze(2) @ b
        else:
            y = torch.einsum("bpgr,brgo->bpgo", pieces, b.unflatten(-1, (groups, -1))).flatten(-2)
        return self.kind.channels_back(y.view(*h.shape[:-1], -1))

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: Any) -> str | None:
        if kind.through_weight or kind.read_by_parent:
            return f"its weight is read by another computation, and {cls.because}, so there is no weight to give"
        return None

    def transform_output(self, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        return y + self.update(name, x)

    def unmergeable(self, name: str) -> str | None:
        return f"{self.because}, so no one weight equals it. Keep the adapter unmerged."

    def _read(self, name: str) -> Any:
        value = getattr(self.base_layer, name)
        fused = self.__dict__.get("read_by_parent") and isinstance(value, torch.Tensor)
        return value.as_subclass(_Unfused) if fused else value


class _Unfused(torch.Tensor):
    """A weight that torch's fused kernels leave alone: they would compute with it and never call the layer."""


class ScaledLayer(DeltaLayer):
    """A dW with a factor for each adapter, ``scaling[name]``. A method defines :meth:`initial_scaling`."""

    def initial_scaling(self, name: str) -> float:
        """What s starts at, from the adapter's config."""
        raise NotImplementedError

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the scale of an adapter ``scale`` times its initial one."""
        if adapter in self:
            self._rescale({adapter: scale * self.initial_scaling(adapter)})

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        self._rescale({name: self.scaling[name] * scale for name in self.active_adapters if name in self})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters; None brings back the initial ones."""
        names = [name for name in self.active_adapters if name in self]
        self._rescale({n: self.initial_scaling(n) if scale is None else self.scaling[n] / scale for n in names})

    def _rescale(self, scaling: dict[str, Any]) -> None:
        """What is merged is taken out by the scale that it went in by, and put back by the new one."""
        merged = list(self.merged_adapters) if set(scaling) & set(self.merged_adapters) else []
        if merged:
            self.unmerge()
        self.scaling.update(scaling)
        if merged:
            self.merge(adapter_names=merged)


class ShiftLayer(BaseTunerLayer):
    """b' = b + c beside what becomes of W, where there is a b. A method defines :meth:`shift`."""

    def shift(self, name: str) -> torch.Tensor | None:
        """c, ``[out]``, or None."""
        return None

    def shifted(self, name: str, y: torch.Tensor) -> torch.Tensor:
        """The output with c in it."""
        shift = self.shift(name)
        return y if shift is None else y + self.kind.along_channels(shift, self.get_base_layer())

    def fold_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        shift = self.shift(name)
        return bias if shift is None or bias is None else bias + shift

    def unfold_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        shift = self.shift(name)
        return bias if shift is None or bias is None else bias - shift


class FoldLayer(ShiftLayer):
    """W' = f(W) for any f. A method defines :meth:`reweight`; several adapters add up their f(W) - W.

    Where it changes the bias as well, by what depends on W and b alone, it defines :meth:`shift`.

    :meth:`delta` is the forward's ``(f(W) - W) x``, dropout included, where the forward is not ``f(W) x``.
    """

    reversible = False
    reads_weight = True

    def reweight(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """f(W), from the weight without any adapter, ``[out, in, *kernel]``."""
        raise NotImplementedError

    def needs_weight(self) -> bool:
        return type(self).delta is FoldLayer.delta and self.sums_exactly()

    def change(self, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        """f(W) - W, computed in a dtype."""
        base = self.unmerged_weight().to(dtype=dtype)
        return self.reweight(name, base) - base

    def delta(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.multiplied(x, lambda: self.change(name, _dtype_of(x)), [name])

    def transform_output(self, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        return self.shifted(name, y + self.delta(name, x))

    def fold(self, name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        if weight is base:
            return self.reweight(name, base)
        return weight + (self.reweight(name, base) - base).to(weight.dtype)


class RotationLayer(BaseTunerLayer):
    """W' = diag(s) W R^T, R square and invertible: a rotation of the input, y = W (x R), and a scale of the output.

    The bias stays as it is, and most methods have no s. On a table of embeddings, which has no input to rotate, R
    turns the output: y = (W x) R. On convolutions R acts on the flattened ``in * kernel`` axis, through the weight. A
    method defines :meth:`rotate` for vectors of :attr:`rotated_features`, as cheaply as its R allows: nothing in a
    training step needs the whole matrix.
    """

    @property
    def rotated_features(self) -> int:
        shape = self.shape
        return shape[0] if self.kind.lookup else int(torch.Size(shape[1:]).numel())

    def rotate(self, name: str, x: torch.Tensor, back: bool = False) -> torch.Tensor:
        """x R along the last axis; x R^T with ``back``."""
        raise NotImplementedError

    def scale_out(self, name: str) -> torch.Tensor | None:
        """s, ``[out]``, or None."""
        return None

    def rotation(self, name: str) -> torch.Tensor:
        """R, ``[features, features]``."""
        like = next(self.adapter_parameters(name))
        return self.rotate(name, torch.eye(self.rotated_features, device=like.device, dtype=like.dtype))

    def needs_weight(self) -> bool:
        return len(self.shape) > 2

    def transform_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x if self.kind.lookup else self.rotate(name, x)

    def transform_output(self, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        s, bias = self.scale_out(name), self.bias_below()
        y = self.rotate(name, y.to(self.dtype_of(name))) if self.kind.lookup else y
        return y if s is None else y * s if bias is None else torch.addcmul(bias - bias * s, y, s)

    def _fold_order(self, names: Any) -> list[str]:
        return list(names) if self.kind.lookup else super()._fold_order(names)

    def fold(self, name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        s = self.scale_out(name)
        if self.kind.lookup:
            weight = self.rotate(name, weight.T).T
        else:
            weight = self.rotate(name, weight.flatten(1), back=True).view_as(weight)
        return weight if s is None else weight * s.view(-1, *[1] * (weight.dim() - 1)).to(weight.dtype)

    def unfold(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        inverse = torch.linalg.inv(self.rotation(name).float()).to(weight.dtype)
        if self.kind.lookup:
            return inverse.T @ weight
        return (weight.flatten(1) @ inverse.T).view_as(weight)

    def keeps_base(self, name: str) -> bool:
        """A series that stands for a rotation can be far from one, even singular: then its inverse is of no use."""
        rotation = self.rotation(name).float()
        eye = torch.eye(len(rotation), device=rotation.device)
        return bool((rotation @ rotation.T - eye).abs().max() > 0.01)


class OutputLayer(ShiftLayer):
    """An affine map of the output, y' = M y + c: W' = M W and b' = M b + c.

    A method defines :meth:`map_output` and/or :meth:`shift`. A layer without a bias gets c for one when it is merged;
    what has no place for a bias (a table) takes no c.
    """

    reversible = False  # M may be singular

    def map_output(self, name: str, y: torch.Tensor) -> torch.Tensor:
        """M y along the last axis."""
        return y

    def transform_output(self, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        if type(self).map_output is not OutputLayer.map_output:
            axis = self.kind.channel_axis
            y = self.map_output(name, y.to(self.dtype_of(name)).movedim(axis, -1)).movedim(-1, axis)
        return self.shifted(name, y)

    def fold(self, name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return self.map_output(name, weight.movedim(0, -1)).movedim(-1, 0)

    def fold_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        shift = self.shift(name)
        mapped = None if bias is None else self.map_output(name, bias)
        return mapped if shift is None else shift if mapped is None else mapped + shift


class ScaleLayer(BaseTunerLayer):
    """W' = diag(out) W diag(in). A method defines :meth:`scale_in` and/or :meth:`scale_out`, a vector or None.

    ``scale_in`` has one entry for each input channel, ``scale_out`` one for each output channel.
    """

    neutral = 1.0

    reversible = False  # a scale may be zero

    def scale_in(self, name: str) -> torch.Tensor | None:
        return None

    def scale_out(self, name: str) -> torch.Tensor | None:
        return None

    def transform_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale = None if self.kind.lookup else self.scale_in(name)
        return x if scale is None else x * self.kind.along_channels(scale, self.get_base_layer())

    def transform_output(self, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        inner, scale = self.scale_in(name) if self.kind.lookup else None, self.scale_out(name)
        if inner is not None:  # x selects a column of W, hence an entry of the scale
            y = y * inner[x].unsqueeze(-1)
        return y if scale is None else y * self.kind.along_channels(scale, self.get_base_layer())

    def fold(self, name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        ones = [1] * (weight.dim() - 2)
        inner, outer = self.scale_in(name), self.scale_out(name)
        if inner is not None:
            groups = self.in_features // weight.shape[1]
            inner = inner.view(groups, 1, weight.shape[1], *ones)  # a grouped kernel holds its own channels only
            weight = (weight.unflatten(0, (groups, -1)) * inner.to(weight.dtype)).flatten(0, 1)
        if outer is not None:
            weight = weight * outer.view(-1, 1, *ones).to(weight.dtype)
        return weight

    def fold_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        scale = self.scale_out(name)
        return bias if scale is None or bias is None else bias * scale.to(bias.dtype)


class CopyLayer(BaseTunerLayer):
    """A trained copy of the whole module stands in for it. ``weights`` names one ``nn.ModuleDict`` of copies."""

    any_module = True
    from_base = True

    def origin(self, name: str) -> dict[str, torch.Tensor]:
        base = self.get_base_layer() if not self.merged else self._kept["module"]
        return {f"{next(iter(self.weights))}.{key}": tensor for key, tensor in base.state_dict().items()}

    def _copies(self) -> nn.ModuleDict:
        return getattr(self, next(iter(self.weights)))

    def update_layer(self, name: str, config: Any, key: str) -> None:
        if isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                f"{key or 'the module'} has adapters of another method already, which a copy of the whole module "
                "would hide. Add this adapter before them, or leave that module out of its targets."
            )
        duplicate = copy.deepcopy(self.get_base_layer())
        duplicate.requires_grad_(True)
        self.put(name, **{next(iter(self.weights)): duplicate})

    def check_active(self, names: list[str]) -> None:
        if len(names) > 1:
            raise ValueError(
                f"{type(self).__name__} replaces a module, so one adapter can be active at a time, not {names}."
            )

    def needs_weight(self) -> bool:
        return True  # there is no common base output: each group of rows runs its own copy

    def _adapted(self, names: list[str], args: tuple, kwargs: dict) -> Any:
        duplicate, dtype = self._copies()[names[-1]], self._other_dtype(names[-1])
        if dtype is None:
            return duplicate(*args, **kwargs)
        wide = self.dtype_of(names[-1])
        y = duplicate(*(_as(wide, a) for a in args), **{k: _as(wide, v) for k, v in kwargs.items()})
        return _as(dtype, y)

    def _other_dtype(self, name: str) -> torch.dtype | None:
        """The base module's dtype where the copy is held in another (a wider) one."""
        dtype = next((p.dtype for p in self.get_base_layer().parameters() if p.is_floating_point()), None)
        return None if dtype is None or dtype == self.dtype_of(name) else dtype

    def _read(self, name: str) -> Any:
        """An attribute of the acting module, in the base module's dtype: the parent may compute with it itself."""
        state = self.__dict__
        computes = state.get("read_by_parent") and name in ("weight", "bias")  # otherwise it is read to be looked at
        mixed = "context" in state and self.context.adapter_names is not None and self.context.current is None
        names = self._current() if "_active_adapter" in state and (computes or not mixed) else []
        if not names:
            return getattr(self.base_layer, name)
        value, dtype = getattr(self._copies()[names[-1]], name), self._other_dtype(names[-1])
        if dtype is not None and isinstance(value, nn.Module):
            return copy.deepcopy(value).to(dtype)
        return value if dtype is None else _as(dtype, value)

    def weight_change(self, name: str) -> torch.Tensor:
        raise NoEqualWeightError(f"{type(self).__name__} replaces the module whole; there is no change of one weight.")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        new = check_adapters_to_merge(self, adapter_names)
        if len(new) > 1 or (new and self.merged_adapters):
            raise ValueError(f"{type(self).__name__} can merge one adapter at a time, not {new}.")
        for name in new:
            duplicate = copy.deepcopy(self._copies()[name]).requires_grad_(False)
            if safe_merge and not all(p.isfinite().all() for p in duplicate.parameters()):
                raise ValueError(f"adapter {name!r} holds NaN or infinite entries; nothing was merged.")
            duplicate.to(self._other_dtype(name))
            self._kept, self.base_layer, self.merged_adapters = {"module": self.base_layer}, duplicate, [name]

    def unmerge(self) -> None:
        if self.merged_adapters:
            self.base_layer, self._kept, self.merged_adapters = self._kept["module"], {}, []


class RowsLayer(BaseTunerLayer):
    """Some rows of a table are replaced by trained ones: token vectors of an embedding or of an output head.

    ``weights`` names one ``nn.ParameterDict`` with ``[n, dim]``; ``settings`` has ``token_indices``.
    """

    reversible = False
    follows_ties = True
    from_base = True
    settings: ClassVar[dict[str, type]] = {"token_indices": dict}
    aligns: ClassVar[tuple[str, ...]] = ("token_indices",)

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: Any) -> str | None:
        if kind.name in ("Linear", "Embedding") and not kind.through_weight:
            return None
        return "token rows exist only in embeddings and in linear output heads"

    def _rows(self, name: str) -> torch.Tensor:
        return getattr(self, next(iter(self.weights)))[name]

    def _index(self, name: str, device: torch.device) -> torch.Tensor:
        return torch.as_tensor(self.token_indices[name], device=device)

    def replace(self, name: str, indices: list[int], init: bool = True) -> None:
        """Allocate the trained rows: copies of the rows they replace (random ones without ``init``).

        A tied layer takes the very rows of the layer that it is tied to.

        Raises:
            ValueError: if an index is negative, repeated, or not in the table.
        """
        base = self.get_base_weight()
        table = base.T if self.kind.lookup else base
        wrong = [i for i in indices if not 0 <= i < table.shape[0]]
        if wrong or len(set(indices)) < len(indices):
            problem = f"outside the table of {table.shape[0]} tokens: {wrong}" if wrong else "repeated"
            raise ValueError(f"token indices are {problem}. Resize the embeddings first if these tokens are new.")
        source = self.tied_to.get(name)
        if source is not None:
            rows = source._rows(name)
        else:
            old = table[torch.as_tensor(indices, device=table.device)]
            rows = nn.Parameter(old.clone() if init else torch.randn_like(old))
        self.put(name, token_indices=list(indices), **{next(iter(self.weights)): rows})

    def origin(self, name: str) -> dict[str, torch.Tensor]:
        base = self.unmerged_weight().detach()
        index = self._index(name, base.device)
        return {next(iter(self.weights)): base.T[index] if self.kind.lookup else base[index]}

    def aligned(self, name: str, like: str) -> dict[str, torch.Tensor]:
        """Tokens that only the other adapter trains have the rows of the base."""
        ((key, rows),) = self.origin(like).items()
        place = {token: i for i, token in enumerate(self.token_indices[like])}
        index = torch.tensor([place[token] for token in self.token_indices[name]], device=rows.device)
        return {key: rows.index_copy(0, index, self._rows(name).detach().to(rows.dtype))}

    def check_active(self, names: list[str]) -> None:
        seen: set[int] = set()
        for name in names:
            both = seen & set(self.token_indices[name])
            if both:
                raise ValueError(
                    f"adapters {names} replace the same token rows ({sorted(both)[:5]}), so they cannot be active "
                    "together. Activate one of them."
                )
            seen |= set(self.token_indices[name])

    def transform_output(self, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        base, rows = self.get_base_layer(), self._rows(name)
        index = self._index(name, y.device)
        if not self.kind.lookup:
            trained = self.kind.apply(base, x, rows)
            if base.bias is not None:
                trained = trained + base.bias[index]
            return y.index_copy(-1, index, trained.to(y.dtype))
        ordered, rank = index.sort()
        place = torch.searchsorted(ordered, x).clamp_(max=len(index) - 1)
        trained = self.kind.scaled(base, rows[rank[place]].to(y.dtype))
        return torch.where((ordered[place] == x).unsqueeze(-1), trained, y)

    def fold(self, name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        index, rows = self._index(name, weight.device), self._rows(name).to(weight.dtype)
        return weight.index_copy(1, index, rows.T) if self.kind.lookup else weight.index_copy(0, index, rows)


def drops(layer: nn.Module, dropouts: Iterable[nn.Module]) -> bool:
    """Whether any of these dropouts acts in the layer's next forward."""
    return layer.training and any(isinstance(dropout, nn.Dropout) for dropout in dropouts)


def padded(x: torch.Tensor, size: int) -> torch.Tensor:
    """x with its last axis filled with zeros up to ``size``."""
    return x if x.shape[-1] == size else F.pad(x, (0, size - x.shape[-1]))


def input_dropout(p: float) -> nn.Module:
    """Dropout with the probability ``p``, which costs nothing where that is 0."""
    return nn.Dropout(p) if p else blank(nn.Identity)


def _as(dtype: torch.dtype, value: Any) -> Any:
    """Floating-point tensors, also those in tuples, in a dtype."""
    if isinstance(value, tuple):
        return tuple(_as(dtype, part) for part in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _dtype_of(x: torch.Tensor) -> torch.dtype | None:
    return x.dtype if x.is_floating_point() else None

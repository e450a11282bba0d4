"""Weights that are computed: by parametrizations of torch, or by its hooks, of pruning and the older norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from peft.core.base.storage.plain import Storage
from peft.meanwhile import in_mode


class _Given(nn.Module):
    """Stands in for a parametrization and gives a tensor that was made elsewhere."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.__dict__["value"] = value

    def forward(self) -> torch.Tensor:
        return self.value


class Parametrized(Storage):
    """A weight with ``torch.nn.utils.parametrize``: W = f(originals).

    It is written where f has a right inverse and gives back what was written, as weight_norm does; one that
    constrains W, as spectral_norm and orthogonal do, is refused by name.
    """

    lossless = False  # up to the last digit

    def matches(self, m: nn.Module, attribute: str) -> bool:
        return attribute in (m._modules.get("parametrizations") or ())

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        f = self._function(m, attribute)
        with in_mode(f, training=False), torch.no_grad():  # some count how often they are asked while they train
            return f().detach()

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        before = self.keep(m, attribute)
        try:
            self._assign(m, attribute, value.clone())  # which may become the original
            got, reason = self.read(m, attribute), "it constrains the weight, and the merged one is not of that form"
        except Exception as error:
            got, reason = None, f"it has no right inverse for the merged weight ({type(error).__name__}: {error})"
        # Asked by "not <=", so that NaN counts as different.
        if got is None or not (got - value).abs().max() <= 8 * torch.finfo(value.dtype).eps * value.abs().max():
            self.put_back(m, attribute, before)
            raise ValueError(
                f"the {attribute} of this {type(m).__name__} is made by {self._name_of(m, attribute)}, and this "
                f"cannot be merged into it: {reason}. Keep the adapter unmerged, or first make the weight a plain "
                f"parameter, by {self._way_out(attribute)}."
            )

    def keep(self, m: nn.Module, attribute: str) -> list[tuple[dict, str, torch.Tensor, torch.Tensor]]:
        return [(*where, t, t.detach().clone()) for *where, t in self._slots(m, attribute)]

    def put_back(self, m: nn.Module, attribute: str, kept: list[tuple[dict, str, torch.Tensor, torch.Tensor]]) -> None:
        with torch.no_grad():
            for holder, name, t, data in kept:
                t.copy_(data)
                holder[name] = t  # a right inverse may have put another one there

    def call(self, m: nn.Module, tensors: Mapping[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        mine = {name: value for name, value in tensors.items() if self.matches(m, name)}
        with self._given(m, mine):
            return super().call(m, {k: v for k, v in tensors.items() if k not in mine}, args, kwargs)

    def tensors(self, m: nn.Module, attribute: str) -> list[torch.Tensor]:
        return [t for *_, t in self._slots(m, attribute)]

    def anchor(self, m: nn.Module, attribute: str) -> torch.Tensor | None:
        return next(iter(self.tensors(m, attribute)), None)

    # --- what the two ways of torch do differently ------------------------------------------------------------
    def _function(self, m: nn.Module, attribute: str) -> nn.Module:
        """The module that gives the weight when it is called."""
        return m.parametrizations[attribute]

    def _slots(self, m: nn.Module, attribute: str) -> list[tuple[dict, str, torch.Tensor]]:
        """The tensors from which the weight is made, and where they are: the dict of a module, the name in it."""
        holders = (
            held for part in self._function(m, attribute).modules() for held in (part._parameters, part._buffers)
        )
        return [(holder, name, t) for holder in holders for name, t in holder.items() if t is not None]

    def _assign(self, m: nn.Module, attribute: str, value: torch.Tensor) -> None:
        self._function(m, attribute).right_inverse(value)

    @contextmanager
    def _given(self, m: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """A context in which the module reads these tensors."""
        functions: Any = m.parametrizations
        own = {name: functions._modules[name] for name in tensors}
        functions._modules.update({name: _Given(value) for name, value in tensors.items()})
        try:
            yield
        finally:
            functions._modules.update(own)

    def _name_of(self, m: nn.Module, attribute: str) -> str:
        return "the parametrization " + ", ".join(type(f).__name__.lstrip("_") for f in m.parametrizations[attribute])

    def _way_out(self, attribute: str) -> str:
        return f"torch.nn.utils.parametrize.remove_parametrizations(module, {attribute!r})"


class HookedNorm(Parametrized):
    """A weight that a hook computes before each forward: ``weight_norm``, ``spectral_norm``, ``prune`` of torch."""

    def matches(self, m: nn.Module, attribute: str) -> bool:
        return bool(m._forward_pre_hooks) and _hook(m, attribute) is not None

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        hook = _hook(m, attribute)
        with torch.no_grad():
            if isinstance(hook, BasePruningMethod):
                return hook.apply_mask(m).detach()
            made = hook.compute_weight(m) if isinstance(hook, WeightNorm) else hook.compute_weight(m, False)
        return made.detach()

    def _slots(self, m: nn.Module, attribute: str) -> list[tuple[dict, str, torch.Tensor]]:
        names = [f"{attribute}_{part}" for part in ("g", "v", "orig", "u")]  # weight_norm; spectral_norm and prune
        return [(held, n, held[n]) for held in (m._parameters, m._buffers) for n in names if held.get(n) is not None]

    def _assign(self, m: nn.Module, attribute: str, value: torch.Tensor) -> None:
        hook = _hook(m, attribute)
        with torch.no_grad():
            if isinstance(hook, WeightNorm):
                getattr(m, f"{attribute}_g").copy_(torch.norm_except_dim(value, 2, hook.dim))
                getattr(m, f"{attribute}_v").copy_(value)
            else:
                getattr(m, f"{attribute}_orig").copy_(value)
        setattr(m, attribute, self.read(m, attribute))  # what others read between two forward calls

    def put_back(self, m: nn.Module, attribute: str, kept: list[tuple[dict, str, torch.Tensor, torch.Tensor]]) -> None:
        super().put_back(m, attribute, kept)
        setattr(m, attribute, self.read(m, attribute))

    @contextmanager
    def _given(self, m: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        hooks, own = dict(m._forward_pre_hooks), {name: m.__dict__.get(name) for name in tensors}
        for key, hook in hooks.items():
            if _made_by(hook) in tensors:
                del m._forward_pre_hooks[key]
        m.__dict__.update(tensors)
        try:
            yield
        finally:
            m.__dict__.update(own)
            # Emptied first, so that the hooks keep their order.
            m._forward_pre_hooks.clear()
            m._forward_pre_hooks.update(hooks)

    def _name_of(self, m: nn.Module, attribute: str) -> str:
        return f"a hook, {type(_hook(m, attribute)).__name__}"

    def _way_out(self, attribute: str) -> str:
        return f"remove_weight_norm, remove_spectral_norm or prune.remove (torch.nn.utils) of (module, {attribute!r})"


def _made_by(hook: Any) -> str | None:
    """The attribute that a hook computes, or None."""
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name
    return hook.name if isinstance(hook, WeightNorm | SpectralNorm) else None


def _hook(m: nn.Module, attribute: str) -> Any:
    """The hook that computes the weight, or None."""
    return next((h for h in m._forward_pre_hooks.values() if _made_by(h) == attribute), None)


def weight_names(m: nn.Module) -> list[str]:
    """The attributes of a module that hold a weight: its own parameters, and those that are computed."""
    hooked = [name for h in m._forward_pre_hooks.values() if (name := _made_by(h)) is not None]
    return [*m._parameters, *(m._modules.get("parametrizations") or ()), *hooked]

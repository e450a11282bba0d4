"""Weights kept as ordinary dense parameters, and the interface of all storages."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.func import functional_call

from peft.kernels.autocast import is_autocast
from peft.kernels.linear import is_hooked


class Storage:
    """Reads a weight dense and writes it back, in the layout in which the module stores it.

    What is true of a weight because of how it is kept is asked here and nowhere else: :meth:`direct_weight`,
    :meth:`output_may_be_overwritten`, :meth:`holds_updates_exactly`, :meth:`nbytes`, :meth:`device_and_dtype`.

    Attributes:
        name: the quantisation library, shown in status reports (``quantization_backend``); None for a dense weight.
        layer_name: replaces the kind's name in the class name of adapted layers (``Linear4bit``), if set.
        can_read, can_write: whether the weight can be had dense, and replaced.
        lossless: whether what is written is what is read afterwards. If not, the original is kept for ``unmerge``.
        linears: ``(package, class)`` of layers that are linear without being ``nn.Linear``.
        slots: the attributes of a module that hold its weight.
        own_classes: a plain ``nn.Parameter`` of a layer of torch's own is never meant, so there is no need to ask.
        replaceable: a module can be given a parameter of its own in the place of one that others hold as well.
        fresh_output: the library's layers keep nothing of what they give.
    """

    name: str | None = None
    layer_name: str | None = None
    can_read = True
    can_write = True
    lossless = True
    linears: ClassVar[tuple[tuple[str, str], ...]] = ()
    slots: ClassVar[tuple[str, ...]] = ()
    own_classes = False
    replaceable = True
    fresh_output = False

    def matches(self, m: nn.Module, attribute: str) -> bool:
        """Whether this storage keeps ``m.<attribute>``."""
        raise NotImplementedError

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        """The dense weight, detached."""
        raise NotImplementedError

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        """Replace the weight; another module that holds the same parameter (``shared``) keeps its own."""
        raise NotImplementedError

    def overwrite(self, m: nn.Module, attribute: str, value: torch.Tensor) -> bool:
        """Write the weight into the memory that it has; False, with nothing done, where :meth:`write` is needed."""
        return False

    def shift_groups(self, m: nn.Module, attribute: str, change: torch.Tensor, size: int) -> bool:
        """Add to the weight, by zero points and without rounding it, one number for each ``size`` inputs of a row.

        Args:
            change: ``[out, in / size]``.

        Returns:
            False, with nothing done, where the zero points cannot hold that.
        """
        return False

    def call(self, m: nn.Module, tensors: Mapping[str, torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What ``m(*args, **kwargs)`` gives with these dense tensors in the place of its own, hooks included.

        The tensors are in the layout of the module, by attribute; gradients reach them.
        """
        # In a call, FSDP 1 has attributes in front of the parameters, which would be read instead of those given.
        hiding = {name: m.__dict__.pop(name) for name in tensors if name in m._parameters and name in m.__dict__}
        try:
            return functional_call(m, dict(tensors), args, kwargs)
        finally:
            m.__dict__.update(hiding)

    def keep_differentiable(self, m: nn.Module) -> None:
        """Undo, and prevent, what a library does to a weight for inference only, with no gradients from then on."""

    # --- what is true of the weight because it is kept so -----------------------------------------------------
    def mesh(self, m: nn.Module, attribute: str) -> Any:
        """The processes that compute the module together, each with its part of the weight; None if there are none."""
        return None

    def unwritable(self, m: nn.Module, attribute: str) -> str | None:
        """Why nothing can be merged into the weight, or None."""
        if not self.can_write:
            way = "merge_and_unload(dequantize=True), " if self.can_read else ""
            return (
                f"weights kept by {self.name} cannot be written, so nothing can be merged into them. To merge: {way}"
                "or load the base model unquantised and the adapter on it."
            )
        if (weight := m._parameters.get(attribute)) is not None and weight.is_meta:
            return (
                f"the {attribute} of this {type(m).__name__} has no values yet (it is on the meta device), so nothing "
                "can be merged into it. Load the base model's weights first."
            )
        return None

    def compute_dtype(self, m: nn.Module, attribute: str) -> torch.dtype | None:
        """The dtype in which the layer multiplies, None if that is the input's."""
        return None

    def direct_weight(self, m: nn.Module, attribute: str, frozen: bool = True) -> nn.Parameter | None:
        """The parameter, if it is ``frozen`` and the module computes with it and its bias as they stand; else None.

        A kernel on the same device may then compute in the place of the module. Hooks, a replaced ``forward`` and
        tensor subclasses make a module another one.
        """
        return None

    def output_may_be_overwritten(self, m: nn.Module, attribute: str) -> bool:
        """Whether the module's output may be changed in place: nothing else holds or needs it."""
        own = m.__dict__
        return (self.fresh_output or type(m) is nn.Linear) and not own["_forward_hooks"] and "forward" not in own

    def holds_updates_exactly(self, m: nn.Module, attribute: str) -> bool:
        """Whether an update can be added to the weight: codes and 16-bit numbers would round a small one away."""
        return False

    def nbytes(self, m: nn.Module, attribute: str) -> int:
        """Bytes that the weight takes here, scales and codebooks included."""
        return sum({t.untyped_storage()._cdata: t.nbytes for t in self.tensors(m, attribute)}.values())

    def tensors(self, m: nn.Module, attribute: str) -> list[torch.Tensor]:
        """The plain tensors in which the weight is kept; some may share memory."""
        return [t for slot in self.slots or (attribute,) for t in plain_tensors(getattr(m, slot, None))]

    def device_and_dtype(self, m: nn.Module, attribute: str) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype that new parts of the layer follow, None where there is nothing to follow.

        Codes have no dtype to follow, so parts beside them stay in float32, as in QLoRA.
        """
        anchor = self.anchor(m, attribute)
        if anchor is None:
            return None, None
        # float8 is no dtype to train in
        floating = self.name is None and anchor.is_floating_point() and anchor.dtype.itemsize > 1
        return None if anchor.is_meta else anchor.device, anchor.dtype if floating else None

    def anchor(self, m: nn.Module, attribute: str) -> torch.Tensor | None:
        """A tensor that is where, and as wide as, the weight is; of a module without that weight, its first one."""
        weight = m._parameters.get(attribute)  # nearly always, and in a tenth of the time of asking the module
        weight = getattr(m, attribute, None) if weight is None and attribute else weight
        return weight if isinstance(weight, torch.Tensor) else next(itertools.chain(m.parameters(), m.buffers()), None)

    def linear_shape(self, m: nn.Module) -> tuple[int, int]:
        """``(out, in)`` of one of ``linears``."""
        return m.out_features, m.in_features

    def keep(self, m: nn.Module, attribute: str) -> Any:
        """What :meth:`put_back` needs to restore the weight bit for bit."""
        return {slot: getattr(m, slot, None) for slot in self.slots}

    def aside(self, kept: Any) -> Any:
        """The same for a long time: where no memory of an accelerator is needed, if that can be."""
        return kept

    def put_back(self, m: nn.Module, attribute: str, kept: Any) -> None:
        """Restore what :meth:`keep` gave."""
        for slot, value in kept.items():
            setattr(m, slot, value)

    def read_kept(self, m: nn.Module, attribute: str, kept: Any) -> torch.Tensor:
        """The dense weight that ``kept`` stands for."""
        now = self.keep(m, attribute)
        self.put_back(m, attribute, kept)
        try:
            return self.read(m, attribute)
        finally:
            self.put_back(m, attribute, now)


class Plain(Storage):
    """A dense ``nn.Parameter``."""

    def matches(self, m: nn.Module, attribute: str) -> bool:
        return True

    def read(self, m: nn.Module, attribute: str) -> torch.Tensor:
        return getattr(m, attribute).detach()

    def write(self, m: nn.Module, attribute: str, value: torch.Tensor, shared: bool = False) -> None:
        if shared:
            setattr(m, attribute, nn.Parameter(value.contiguous(), requires_grad=False))
        else:
            getattr(m, attribute).data = value.contiguous()  # the same Parameter, for whoever holds it

    def overwrite(self, m: nn.Module, attribute: str, value: torch.Tensor) -> bool:
        old = getattr(m, attribute).data
        same = old.shape == value.shape and old.dtype == value.dtype and old.device == value.device
        # Writing into a tensor of inference mode is an error outside of it.
        if not same or old.is_meta or type(old) is not torch.Tensor or old.is_inference():
            return False
        old.copy_(value)
        return True

    def direct_weight(self, m: nn.Module, attribute: str, frozen: bool = True) -> nn.Parameter | None:
        weight, bias = m._parameters.get(attribute), m._parameters.get("bias")
        if type(weight) is not nn.Parameter or (frozen and weight.requires_grad) or is_hooked(m):
            return None
        return weight if bias is None or type(bias) is nn.Parameter else None

    def holds_updates_exactly(self, m: nn.Module, attribute: str) -> bool:
        # Under autocast the product has 16 bits, whatever the weight has.
        weight = m._parameters.get(attribute)
        weight = getattr(m, attribute, None) if weight is None else weight
        return isinstance(weight, torch.Tensor) and weight.dtype.itemsize >= 4 and not is_autocast(weight.device.type)

    def keep(self, m: nn.Module, attribute: str) -> tuple[nn.Parameter, torch.Tensor]:
        parameter = getattr(m, attribute)
        return parameter, parameter.data

    def put_back(self, m: nn.Module, attribute: str, kept: tuple[nn.Parameter, torch.Tensor]) -> None:
        parameter, data = kept
        parameter.data = data.to(getattr(m, attribute))  # where the model is now, and in its dtype
        setattr(m, attribute, parameter)

    def aside(self, kept: tuple[nn.Parameter, torch.Tensor]) -> tuple[nn.Parameter, torch.Tensor]:
        parameter, data = kept
        return parameter, data.cpu()

    def read_kept(self, m: nn.Module, attribute: str, kept: tuple[nn.Parameter, torch.Tensor]) -> torch.Tensor:
        return kept[1].to(kept[0].device)


def plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors of which something is made: a tensor subclass, a dict, a library's quantisation state."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                part = getattr(value, name)
                yield from plain_tensors(part) if isinstance(part, torch.Tensor) else ()  # a mesh of devices is none
            return
        yield value
        # What bitsandbytes, of 8 and of 4 bits, and ZeRO-3 hang on the parameter itself.
        for beside in ("SCB", "quant_state", "ds_tensor"):
            yield from plain_tensors(getattr(value, beside, None))
    elif isinstance(value, dict):
        for part in value.values():
            yield from plain_tensors(part)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from plain_tensors(vars(value))

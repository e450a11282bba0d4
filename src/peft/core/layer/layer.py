"""One adapted layer: state, forward, merge and mixed batches, written once for every method, kind and storage."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.func import functional_call

from peft.core.base.kinds import Kind, kind_of
from peft.core.base.storage import Storage, storage_of
from peft.core.filling import blank
from peft.core.layer.buffers import BufferDict
from peft.core.layer.switch import Switch
from peft.core.model.context import Context, Groups
from peft.kernels.autocast import is_autocast
from peft.kernels.made_weight import made_product
from peft.utils.error import NoEqualWeightError


class BaseTunerLayer(Switch, nn.Module):
    """Wraps ``base_layer`` and holds the parts that adapters add to it.

    A method declares its tensors in the class attributes below and overrides hooks; nothing else. State is one
    dict for each tensor name, keyed by adapter: ``layer.lora_A["default"].weight``.

    Attributes:
        weights: saved tensors: name -> ``nn.ModuleDict`` or ``nn.ParameterDict`` for those that train, ``BufferDict``
            for frozen ones.
        settings: the rest that is kept for each adapter: name -> ``dict`` or ``nn.ModuleDict``.
        shared: names of tensors that the tuner keeps for the whole model. Layers may share parts in ``weights`` as
            well: what several hold is trained once, and saved once, under the first of them.
        remade: names in ``weights`` that the file does not hold: they are made anew from the config and the base.
        split: what :meth:`as_saved` appends to the name of a tensor that it writes as several.
        labelled: files say "default" in the names of tensors, in the place of the adapter's name.
        bare: names in ``weights`` whose module holds a single ``weight``, saved under the bare name.
        random_in_training: a training step draws random numbers, even without dropout.
        reversible: ``unfold`` undoes ``fold``; otherwise the original weight is kept while merged.
        reads_weight: the forward computes with the dense base weight.
        any_module: the method replaces a module whole and needs to know no kind.
        follows_ties: modules tied to a targeted embedding get the same adapter.
        linear: names of tensors in which, together, what an adapter does is linear, all its others being equal.
        stacked: tensor -> axis along which several adapters can stand side by side: what they do then adds up.
        aligns: settings, and fields of the config, that say which parts of the base the tensors belong to.
        from_base: the tensors take the place of the base's, so it is their differences to these that add up.
        neutral: what an entry of ``linear`` is in an adapter that changes nothing.
        why_no_sum: why no weighted sum of the tensors is a weighted sum of adapters, unless ``linear`` says it is.
        by_name: the classes of adapted layers by kind and storage: ``{"Linear": lora.Linear, ...}``.
    """

    weights: ClassVar[dict[str, type]] = {}
    settings: ClassVar[dict[str, type]] = {}
    shared: ClassVar[tuple[str, ...]] = ()
    labelled: ClassVar[bool] = False
    bare: ClassVar[tuple[str, ...]] = ()
    split: ClassVar[tuple[str, ...]] = ()
    remade: ClassVar[tuple[str, ...]] = ()
    random_in_training: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False
    any_module: ClassVar[bool] = False
    follows_ties: ClassVar[bool] = False
    linear: ClassVar[tuple[str, ...]] = ()
    stacked: ClassVar[dict[str, int]] = {}
    aligns: ClassVar[tuple[str, ...]] = ()
    from_base: ClassVar[bool] = False
    neutral: ClassVar[float] = 0.0
    why_no_sum: ClassVar[str] = "what they do is not linear in their tensors, so no sum of these does their sum."
    by_name: ClassVar[dict[str, type[BaseTunerLayer]]] = {}

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    changes_input = False
    base_layer: nn.Module
    kind: Kind | None
    key = ""  # the name of the module in the unadapted model
    read_by_parent: bool
    merged_adapters: list[str]
    cast_input_dtype_enabled: bool
    tied_to: dict[str, BaseTunerLayer]  # adapters that follow those of a tied layer
    shares_weight: bool  # another module holds the same parameter
    merge_error: float  # |rounded - W'| / |W'| of the last merge, where the storage rounds
    _adapters: dict[str, None]
    _kept: dict[str, Any]
    _storage: tuple[tuple[type, type], Storage] | None

    # --- what a method defines ------------------------------------------------------------------------------
    def update_layer(self, name: str, config: Any, key: str) -> None:
        """Allocate the parts of an adapter for the module called ``key``: ``self.put(name, lora_A=..., r=8)``."""
        raise NotImplementedError

    def transform_input(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter makes of the layer's input."""
        return x

    def transform_output(self, name: str, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        """What the adapter makes of the output ``y`` so far; ``base_y`` is the base layer's own output."""
        return y

    def fold(self, name: str, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The weight ``[out, in, *kernel]`` with the adapter in it; ``base`` is the weight without any adapter."""
        return weight

    def unfold(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`fold`, where there is one."""
        return weight

    def fold_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The bias ``[out]`` (None where the layer has none) with the adapter in it."""
        return bias

    def unfold_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        return bias

    @classmethod
    def share(cls, config: Any, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
        """What the layers have in common, made before :meth:`update_layer` fills them one by one.

        Returns:
            For a name in ``shared`` the tensor of the whole model (a Parameter is trained, a plain tensor frozen), or
            an ``nn.ParameterDict`` or ``BufferDict`` of several. For a name in ``weights`` or ``settings`` a list with
            the part of each layer.
        """
        return {}

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: Any) -> str | None:
        """Why the method has no meaning on such a layer, or None."""
        return None

    def needs_weight(self) -> bool:
        """True where the forward is best written as ``apply(x, fold(W))`` on this kind of layer."""
        return False

    def dear_to_make(self) -> bool:
        """Whether making the weight costs a good part of a product with it: then it is kept where it is small."""
        return False

    def unmergeable(self, name: str) -> str | None:
        """Why the adapter cannot become part of the weight, or None."""
        return None

    def as_saved(self, name: str, saved: str, tensor: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """What the file holds for a tensor of the adapter, by its name in the file.

        Several tensors in the place of the one are a dict: what to append to its name -> tensor.
        """
        return tensor

    def as_loaded(self, name: str, saved: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """The one tensor that :meth:`as_saved` has written as several, in the parts named in ``split``."""
        raise NotImplementedError

    def aligned(self, name: str, like: str) -> dict[str, torch.Tensor]:
        """The tensors of an adapter, for the parts of the base that those of another one belong to."""
        return dict(self.tensors(name))

    def origin(self, name: str) -> dict[str, torch.Tensor]:
        """What stands in the base where the tensors of an adapter stand, if they take its place."""
        return {}

    def release(self) -> None:
        """Undo what the layer has done to other modules; called when it leaves the model."""

    def takes(self, name: str, saved: str, shape: torch.Size) -> bool:
        """Whether a file's tensor of another shape can take the place of the adapter's, by its name in the file."""
        return False

    def loaded(self, name: str) -> None:
        """Make what is ``remade`` from tensors of the adapter; called when a file has just brought those."""

    def upgrade(self, name: str, written_by: str) -> None:
        """Adjust an adapter just loaded from a file of another version, where the two mean different things."""

    # --- state ----------------------------------------------------------------------------------------------
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names, cls.other_param_names = tuple(cls.weights), tuple(cls.settings)
        cls.changes_input = cls.transform_input is not BaseTunerLayer.transform_input

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        config: Any = None,
        *,
        kind: Kind | None = None,
        context: Context | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._modules["base_layer"] = base_layer
        base = self.get_base_layer()
        kind = kind or kind_of(base)
        self.__dict__.update(  # not one by one: a module looks into each value that is set
            training=base_layer.training,
            kind=kind,
            read_by_parent=kind is not None and kind.read_by_parent,
            merged_adapters=[],
            cast_input_dtype_enabled=True,
            tied_to={},
            shares_weight=False,
            merge_error=0.0,
            _adapters={},
            _kept={},
            _storage=None,
        )
        self._start(context)
        for name, container in (*self.weights.items(), *self.settings.items()):
            if issubclass(container, nn.Module):
                self._modules[name] = blank(container)
            else:
                self.__dict__[name] = container()
        if self.kind is not None:
            if not self.storage.can_read and (self.kind.through_weight or self.reads_weight):
                raise ValueError(
                    f"the forward of {type(self).__name__} needs the dense weight, and weights kept by "
                    f"{self.storage.name} cannot be read. Use a method that adds to the output, or load "
                    "the base model unquantised or quantised by bitsandbytes."
                )
            self.__dict__["in_features"], self.__dict__["out_features"] = self.kind.sizes(base)
        elif not self.any_module:
            raise ValueError(f"{type(base).__name__} is no kind of layer that {type(self).__name__} can adapt.")
        if adapter_name is not None:
            self.add_adapter(adapter_name, config)
            self.set_adapter(adapter_name)

    def train(self, mode: bool = True) -> BaseTunerLayer:
        for child in self._modules.values():
            if isinstance(child, nn.ModuleDict | nn.ParameterDict | BufferDict):  # a container has no mode of its own
                child.__dict__["training"] = mode
                for part in child._modules.values():
                    part.train(mode)
            elif child is not None:
                child.train(mode)
        self.__dict__["training"] = mode
        return self

    def get_base_layer(self) -> nn.Module:
        """The innermost layer, without any adapter around it."""
        layer = self.base_layer
        while isinstance(layer, BaseTunerLayer):
            layer = layer.base_layer
        return layer

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    @property
    def storage(self) -> Storage:
        """How the base weight is kept now: others may dequantise the model below its adapters."""
        base = self.get_base_layer()
        key = type(base), type(getattr(base, self.kind.weight, None))
        if self._storage is None or self._storage[0] != key:
            self._storage = key, storage_of(base, self.kind.weight)
        return self._storage[1]

    @property
    def adapter_names(self) -> list[str]:
        return list(self._adapters)

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, in, *kernel]`` of the base weight."""
        return self.kind.shape(self.get_base_layer())

    @property
    def by_weight(self) -> bool:
        """Whether the forward multiplies by the weight with the adapters in it."""
        return self.kind is not None and (self.kind.through_weight or self.needs_weight())

    def sums_exactly(self) -> bool:
        """Whether W can hold an update added to it: quantised or 16-bit weights would round small ones away."""
        weight = getattr(self.get_base_layer(), self.kind.weight, None)
        plain = self.storage.name is None and isinstance(weight, torch.Tensor) and weight.dtype.itemsize >= 4
        return plain and not is_autocast(weight.device.type)

    def add_adapter(self, name: str, config: Any, key: str = "") -> None:
        """Allocate an adapter and put it on the device, and into the dtype, of the base weight."""
        self.update_layer(name, config, key)
        self._adapters[name] = None
        place = self._place()
        for container in self._containers(name):
            item = container[name]
            device, dtype = _place_of(item, place)
            frozen = not isinstance(item, nn.Module | nn.Parameter)  # kept as exact as it was made
            if _is_at(item, device, None if frozen else dtype):
                continue
            moved = item.to(device=device, dtype=None if frozen else dtype)
            if isinstance(item, nn.Parameter) and moved is not item:
                moved = nn.Parameter(moved.detach(), requires_grad=item.requires_grad)
            if moved is not item:
                container[name] = moved

    def put(self, name: str, **values: Any) -> None:
        """Store parts of an adapter: one value for each name declared in ``weights`` or ``settings``."""
        for attribute, value in values.items():
            if isinstance(value, nn.Module) and not self.training:
                value.eval()  # a new module would drop out in a model that does not train
            getattr(self, attribute)[name] = value

    def drop(self, name: str, attribute: str) -> None:
        """Remove one part of an adapter, if it has it."""
        container = getattr(self, attribute)
        if name in container:
            del container[name]

    def _containers(self, name: str) -> Iterator[Any]:
        for attribute in self.weights:
            container = self._modules[attribute]
            if name in container:
                yield container

    def place_for(self, item: torch.Tensor | nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype for a new part: those of the base weight, where that is a dense tensor."""
        return _place_of(item, self._place())

    def _place(self) -> tuple[torch.device | None, torch.dtype | None]:
        """The base weight's device and dtype, None where parts have nothing to follow."""
        base = self.get_base_layer()
        anchor = getattr(base, self.kind.weight, None) if self.kind else next(base.parameters(), None)
        if not isinstance(anchor, torch.Tensor):
            anchor = next(itertools.chain(base.parameters(), base.buffers()), None)
        if anchor is None or anchor.device.type == "meta":
            return None, None
        floating = anchor.dtype.is_floating_point and anchor.dtype.itemsize > 1
        if self.kind is not None and self.storage.name is not None:
            floating = False  # codes have no dtype to follow, so the adapter stays in float32, as in QLoRA
        return anchor.device, anchor.dtype if floating else None

    def adapter_parameters(self, name: str) -> Iterator[torch.Tensor]:
        for container in (*self._containers(name), *self._trained_by_all(name)):
            item = container[name]
            if isinstance(item, nn.Parameter):
                yield item
            elif isinstance(item, nn.Module) and item._modules:
                yield from item.parameters()
            elif isinstance(item, nn.Module):  # the same, without a walk
                yield from (p for p in item._parameters.values() if p is not None)

    def tensors(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors on which an adapter depends here, those too that the layers share or that no file holds."""
        for attribute in (*self.weights, *self.shared):
            container: Any = getattr(self, attribute, None) or {}
            if name in container and isinstance(container[name], nn.Module):
                for part, tensor in container[name].state_dict(keep_vars=True).items():
                    yield f"{attribute}.{part}", tensor
            elif name in container:
                yield attribute, container[name]

    def _trained_by_all(self, name: str) -> Iterator[Any]:
        """Containers of trained tensors that the layers of the model have in common."""
        for attribute in self.shared:
            container = self._modules.get(attribute)
            if container is not None and name in self and name in container:
                yield container

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        for attribute in self.weights:
            container = self._modules[attribute]
            if name not in container or attribute in self.remade:
                continue
            item = container[name]
            if not isinstance(item, nn.Module):
                yield attribute, f"{attribute}.{name}", item
                continue
            for sub, tensor in _tensors_of(item):
                part = f"default.{sub}" if self.labelled else sub
                saved = attribute if attribute in self.bare else f"{attribute}.{part}"
                yield saved, f"{attribute}.{name}.{sub}", tensor

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was merged, the layer is unmerged first."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        for attribute in (*self.weights, *self.settings):
            self.drop(adapter_name, attribute)
        self._adapters.pop(adapter_name, None)
        self._forget(adapter_name)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks, the base layer answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = self.__dict__.get("kind")
            delegates = "base_layer" in self.__dict__.get("_modules", ()) and name != "base_layer"
            if not delegates or (name.startswith("_") and not (kind and kind.through_weight)):
                raise
        return self._read(name)

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight; where another module computes with it, with the adapters in it."""
        return self._read("weight")

    @property
    def bias(self) -> torch.Tensor | None:
        return self._read("bias")

    def _read(self, name: str) -> Any:
        """An attribute of the base layer, with the adapters in it if it is the weight or bias of such a layer."""
        kind, state = self.__dict__.get("kind"), self.__dict__
        read = kind is not None and (kind.through_weight or state.get("read_by_parent"))
        if read and name in (kind.weight, kind.bias):
            names = self._current()
            return self._stored_weight(names) if name == kind.weight else self._folded_bias(names)
        return getattr(self.base_layer, name)

    # --- forward --------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with the active adapters, or with one adapter for each row (``adapter_names``)."""
        rows = kwargs.pop("adapter_names", None) or self.context.adapter_names
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if rows is not None and self.context.current is None:
            return self._mixed(tuple(rows), args, kwargs)
        names = self._live() if rows is None else self._current()
        return self._adapted(names, args, kwargs) if names else self.base_layer(*args, **kwargs)

    def _live(self) -> list[str]:
        """Adapters that act in the forward: active, present here, and not in the weight already."""
        merged, present = self.merged_adapters, self._adapters
        return [name for name in self._active_adapter if name in present and name not in merged]

    def _current(self) -> list[str]:
        """Adapters that act on a weight which another module reads."""
        if self._disable_adapters:
            self.unmerge()
            return []
        if self.context.current is not None:
            return [name for name in self.context.current if name in self]
        if self.context.adapter_names is not None:
            raise ValueError(
                "adapter_names cannot be used here: another module computes with the weight of an adapted layer, for "
                "all rows at once. Adapt that module itself (the attention, not its out_proj), or use one adapter."
            )
        return self._live()

    def _adapted(self, names: list[str], args: tuple, kwargs: dict) -> Any:
        if self.by_weight:
            return self._through_weight(names, args, kwargs)
        x, *rest = args
        inner = x
        if self.changes_input:
            for name in names:
                inner = self.transform_input(name, self.cast(name, inner))
            inner = inner.to(x.dtype)
        base_y = y = self.base_layer(inner, *rest, **kwargs)
        for name in names:
            y = self.transform_output(name, self.cast(name, x), y, base_y)
        return y.to(base_y.dtype)

    def _through_weight(self, names: list[str], args: tuple, kwargs: dict) -> Any:
        base, kind = self.get_base_layer(), self.kind
        if kind.through_weight:
            values = self._effective(names)
            return functional_call(base, {k: v for k, v in values.items() if v is not None}, args, kwargs)
        bias, below = self._folded_bias(names), self._names_below()  # which may be others in the backward pass
        y = self.multiplied(args[0], lambda: self._as_input(self._folded_weight(names, below), args[0]), names)
        return y if bias is None else y + kind.along_channels(bias, base)

    def _as_input(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """A weight that was dequantised, in the dtype of the input."""
        return weight if self.storage.name is None or not x.is_floating_point() else weight.to(x.dtype)

    def multiplied(self, x: torch.Tensor, make: Callable[[], torch.Tensor], names: Sequence[str] = ()) -> torch.Tensor:
        """``make() x``, with a weight ``[out, in, *kernel]`` made of these adapters: made again in the backward pass.

        Neither the weight nor what it is computed from is kept meanwhile: a dense base that was dequantised, or an
        update that takes as much memory as W. An exception are weights that are :meth:`dear_to_make`.
        """
        assert self.kind is not None
        base = self.get_base_layer()
        if self.kind.matrix and self.dear_to_make() and self.storage.name is None:
            out, inner = self.shape
            if out * inner <= x.numel() * (1 + out / inner):  # no larger than what the layer takes and gives
                return self.kind.apply(base, x, make())
        return made_product(self.kind, base, x, make, self._read_by(names))

    def _read_by(self, names: Sequence[str]) -> list[torch.Tensor]:
        """The tensors from which the weight with these adapters is made."""
        found = [p for name in names for p in self.adapter_parameters(name)]
        inner = self._inside() if self.by_weight else None
        if inner is not None:
            return found + inner._read_by(inner._current())
        return found + list(self.get_base_layer().parameters(recurse=False))

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of an adapter's tensors."""
        return next(p.dtype for p in self.adapter_parameters(name))

    def cast(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x in the dtype of the adapter, which may be wider than the activations'."""
        if self.cast_input_dtype_enabled and x.is_floating_point():
            for p in self.adapter_parameters(name):
                return x if p.dtype == x.dtype or not p.is_floating_point() else x.to(p.dtype)
        return x

    # --- mixed batches --------------------------------------------------------------------------------------
    def _mixed(self, names: tuple[str, ...], args: tuple, kwargs: dict) -> Any:
        """Each row of the batch has its own adapter; rows of an adapter that is not here have none."""
        if self.merged_adapters:
            raise ValueError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first.")
        kind, base = self.kind or _ANY, self.get_base_layer()
        first = args[0] if args else next(iter(kwargs.values()))
        axis = kind.batch_axis(base)
        if first.shape[axis] == 1 and len(names) > 1 and args:  # a row that the samples share, such as positions
            first = first.expand(*[len(names) if a == axis else -1 for a in range(first.dim())])
            args = (first, *args[1:])
        groups = self.context.groups(names, first.shape[axis], first.device)
        parts, order, _ = groups
        if len(parts) == 1:
            return self._with_current(parts[0][0], args, kwargs)
        if not any(name in self for name, _ in parts) and not kind.companions:
            return self.base_layer(*args, **kwargs)
        if self.by_weight or self.kind is None:
            done = [self._with_current(name, *kind.take_rows(base, args, kwargs, rows)) for name, rows in parts]
            return kind.join_rows(base, done, order)
        return self._mixed_rows(groups, args, kwargs)

    def _mixed_rows(self, groups: Groups, args: tuple, kwargs: dict) -> torch.Tensor:
        """One call of the base layer for all rows, and what each adapter makes of its own."""
        x, *rest = args
        rows_of = {name: x.index_select(0, rows) for name, rows in groups.parts}
        inner = x
        if self.changes_input:
            turned = [
                self.transform_input(name, self.cast(name, part)).to(x.dtype) if name in self else part
                for name, part in rows_of.items()
            ]
            inner = torch.cat(turned).index_select(0, groups.order)
        base_y = self.base_layer(inner, *rest, **kwargs)
        parts = []
        for name, rows in groups.parts:
            part = base_y.index_select(0, rows)
            if name in self:
                self.context.rows = rows, len(x)
                part = self.transform_output(name, self.cast(name, rows_of[name]), part, part).to(base_y.dtype)
            parts.append(part)
        self.context.rows = None
        return torch.cat(parts).index_select(0, groups.order)

    def _with_current(self, name: str, args: tuple, kwargs: dict) -> Any:
        """The call with one adapter, also in layers whose weight the base layer reads."""
        outer, self.context.current = self.context.current, [name]
        names = [name] if name in self else []
        try:
            return self._adapted(names, args, kwargs) if names else self.base_layer(*args, **kwargs)
        finally:
            self.context.current = outer

    # --- the weight with adapters in it -----------------------------------------------------------------------
    def get_base_weight(self) -> torch.Tensor:
        """The dense base weight as it is now, ``[out, in, *kernel]``."""
        base = self.get_base_layer()
        return self.kind.orient(self.storage.read(base, self.kind.weight), base)

    def set_base_weight(self, weight: torch.Tensor) -> None:
        """Replace the base weight by ``[out, in, *kernel]``, in the memory that it has unless something needs the old
        one."""
        base = self.get_base_layer()
        stored = self.kind.restore(weight, base)
        if "weight" in self._kept or self.shares_weight or not self.storage.overwrite(base, self.kind.weight, stored):
            self.storage.write(base, self.kind.weight, stored, self.shares_weight)

    def unmerged_weight(self) -> torch.Tensor:
        """The base weight without any adapter, ``[out, in, *kernel]``."""
        weight = _wide(self.get_base_weight())
        layer: nn.Module = self
        while isinstance(layer, BaseTunerLayer):
            if layer.merged and layer.kind.weight == self.kind.weight:
                weight = layer._stripped(weight)
            layer = layer.base_layer
        return weight

    def _stripped(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight without what this layer has merged into it."""
        if "weight" in self._kept:
            base, storage, kept = self._kept["weight"]
            return _wide(self.kind.orient(storage.read_kept(base, self.kind.weight, kept), base))
        for name in reversed(self._fold_order(self.merged_adapters)):
            weight = self.unfold(name, weight)
        return weight

    def get_base_bias(self) -> torch.Tensor | None:
        bias = getattr(self.get_base_layer(), self.kind.bias, None) if self.kind.bias else None
        return None if bias is None else bias.detach() if not bias.requires_grad else bias

    def bias_below(self) -> torch.Tensor | None:
        """The bias in what the layer below gives: the base's, and what adapters of other methods there make of it."""
        inner = self._inside()
        of_rows = self.context.adapter_names is not None and self.context.current is None
        return self.get_base_bias() if inner is None or of_rows else inner._folded_bias(inner._current())

    def unmerged_bias(self) -> torch.Tensor | None:
        """The bias without what this layer has merged into it."""
        kept = self._kept.get("bias", self)
        return self.get_base_bias() if kept is self else kept

    def _fold_order(self, names: Any) -> list[str]:
        """Rotations apply to x one after another, hence to W in reverse order."""
        names = list(names)
        return names[::-1] if self.changes_input else names

    def _inside(self) -> BaseTunerLayer | None:
        """The tuner layer between this one and the base layer that acts on the same weight, if any."""
        inner = self.base_layer
        same = isinstance(inner, BaseTunerLayer) and inner.kind is not None and inner.kind.weight == self.kind.weight
        return inner if same else None

    def _names_below(self) -> tuple[list[str], ...]:
        """The adapters that act on the same weight in the layers inside this one, from the next one inwards."""
        inner = self._inside()
        return () if inner is None else (inner._current(), *inner._names_below())

    def _folded_weight(self, names: list[str], below: tuple[list[str], ...] | None = None) -> torch.Tensor:
        """The weight ``[out, in, *kernel]`` with these adapters in it, and those in the layers inside this one."""
        inner, (first, *rest) = self._inside(), (self._names_below() if below is None else below) or ([],)
        weight = self.get_base_weight() if inner is None else inner._folded_weight(first, tuple(rest))
        if not names:
            return weight
        dtype, weight = weight.dtype, _wide(weight)
        base = weight if inner is None and not self.merged else self.unmerged_weight()
        for name in self._fold_order(names):
            weight = self.fold(name, weight, base)
        return weight.to(dtype)

    def _folded_bias(self, names: list[str]) -> torch.Tensor | None:
        """The bias ``[out]`` with these adapters in it."""
        inner = self._inside()
        bias = old = self.get_base_bias() if inner is None else inner._folded_bias(inner._current())
        for name in self._fold_order(names):
            bias = self.fold_bias(name, bias)
        like = getattr(self.get_base_layer(), self.kind.weight) if old is None else old
        return bias.to(like.dtype) if bias is not None and like.is_floating_point() else bias

    def _effective(self, names: list[str]) -> dict[str, torch.Tensor | None]:
        """The tensors that the base layer should read, as it stores them, by attribute; nested layers included."""
        values = {}
        if isinstance(self.base_layer, BaseTunerLayer):
            values = self.base_layer._effective(self.base_layer._current())
        values[self.kind.weight] = self._stored_weight(names)
        if self.kind.bias:
            values[self.kind.bias] = self._folded_bias(names)
        return values

    def _stored_weight(self, names: list[str]) -> torch.Tensor:
        return self.kind.restore(self._folded_weight(names), self.get_base_layer())

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the base weight, in the layout in which the layer stores it.

        Raises:
            ValueError: if no weight equals the adapter.
        """
        change = self.weight_change(adapter)
        return self.kind.restore(change, self.get_base_layer())

    def weight_change(self, name: str) -> torch.Tensor:
        """What an adapter adds to the base weight, ``[out, in, *kernel]``.

        Raises:
            ValueError: if no weight equals the adapter.
        """
        if reason := self.unmergeable(name):
            raise NoEqualWeightError(reason)
        base = self.unmerged_weight()
        return self.fold(name, base, base) - base

    # --- merge ------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters (default: the active ones) into the base weight, so that the forward costs nothing extra.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: which adapters; those merged already are passed over.

        Raises:
            ValueError: if the adapter cannot be merged, or its merged weight is not finite; the layer is unchanged.
        """
        inner = self.base_layer
        if isinstance(inner, BaseTunerLayer) and inner.to_merge(adapter_names):
            inner.merge(safe_merge, adapter_names)
        new = check_adapters_to_merge(self, adapter_names)
        if not new:
            return
        for name in new:
            if reason := self.unmergeable(name):
                raise NoEqualWeightError(f"adapter {name!r} cannot be merged: {reason}")
        names = [*self.merged_adapters, *new]
        self.unmerge()
        self._check_writable()
        dtype, weight, bias = self.get_base_weight().dtype, _wide(self.get_base_weight()), self.get_base_bias()
        base = self.unmerged_weight()
        for name in self._fold_order(names):
            weight, bias = self.fold(name, weight, base), self.fold_bias(name, bias)
        if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(
                f"merging {', '.join(map(repr, new))} gives a weight with NaN or infinite entries; "
                "nothing was merged. The adapter is broken or was trained in a dtype too narrow for it."
            )
        self._write(names, weight.to(dtype), bias)

    def replace_base(self, module: nn.Module) -> nn.Module:
        """Put another layer in the place of the innermost one, which is returned."""
        layer: BaseTunerLayer = self
        while isinstance(layer.base_layer, BaseTunerLayer):
            layer = layer.base_layer
        old, layer.base_layer = layer.base_layer, module
        return old

    def to_merge(self, adapter_names: Sequence[str] | None = None) -> list[str]:
        """Those of these adapters (default: the active ones) that are here and not merged yet."""
        wanted = dict.fromkeys(self._active_adapter if adapter_names is None else adapter_names)
        return [name for name in wanted if name in self and name not in self.merged_adapters]

    def _check_writable(self) -> None:
        if not self.storage.can_write:
            way = "merge_and_unload(dequantize=True), " if self.storage.can_read else ""
            raise ValueError(
                f"weights kept by {self.storage.name} cannot be written, so nothing can be merged into "
                f"them. To merge: {way}or load the base model unquantised and the adapter on it."
            )

    def _write(self, names: list[str], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        base, kind, attribute = self.get_base_layer(), self.kind, str(self.kind.bias)
        old_bias = self.get_base_bias()
        keep = any(self.keeps_base(name) for name in names)
        if keep or self.shares_weight or not self.storage.lossless:
            self._kept["weight"] = base, self.storage, self.storage.keep(base, kind.weight)
        wanted = None if self.storage.lossless else _wide(weight)
        if (keep or not self.storage.lossless) and old_bias is not None:
            self._kept["bias"] = old_bias.detach()
        self.set_base_weight(weight)
        if wanted is not None:
            self.merge_error = float((_wide(self.get_base_weight()) - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if bias is not None and old_bias is None:
            warnings.warn(
                f"merging gives {type(base).__name__} a bias that it did not have; a model saved with it "
                "loads only where its architecture declares that bias."
            )
            self._kept["bias"] = None
            setattr(base, attribute, nn.Parameter(bias.to(weight.dtype), requires_grad=False))
        elif bias is not None and bias is not old_bias:
            getattr(base, attribute).data = bias.to(old_bias.dtype)
        self.merged_adapters = names

    def keeps_base(self, name: str) -> bool:
        """Whether the original weight is kept while this adapter is merged."""
        return not self.reversible

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight."""
        if not self.merged_adapters:
            return
        base, kind, attribute = self.get_base_layer(), self.kind, str(self.kind.bias)
        names, bias = self._fold_order(self.merged_adapters)[::-1], self.get_base_bias()
        if "weight" in self._kept:
            old_base, storage, kept_weight = self._kept["weight"]
            if old_base is not base:  # somebody has dequantised the model meanwhile
                self.replace_base(old_base)
                base = old_base
            storage.put_back(base, kind.weight, kept_weight)
        else:
            stored = self.get_base_weight()
            self.set_base_weight(self._stripped(_wide(stored)).to(stored.dtype))
        if "bias" in self._kept:
            kept = self._kept["bias"]
            if kept is None:
                setattr(base, attribute, None)
            else:
                getattr(base, attribute).data = kept
        elif bias is not None:
            old = bias
            for name in names:
                bias = self.unfold_bias(name, bias)
            if bias is not old:
                getattr(base, attribute).data = bias.to(old.dtype)
        self.merged_adapters, self._kept = [], {}

    def extra_repr(self) -> str:
        return f"adapters={self.adapter_names}, active={self._active_adapter}"


def _tensors_of(item: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a part is saved with."""
    if item._modules or item._buffers or item._state_dict_hooks:
        return list(item.state_dict(keep_vars=True).items())
    return [(name, p) for name, p in item._parameters.items() if p is not None]


def _place_of(
    item: torch.Tensor | nn.Module, place: tuple[torch.device | None, torch.dtype | None]
) -> tuple[torch.device | None, torch.dtype | None]:
    """Where a part of a layer goes, if what floats goes to this place."""
    if isinstance(item, torch.Tensor):
        tensors = [item]
    elif item._modules or item._buffers:
        tensors = [*item.parameters(), *item.buffers()]
    else:
        tensors = [p for p in item._parameters.values() if p is not None]
    if any(t.is_meta for t in tensors):
        return None, None
    device, dtype = place
    return device, dtype if dtype is not None and all(t.is_floating_point() for t in tensors) else None


def _is_at(item: torch.Tensor | nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    """Whether a part is on this device and in this dtype already (None: any)."""
    if isinstance(item, torch.Tensor):
        tensors: Any = (item,)
    elif item._modules or item._buffers:
        return False  # its own rules may apply
    else:
        tensors = [p for p in item._parameters.values() if p is not None]
    return all((device is None or t.device == device) and (dtype is None or t.dtype == dtype) for t in tensors)


_ANY = Kind()  # how rows are taken from a module whose kind does not matter


def _wide(weight: torch.Tensor) -> torch.Tensor:
    """Sixteen-bit weights are folded in float32 and rounded once."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters of a layer that are still to be merged: those asked for, by default the active ones.

    Warns if all of them are merged already.
    """
    if isinstance(adapter_names, str):
        raise ValueError(f"adapter_names should be a list of adapter names, got the string {adapter_names!r}.")
    new = module.to_merge(adapter_names)
    wanted = module.active_adapters if adapter_names is None else adapter_names
    if not new and (merged := [name for name in wanted if name in module.merged_adapters]):
        warnings.warn(f"All adapters to merge are merged already: {', '.join(merged)}.")
    return new

"""One adapted layer: a base layer and its adapters, written once for every method, kind and storage."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from peft.compat.by_hand import with_given
from peft.compat.foreign import Unconstructed
from peft.core.adapter import Adapter
from peft.core.base.kinds import WHOLE, Kind, foreign_kind, kind_of
from peft.core.base.storage import Storage, storage_key
from peft.core.filling import make_module
from peft.core.layer import routes
from peft.core.layer import weight as weights
from peft.core.layer.composed import composed_class, in_order, leaves_of, made_of
from peft.core.layer.lean import Noted, Seen, lean, noted
from peft.core.layer.placement import settle
from peft.core.layer.read import ReadThrough
from peft.core.layer.rewritten import Rewritten, follow, give_back, give_back_unmerged, include, keep_merged
from peft.core.layer.room import held_constant, hold, make_more_room, make_room, names_held, set_mode
from peft.core.layer.rows import mixed
from peft.core.model.context import Context
from peft.errors import WrongTypeError
from peft.kernels.grouped import forget


_UNREADABLE = (
    "the forward of {layer} needs the dense weight, and weights kept by {storage} cannot be read. Use a method that "
    "adds to the output, or load the base model unquantised or quantised by bitsandbytes."
)


class BaseTunerLayer(Unconstructed, ReadThrough):
    """Wraps ``base_layer`` and holds the adapters of one method around it.

    What an adapter holds is one dict for each of its names, keyed by adapter: ``layer.lora_A["default"].weight``. What
    it does is said by the method's :class:`Adapter` class; the layer finds the way to compute it (:mod:`routes`), and
    puts it into the weight and takes it out (:mod:`weight`).

    Attributes:
        adapter_cls: the method's class of adapters.
        by_name: the classes of adapted layers by kind and storage: ``{"Linear": lora.Linear, ...}``.
        adapter_layer_names, other_param_names: names of dicts of trained tensors, and of all others.
        adapters: by name. key: the name of the module in the unadapted model.
        kind: how the base layer uses its weight. read_by_parent: another module reads it instead of calling the layer.
        merged_adapters: names of the adapters in the weight now. originals: what unmerging puts back.
        rewritten: the weights that starts have made. merge_error: ``|rounded - W'| / |W'|`` of the last merge.
        tied_to: adapter -> the layer whose adapter it follows. shares_weight: another module holds the same parameter.
    """

    adapter_cls: ClassVar[type[Adapter]] = Adapter
    by_name: ClassVar[dict[str, type[BaseTunerLayer]]] = {}
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    kind: Kind
    key = ""
    read_by_parent: bool
    rewritten: Rewritten | None = None
    cast_input_dtype_enabled: bool
    shares_weight = False
    merge_error = 0.0
    _storage: Noted | None
    _seen: Seen | None = None
    _may_add: ClassVar[bool] = False  # a call may be lean

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "adapter_cls" in vars(cls):
            cls.adapter_layer_names, cls.other_param_names = names_held(cls.adapter_cls)
            cls._may_add = routes.only_adds(cls.adapter_cls)  # type: ignore[arg-type]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str | None = None,
        config: Any = None,
        *args: Any,  # what constructors of 0.21 take there
        kind: Kind | None = None,
        context: Context | None = None,
        **kwargs: Any,
    ) -> None:
        if "_modules" not in self.__dict__:  # else a third party's class has started the module
            make_module(self)
        self._modules["base_layer"] = base_layer
        base, cls = self.get_base_layer(), self.adapter_cls
        kind = kind or (WHOLE if cls.any_module else kind_of(base) or foreign_kind(type(self), base))
        if kind is None:
            raise ValueError(f"{type(base).__name__} is no kind of layer that {type(self).__name__} can adapt.")
        self.__dict__.update(  # not one by one: a module looks into each value that is set
            training=True,  # as any new module: what evaluates says so afterwards, as loading does
            kind=kind,
            read_by_parent=kind.read_by_parent,
            adapters={},
            merged_adapters=[],
            originals={},
            cast_input_dtype_enabled=True,
            tied_to={},
            _storage=None,
        )
        self._start(context)
        make_room(self, cls)
        if not kind.whole:
            if not self.storage.can_read and (kind.opaque or cls.requires_dense_base):
                raise ValueError(_UNREADABLE.format(layer=type(self).__name__, storage=self.storage.name))
            self.__dict__["in_features"], self.__dict__["out_features"] = kind.sizes(base)
        if adapter_name is not None:
            self.first_adapter(adapter_name, with_given(type(self), config, args, kwargs), kwargs)
            self.set_adapter(adapter_name)

    def train(self, mode: bool = True) -> BaseTunerLayer:
        set_mode(self, mode)
        return self

    def get_base_layer(self) -> nn.Module:
        """The innermost layer, without any adapter around it."""
        layer = self._modules["base_layer"]
        while isinstance(layer, BaseTunerLayer):
            layer = layer._modules["base_layer"]
        return layer  # type: ignore[return-value]

    def replace_base(self, module: nn.Module) -> nn.Module:
        """Put another layer in the place of the innermost one, which is returned."""
        layer = (self, *weights.layers_inside(self))[-1]
        old, layer.base_layer, layer.__dict__["_seen"] = layer.base_layer, module, None
        return old

    def __contains__(self, name: object) -> bool:
        return name in self.adapters

    @property
    def adapter_names(self) -> list[str]:
        return list(self.adapters)

    @property
    def storage(self) -> Storage:
        """How the base weight is kept now: others may dequantise, or offload, the model below its adapters."""
        base = self.get_base_layer()
        key = storage_key(base, self.kind.weight)
        if self._storage is None or self._storage.key != key:
            self.__dict__["_storage"] = noted(self.kind, key, base)
        return self._storage.storage  # type: ignore[union-attr]

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, in, *kernel]`` of the base weight."""
        return self.kind.shape(self.get_base_layer())

    def add_adapter(self, name: str, config: Any, key: str = "") -> None:
        """Allocate an adapter and put it on the device, and into the dtype, of the base weight."""
        cls = composed_class(self, name) or self._class_of(name, config)
        make_more_room(self, cls)
        adapter = self.adapters[name] = cls(self, name)
        keep_merged(self)  # for_a_start as it is written out: a context costs more than a layer can spend here
        try:
            adapter.create(config, key)
        except BaseException:
            self._drop(name)
            raise
        finally:
            follow(self)
        settle(self, adapter)

    def _class_of(self, name: str, config: Any) -> type[Adapter]:
        return self.adapter_cls.of(config)

    def put(self, name: str, **values: Any) -> None:
        """Store what an adapter holds: one value for each name of a part or a setting; None removes it."""
        for attribute, value in values.items():
            container = self._modules.get(attribute)
            if container is None:
                container = self.__dict__[attribute]
            elif value is None:
                if name in container:
                    del container[name]
                continue
            if type(container) is nn.ModuleDict:
                hold(self, container, name, value)
            else:
                container[name] = value

    def _drop(self, name: str) -> None:
        """Forget an adapter and all that it holds; what its start has made of the base weight is undone."""
        give_back(self, name)
        self.__dict__["_seen"] = None
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            container: Any = self._modules.get(attribute, self.__dict__.get(attribute))
            if attribute not in self.adapter_cls.common and name in container:
                del container[name]
        self.adapters.pop(name, None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was merged, the layer is unmerged first."""
        forget(self)
        if adapter_name in self.merged_adapters:
            self.unmerge()
        self._drop(adapter_name)
        self._forget(adapter_name)

    def release(self) -> None:
        """Undo what the layer has done to other modules; called when it leaves the model."""
        give_back_unmerged(self)

    def adapter_parameters(self, name: str) -> Iterator[torch.Tensor]:
        return self.adapters[name].parameters() if name in self.adapters else iter(())

    def adapter_constants(self, name: str) -> Iterator[torch.Tensor]:
        return held_constant(self.adapters[name]) if name in self.adapters else iter(())

    def adapter_state(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        return self.adapters[name].state() if name in self.adapters else iter(())

    def check_active(self, names: list[str]) -> None:
        here = [self.adapters[name] for name in names if name in self.adapters]
        for place, adapter in enumerate(here):
            if reason := adapter.clash(leaves_of(here[:place]) if place else ()):
                raise ValueError(reason)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward with the active adapters, or with one adapter for each row (``adapter_names``)."""
        if self._may_add and len(args) == 1 and not kwargs and (y := lean(self, args[0])) is not None:
            return y
        rows = kwargs.pop("adapter_names", None) or self.context.adapter_names
        if not args and not (self.kind.whole or self.kind.opaque):
            args, kwargs = routes.input_first(self, kwargs)
        if self._disable_adapters:
            if self.merged_adapters:  # switched off means the base's output
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if rows is not None and self.context.current is None:
            return mixed(self, tuple(rows), args, kwargs)
        adapters = self._live() if rows is None else self.current()
        return routes.adapted(self, adapters, args, kwargs) if adapters else self.base_layer(*args, **kwargs)

    def _live(self) -> list[Adapter]:
        """Adapters that act in the forward: active, present here, and not in the weight already."""
        here, merged, active = self.adapters, self.merged_adapters, self._active_adapter
        names = (active,) if isinstance(active, str) else active  # others set one name
        live = [here[n] for n in names if n in here and n not in merged]
        return in_order(live) if self.context.common.compositions else live

    def current(self) -> list[Adapter]:
        """Adapters that act on a weight which another module reads."""
        if self._disable_adapters:
            self.unmerge()
            return []
        if self.context.current is not None:
            return in_order([a for name in self.context.current if (a := made_of(self, name)) is not None])
        if self.context.adapter_names is not None:
            raise ValueError(
                "adapter_names cannot be used here: another module computes with the weight of an adapted layer, for "
                "all rows at once. Adapt that module itself (the attention, not its out_proj), or use one adapter."
            )
        return self._live()

    def may_bypass_base(self, x: torch.Tensor) -> bool:
        """Whether the layer's output may be computed without calling the base layer; its bias may train.

        Not where calling it does more than its class says (hooks, a replaced ``forward``, such as accelerate's for
        offloaded weights), nor where its tensors are no ordinary ones at hand: sharded, quantised, on the meta device.
        """
        base: Any = self._modules["base_layer"]
        if not self.kind.is_own(base) or self.merged_adapters:
            return False
        weight = self.storage.direct_weight(base, self.kind.weight)
        return weight is not None and weight.device == x.device

    def base_is_fresh(self) -> bool:
        """Whether nothing else holds or needs what the base layer gives: it may be changed in place."""
        base: Any = self._modules["base_layer"]
        return not isinstance(base, BaseTunerLayer) and self.storage.output_may_be_overwritten(base, self.kind.weight)

    def bypass_matrix(self, x: torch.Tensor) -> torch.Tensor | None:
        """W ``[out, in]`` where kernels may compute the whole layer with it, W x + b with a frozen b; else None."""
        if not self.kind.matrix or not self.may_bypass_base(x):
            return None
        base = self._modules["base_layer"]
        bias = base._parameters.get("bias")
        if bias is not None and bias.requires_grad:
            return None
        return self.kind.orient(base._parameters[self.kind.weight], base)

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def merged_ones(self) -> list[Adapter]:
        """The adapters in the weight, in the order in which they went in."""
        return [self.adapters[name] for name in self.merged_adapters]

    def to_merge(self, adapter_names: Sequence[str] | None = None) -> list[str]:
        """Those of these adapters (default: the active ones) that are here and not merged yet."""
        wanted = dict.fromkeys(self.active_adapters if adapter_names is None else adapter_names)
        return [name for name in wanted if name in self.adapters and name not in self.merged_adapters]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters (default: the active ones) into the base weight, so that the forward costs nothing extra.

        Args:
            safe_merge: refuse a result that is not finite. adapter_names: those merged already are passed over.

        Raises:
            ValueError: if one cannot be merged, or its merged weight is not finite; the layer is unchanged.
        """
        inner = self.base_layer
        if isinstance(inner, BaseTunerLayer) and inner.to_merge(adapter_names):
            inner.merge(safe_merge, adapter_names)
        if new := check_adapters_to_merge(self, adapter_names):
            include(self, new)
            weights.merge(self, [self.adapters[name] for name in new], safe_merge)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight."""
        weights.unmerge(self)
        follow(self)

    def switched(self) -> None:
        follow(self)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the base weight, in the layout in which the layer stores it.

        Raises:
            ValueError: if no weight equals the adapter.
        """
        return self.kind.restore(weights.weight_change(self, self.adapters[adapter]), self.get_base_layer())

    def extra_repr(self) -> str:
        return f"adapters={self.adapter_names}, active={self.active_adapters}"


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """The adapters of a layer that are still to be merged: those asked for, by default the active ones.

    Warns if all of them are merged already.
    """
    if isinstance(adapter_names, str):
        raise WrongTypeError(f"adapter_names should be a list of adapter names, got the string {adapter_names!r}.")
    new = module.to_merge(adapter_names)
    wanted = module.active_adapters if adapter_names is None else adapter_names
    if not new and (merged := [name for name in wanted if name in module.merged_adapters]):
        warnings.warn(f"All adapters to merge are merged already: {', '.join(merged)}.")
    return new

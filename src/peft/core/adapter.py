"""One adapter at one layer: its tensors, its settings, its mathematics. This is what a method writes.

The tensors live in the layer, one dict for each name and keyed by adapter (``layer.lora_A["default"]``), where the
ecosystem looks for them and whence files have their keys. An :class:`Adapter` is the pair (layer, name), and
:class:`part`, :class:`setting` and :class:`shared` declare what it holds there: within the adapter's own code,
``self.lora_A`` is that very tensor. Its hooks are asked of the adapter itself, so what one adapter answers cannot
depend on others that the layer holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from peft.core.addition import Addition, NoSum
from peft.core.base.storage.sharded import tensors_in
from peft.core.layer import weight as weights
from peft.core.layer.buffers import BufferDict
from peft.core.parts import Drops, part, setting, shared
from peft.core.parts import input_dropout as input_dropout


if TYPE_CHECKING:
    from peft.core.base.kinds import Kind
    from peft.core.base.storage import Storage
    from peft.core.layer.layer import BaseTunerLayer
    from peft.core.model.context import Context
    from peft.kernels.linear import Factors


LABEL = "default"
"""What files of some methods say in the place of an adapter's name."""

MORE = part()
"""How a part is kept that only a layer names, in its ``adapter_layer_names``."""


class Adapter(Drops):
    """An adapter at one layer. A method declares parts and settings, and overrides hooks; nothing else.

    Attributes:
        layer, name: where it is, and what it is called.
        adds: how adapters of the method add up, see :mod:`peft.core.addition`.
        layer_base: the class of layers that can hold it, if not any adapted layer.
        split: what :meth:`as_saved` appends to the name of a tensor that it writes as several.
        labelled: files say "default" in the names of tensors, in the place of the adapter's name.
        labelled_inside: files say it in the names of tensors of modules inside a part, where 0.21 leaves the name.
        spares_input: its :meth:`input` and :meth:`output` see to it that autograd keeps no x which can be made again
            (:func:`peft.kernels.made_again.reading`); otherwise the layer does, and looks at all that is kept.
        random_in_training: a training step draws random numbers, even without dropout.
        reversible: :meth:`unfold` undoes :meth:`fold`; otherwise the original weight is kept while merged.
        requires_dense_base: the forward computes with the dense base weight.
        more_kinds: kinds of layers that it can adapt besides those of :mod:`peft.core.base.kinds`.
        any_module: it takes modules whole and needs to know no kind.
        follows_ties: modules tied to a targeted embedding get the same adapter.
        untrained: parts that a variant holds constant, though its method trains them: saved as ever, never trained.
        held_in: where :meth:`factors` finds bare linear layers A and B, a dropout and s, if it does nothing else.
        printed_as: how a printed model names its layers, if not by method and kind.
        loss_weight: the config's field that weighs the mean of :meth:`loss_term` over layers; without one, their sum.
    """

    __slots__ = ("layer", "name")
    layer: BaseTunerLayer
    name: str

    parts: ClassVar[dict[str, part]] = {}
    settings: ClassVar[dict[str, setting]] = {}
    common: ClassVar[dict[str, shared]] = {}
    declares: ClassVar[frozenset[str]] = frozenset(__slots__)
    known_names: ClassVar[frozenset[str]] = frozenset()
    adds: ClassVar[Addition] = NoSum()
    layer_base: ClassVar[Any] = None
    split: ClassVar[tuple[str, ...]] = ()
    labelled: ClassVar[bool] = False
    labelled_inside: ClassVar[bool] = False
    random_in_training: ClassVar[bool] = False
    reversible: ClassVar[bool] = True
    requires_dense_base: ClassVar[bool] = False
    more_kinds: ClassVar[tuple[Kind, ...]] = ()
    any_module: ClassVar[bool] = False
    follows_ties: ClassVar[bool] = False
    untrained: ClassVar[frozenset[str]] = frozenset()
    printed_as: ClassVar[str] = ""
    loss_weight: ClassVar[str] = ""
    changes_input: ClassVar[bool] = False
    spares_input: ClassVar[bool] = False
    held_in: ClassVar[tuple[str, str, str, str] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # From the base to the class itself: what a variant declares again takes the place of its method's declaration.
        found = {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}
        cls.parts = {name: value for name, value in found.items() if isinstance(value, part)}
        cls.settings = {name: value for name, value in found.items() if isinstance(value, setting)}
        cls.common = {name: value for name, value in found.items() if isinstance(value, shared)}
        cls.declares = frozenset((*cls.parts, *cls.settings, *Adapter.__slots__))
        cls.known_names = frozenset((*(name for value in cls.parts.values() for name in value.names), *cls.common))
        cls.changes_input = cls.input is not Adapter.input

    def __init__(self, layer: BaseTunerLayer, name: str) -> None:
        self.layer, self.name = layer, name

    def __setattr__(self, attribute: str, value: Any) -> None:
        if attribute not in self.declares:
            raise AttributeError(
                f"{type(self).__name__} declares no {attribute!r}, so nothing keeps it. Add a line to the "
                f"class: `{attribute} = part()` for a tensor that trains, `{attribute} = setting()` for anything else."
            )
        object.__setattr__(self, attribute, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    # --- what a method defines ------------------------------------------------------------------------------
    def create(self, config: Any, key: str) -> None:
        """Make the parts for the module called ``key``: assign them, ``self.hira_A = nn.Parameter(...)``."""
        raise NotImplementedError

    @classmethod
    def of(cls, config: Any) -> type[Adapter]:
        """The class of the adapters that a config asks for: the method's, or a variant of it."""
        return cls

    @classmethod
    def share(cls, config: Any, layers: Sequence[BaseTunerLayer]) -> dict[str, Any]:
        """What the layers have in common, made before :meth:`create` fills them one by one.

        Returns:
            For a name declared as :class:`shared` the tensor of the whole model (a Parameter is trained, a plain
            tensor frozen), or an ``nn.ParameterDict`` or ``BufferDict`` of several. For a name of a part or setting a
            list with that of each layer: layers may hold the very same.
        """
        return {}

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: Any) -> str | None:
        """Why the method has no meaning on such a layer, or None."""
        return None

    def input(self, x: torch.Tensor) -> torch.Tensor:
        """What the adapter makes of the layer's input."""
        return x

    def output(self, x: torch.Tensor, y: torch.Tensor, base_y: torch.Tensor) -> torch.Tensor:
        """What the adapter makes of the output ``y`` so far; ``base_y`` is the base layer's own output."""
        return y

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The weight ``[out, in, *kernel]`` with the adapter in it; ``base`` is the weight without any adapter.

        Law: the base layer with this weight and :meth:`fold_bias`'s bias computes what the adapted one does.
        """
        return weight

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`fold`, where there is one."""
        return weight

    def fold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The bias ``[out]`` (None where the layer has none) with the adapter in it."""
        return bias

    def unfold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        return bias

    def prefers_folding(self) -> bool:
        """Whether this forward is best written as ``apply(x, fold(W))`` where the base layer may be passed by."""
        return False

    def only_folds(self) -> bool:
        """Whether no other way is known on this kind of layer."""
        return False

    def folds_in_reverse(self) -> bool:
        """Whether the one that acts on x first is folded last, as maps of the input are."""
        return self.changes_input

    def dear_to_make(self) -> bool:
        """Whether making the weight costs a good part of a product with it: then it is kept where it is small."""
        return False

    @classmethod
    def kernel(cls, layer: BaseTunerLayer, adapters: Sequence[Any], x: torch.Tensor) -> torch.Tensor | None:
        """The layer's output with all these adapters by one kernel, None where there is none for this call."""
        return None

    def factors(self) -> Factors | None:
        """dW of a linear layer as s B A, which may be computed, with dropout on the input; None for anything else."""
        return None

    def training_factors(self) -> Sequence[Factors] | None:
        """The same for a training step, in as many parts as cost the least: what is frozen apart, a matrix between."""
        factors = self.factors()
        return None if factors is None else (factors,)

    def stand_in(self) -> nn.Module | None:
        """A module that acts in the place of the whole base module, where the method has one."""
        return None

    def loss_term(self) -> torch.Tensor | None:
        """What it adds to the loss of the call that was just computed, a scalar; None for nothing."""
        return None

    def unmergeable(self) -> str | None:
        """Why the adapter cannot become part of the weight, or None."""
        return None

    def group_change(self) -> tuple[torch.Tensor, int] | None:
        """dW ``[out, in / size]`` and size, where it is the same for all inputs of a group and all that changes."""
        return None

    def keeps_base(self) -> bool:
        """Whether the original weight is kept while this adapter is merged."""
        return not self.reversible

    def clash(self, others: Sequence[Adapter]) -> str | None:
        """Why it cannot be active, or merged, together with these, or None."""
        return None

    def as_saved(self, saved: str, tensor: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """What the file holds for a tensor, by its name in the file.

        Several tensors in the place of the one are a dict: what to append to its name -> tensor.
        """
        return tensor

    def as_loaded(self, saved: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """The one tensor that :meth:`as_saved` has written as several, in the parts named in ``split``."""
        raise NotImplementedError

    def takes(self, saved: str, shape: torch.Size) -> bool:
        """Whether a file's tensor of another shape can take the place of the adapter's, by its name in the file."""
        return False

    def loaded(self) -> None:
        """Make what is ``remade`` from other parts, or from a base that had no values before.

        Called when a file has just brought those parts.
        """

    def upgrade(self, written_by: str) -> None:
        """Adjust an adapter just loaded from a file of another version, where the two mean different things."""

    def aligned(self, like: Adapter) -> dict[str, torch.Tensor]:
        """The tensors, for the parts of the base that those of another adapter belong to."""
        return dict(self.tensors())

    def origin(self) -> dict[str, torch.Tensor]:
        """What stands in the base where the tensors stand, if they take its place."""
        return {}

    # --- the layer, as an adapter sees it -------------------------------------------------------------------
    @property
    def kind(self) -> Kind:
        return self.layer.kind

    @property
    def storage(self) -> Storage:
        return self.layer.storage

    @property
    def context(self) -> Context:
        return self.layer.context

    @property
    def training(self) -> bool:
        return self.layer.training

    @property
    def base(self) -> Any:
        """The base layer."""
        return self.layer.get_base_layer()

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, in, *kernel]`` of the base weight."""
        return self.layer.shape

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        return self.layer.out_features

    @property
    def tied_to(self) -> Any:
        """The adapter of the same name at the layer that this one is tied to, or None."""
        layer = self.layer.tied_to.get(self.name)
        return None if layer is None else layer.adapters[self.name]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the adapter's tensors."""
        return next(p.dtype for p in self.parameters())

    def base_weight(self) -> torch.Tensor:
        """The weight without any adapter, dense, ``[out, in, *kernel]``."""
        return weights.unmerged_weight(self.layer)

    def base_bias(self) -> torch.Tensor | None:
        """The bias without what the layer has merged into it."""
        return weights.unmerged_bias(self.layer)

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """x in the dtype of the adapter, which may be wider than the activations'."""
        if self.layer.cast_input_dtype_enabled and x.is_floating_point():
            for p in self.parameters():  # the first tells: an adapter has one dtype
                return x if p.dtype is x.dtype or not p.is_floating_point() else x.to(p.dtype)
        return x

    def multiplied(self, x: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``make() x`` with a weight made of this adapter; see :func:`peft.core.layer.weight.multiplied`."""
        return weights.multiplied(self.layer, x, make, (self,))

    def along_channels(self, v: torch.Tensor) -> torch.Tensor:
        """A vector over features, shaped to multiply x or y."""
        kind = self.layer.kind
        return v if kind.matrix else kind.along_channels(v, self.base)

    def sums_exactly(self) -> bool:
        """Whether W can hold an update added to it."""
        return weights.sums_exactly(self.layer)

    # --- state ----------------------------------------------------------------------------------------------
    def held(self) -> list[tuple[str, part, Any]]:
        """Its parts: attribute of the layer, declaration, what is there."""
        layer, name = self.layer, self.name
        found = [
            (declared.attribute(layer), declared, value)
            for declared in self.parts.values()
            if (value := declared.read(layer, name)) is not None
        ]
        return found + [(attribute, MORE, value) for attribute, value in self._further()]

    def _further(self) -> list[tuple[str, Any]]:
        """What a third party's layer holds for it in containers that no part declares."""
        layer, name = self.layer, self.name
        if self.known_names.issuperset(layer.adapter_layer_names):
            return []
        more: Any = ((at, getattr(layer, at, ())) for at in layer.adapter_layer_names if at not in self.known_names)
        return [(attribute, container[name]) for attribute, container in more if name in container]

    def parameters(self) -> Iterator[torch.Tensor]:
        """The trained tensors, those in common with other layers included."""
        layer, untrained = self.layer, type(self).untrained
        for declared in self.parts.values():  # not those held, which are looked up before the first is given
            value = None if declared.container is BufferDict else declared.read(layer, self.name)
            if value is not None and not (untrained and declared.attribute(layer) in untrained):
                if isinstance(value, nn.Module):
                    yield from _tensors_that_train(value)
                else:  # yielded as it is: torch 2.14 does not compile `yield from` a tuple that is left early
                    yield value
        for _, value in self._further():
            yield from value.parameters() if isinstance(value, nn.Module) else (value,)
        for name in type(self).common:
            if (container := self.layer._modules.get(name)) is not None and self.name in container:
                value = container[self.name]
                yield from _tensors_that_train(value) if isinstance(value, nn.Module) else (value,)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors on which it depends here, those too that the layers share or that no file holds."""
        held = [(attribute, value) for attribute, _, value in self.held()]
        of_all: Any = ((name, getattr(self.layer, name, None) or {}) for name in type(self).common)
        held += [(name, container[self.name]) for name, container in of_all if self.name in container]
        for attribute, value in held:
            if isinstance(value, nn.Module):
                for sub, tensor in tensors_in(value).items():
                    yield f"{attribute}.{sub}", tensor
            else:
                yield attribute, value

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Its tensors in files: name there, name in memory below the layer, tensor."""
        for attribute, declared, value in self.held():
            if declared.remade or (declared.saved_by and not getattr(self, declared.saved_by)):
                continue
            if not isinstance(value, nn.Module):
                yield attribute, f"{attribute}.{self.name}", value
                continue
            for sub, tensor in _saved_tensors(value):
                labelled = self.labelled or (self.labelled_inside and "." in sub)
                within = f"{LABEL}.{sub}" if labelled else sub
                saved = attribute if declared.bare else f"{attribute}.{within}"
                yield saved, f"{attribute}.{self.name}.{sub}", tensor


def _saved_tensors(item: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a module is saved with."""
    if item._modules or item._buffers or item._state_dict_hooks:
        return list(tensors_in(item).items())
    # `state_dict` gives the same for a bare module, and takes many times as long: a model has thousands of them.
    return [(name, p) for name, p in item._parameters.items() if p is not None]


def _tensors_that_train(item: nn.Module) -> Iterator[torch.Tensor]:
    # the same in both, but a walk takes long
    return item.parameters() if item._modules else (p for p in item._parameters.values() if p is not None)

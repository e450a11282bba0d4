"""LoRA: dW = s B A (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from peft.compat.asked import Asked, is_replaced, is_theirs
from peft.compat.methods import LoraLayerCompat, LoraVariantCompat
from peft.core.adapter import Adapter, input_dropout, part, setting
from peft.core.base.kinds import Kind
from peft.core.base.stack import Stack
from peft.core.families import Scaled
from peft.core.filling import skip_values
from peft.core.layer.rewritten import for_a_start, give_back
from peft.core.layer.scaled import ScaledLayer
from peft.kernels import Factors, active_rate, bare_weight
from peft.options import check_choice
from peft.tuners.lora.config import LoraConfig, divisor
from peft.tuners.lora.initialize import initialize, is_drawn, refusal
from peft.tuners.lora.megatron import PARALLEL, ParallelLinear
from peft.tuners.lora.pairs import split_pair, without_padding


class Lora(LoraVariantCompat, Scaled):
    """y' = y + s B A drop(x), A ``[r, in]`` and B ``[out, r]``, s = lora_alpha / r (or / sqrt r).

    On convolutions A is a convolution with the base layer's geometry and B one of size 1. On embeddings A is a table
    ``[r, tokens]``. Variants (DoRA, ...) are subclasses; :meth:`of` finds those that a config asks for. Several are
    combined by inheritance, so a variant's hooks call ``super()`` where another may act on the same thing.

    Attributes:
        variants: the variants, in the order in which they wrap each other: the first is the outermost.
        option: the field of the config that asks for a variant where it is set.
        excludes: name of another variant's class -> why the two have no meaning together.
        made_of: the variants that a combination is made of.
        of_others: adapters whose variant is a third party's object.
        computes_pair: A and B are computed from what is held, see :meth:`pair`.
        adds_product: the output is the base layer's and s B A drop(x), nothing else, so the fused kernels may give it.
        fixed_rank: zeros cannot fill its tensors up to a larger rank, so only files of its rank take their place.
        needs_dense_pair: what a variant needs a weight for that the pair equals; "" where it needs none.
        ties: a head tied to an embedding may follow it, with the transposed pair.
        agrees: hooks of a variant that give the same wherever :meth:`product` gives factors.
    """

    lora_A, lora_B = part(nn.ModuleDict), part(nn.ModuleDict)
    lora_embedding_A, lora_embedding_B = part(), part()
    lora_magnitude_vector = part(nn.ModuleDict, bare=True)
    r, lora_alpha, scaling = setting(), setting(), setting()
    lora_dropout = input_dropout()
    use_rslora, use_dora, lora_bias = setting(), setting(), setting()

    variants: ClassVar[list[type[Lora]]] = []
    option: ClassVar[str] = ""
    excludes: ClassVar[dict[str, str]] = {}
    made_of: ClassVar[tuple[type[Lora], ...]] = ()
    computes_pair: ClassVar[bool] = False
    adds_product: ClassVar[bool] = True
    fixed_rank: ClassVar[bool] = False
    agrees: ClassVar[frozenset[str]] = frozenset()
    of_others: ClassVar[type[Lora]]
    ties: ClassVar[bool] = True
    needs_dense_pair: ClassVar[str] = ""
    held_in: ClassVar[tuple[str, str, str, str] | None] = ("lora_A", "lora_B", "lora_dropout", "scaling")
    layer_base: ClassVar[Any] = ScaledLayer
    more_kinds: ClassVar[tuple[Kind, ...]] = PARALLEL

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.computes_pair = (cls.pair, cls.acting_pair) != (Lora.pair, Lora.acting_pair)
        changed = (name for name in ("output", "delta", "update") if getattr(cls, name) is not getattr(Lora, name))
        cls.adds_product = cls.agrees.issuperset(changed)
        own = (cls.factors, cls.product) != (Lora.factors, Lora.product)
        cls.held_in = None if own or cls.computes_pair or not cls.adds_product else Lora.held_in

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickles, which find no combination by its name."""
        return _blank, (type(self).made_of or (type(self),),), (None, {"layer": self.layer, "name": self.name})

    @classmethod
    def asked_by(cls, config: LoraConfig) -> bool:
        """Whether a config asks for this variant."""
        return getattr(config, cls.option, None) not in (None, False)

    @classmethod
    def of(cls, config: LoraConfig) -> type[Lora]:
        return combined(tuple(variant for variant in cls.variants if variant.asked_by(config)) or (cls,))

    @classmethod
    def tied(cls) -> type[Lora]:
        """The class of a head's adapter that follows one of this class at the embedding.

        Raises:
            ValueError: if a variant does more than a pair does, so the transposed pair is not the same update.
        """
        asked = [variant for variant in cls.made_of or (cls,) if variant is not Lora]
        if more := [variant.__name__ for variant in asked if not variant.ties]:
            raise ValueError(
                f"ensure_weight_tying ties a head to an embedding by one pair A and B, and {', '.join(more)} is more "
                "than that. Leave the head out of target_modules, or train plain LoRA."
            )
        return combined((*(variant for variant in asked if variant.output is not Lora.output), TiedPair))

    @classmethod
    def refusal(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        if config.lora_bias and (kind.lookup or kind.bias is None):
            return "lora_bias has no place on a layer without bias"
        if reason := refusal(kind, module, config):
            return reason
        asked = [variant for variant in cls.variants if variant.asked_by(config)]
        if isinstance(kind, ParallelLinear) and (reason := kind.refused(config, asked)):
            return reason
        reasons = [variant.refuses(kind, module, config) for variant in asked]
        for variant in asked:
            reasons += [variant.excludes.get(other.__name__) for other in asked]
        return next((reason for reason in reasons if reason), None)

    @classmethod
    def refuses(cls, kind: Kind, module: nn.Module, config: LoraConfig) -> str | None:
        """Why a variant has no meaning on such a layer, or None."""
        reason = kind.no_dense_pair(module) if cls.needs_dense_pair else None
        return f"{cls.needs_dense_pair}, but {reason}" if reason else None

    def refuses_start(self, config: LoraConfig) -> str | None:
        """Why this adapter cannot start as a config says, or None; the rest of that config counts for nothing."""
        mine = (variant for variant in self.variants if isinstance(self, variant))
        reasons = (variant.refuses(self.kind, self.base, config) for variant in mine)
        return next(filter(None, reasons), None) or refusal(self.kind, self.base, config)

    def create(self, config: LoraConfig, key: str) -> None:
        # by one call: a load does this at hundreds of layers
        options = {name: getattr(config, name) for name in ("use_rslora", "use_dora", "lora_bias")}
        self.layer.put(self.name, r=config.rank_at(key), lora_alpha=config.alpha_at(key), **options)
        self.lora_dropout = config.lora_dropout
        self.scaling = self.initial_scaling()
        self.make_pair(config)

    def make_pair(self, config: LoraConfig) -> None:
        """Allocate A and B, and let them start."""
        self.allocate(self.r, config.lora_bias)
        if not (is_drawn(config) and skip_values()):
            self.start(config)
        if is_theirs(getattr(type(self.layer), "reset_lora_parameters", None)):
            self.layer.reset_lora_parameters(self.name, config.init_lora_weights)
        else:
            check_start(config.init_lora_weights)

    def start(self, config: LoraConfig) -> None:
        """Give A and B the values that they start from."""
        initialize(self, config)

    def allocate(self, r: int, bias: bool = False) -> None:
        """Make a pair of rank r, with the shapes of the file format and no values yet."""
        if self.kind.lookup:
            out, tokens = self.shape
            self.lora_embedding_A = nn.Parameter(torch.empty(r, tokens))
            self.lora_embedding_B = nn.Parameter(torch.empty(out, r))
        else:
            self.lora_A, self.lora_B = self.kind.factor(self.base, r, bias)

    def held_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors that are trained and saved as A and B."""
        if self.kind.lookup:
            return self.lora_embedding_A, self.lora_embedding_B
        return self.lora_A.weight, self.lora_B.weight

    def pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of dW = s B A, shaped as plain LoRA's: those held, or what a variant makes of them."""
        return self.held_pair()

    def of_inputs(self, a: torch.Tensor) -> torch.Tensor:
        """What multiplies the layer's inputs where A, or what is added to it, is held as ``a``."""
        return a

    def acting_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in this forward, which a variant may draw anew while it trains; no weight has that in it."""
        return self.pair()

    # --- the mathematics --------------------------------------------------------------------------------------
    def delta(self, x: torch.Tensor) -> torch.Tensor:
        return self.update(self.dropped(x))

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """s B A x, of an input after dropout."""
        if self.kind.lookup:
            a, b = self.acting_pair()
            return self.kind.apply(self.base, x, a) @ b.T * self.scaling
        if self.computes_pair:
            a, b = self.acting_pair()
            return self.raised(self.kind.down(self.base, x, a), b) * self.scaling
        return self.lora_B(self.lora_A(x)) * self.scaling

    def raised(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """B h with the bias of B, for a B that is computed."""
        y = self.kind.up(self.base, h, b.flatten(1))
        return y + self.along_channels(self.lora_B.bias) if self.lora_bias else y

    def factors(self) -> Factors | None:
        return self.product() if self.adds_product else None

    def product(self) -> Factors | None:
        """The update of a linear layer as factors; None where calling its parts does more than multiply."""
        held = self.held_product()
        if held is None or not self.computes_pair:
            return held
        return Factors(*self.acting_pair(), held.scale, held.dropout)

    def held_product(self) -> Factors | None:
        """The same of A and B as they are held, whatever a variant makes of them."""
        layer, name = self.layer, self.name
        modules = layer._modules
        up = modules["lora_B"]._modules.get(name)
        a, b = bare_weight(modules["lora_A"]._modules.get(name)), bare_weight(up)
        if a is None or b is None or up._parameters["bias"] is not None:
            return None
        dropout = modules["lora_dropout"]._modules[name]
        rate, scale = 0.0 if type(dropout) is nn.Identity else active_rate(dropout), layer.scaling[name]
        if rate is None or isinstance(scale, torch.Tensor):  # a tensor may train
            return None
        return Factors(a, b, scale, rate)

    def delta_weight(self) -> torch.Tensor:
        return self.kind.compose(self.base, *self.pair()) * self.scaling

    def fold(self, weight: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return self._with_pair(weight, 1)

    def unfold(self, weight: torch.Tensor) -> torch.Tensor:
        return self._with_pair(weight, -1)

    def _with_pair(self, weight: torch.Tensor, sign: int) -> torch.Tensor:
        """W + sign * s B A; of a linear layer without a matrix for B A."""
        if (theirs := self.given_delta()) is not None:
            return weight + sign * theirs.to(weight.dtype)
        a, b = self.pair()
        number = not isinstance(self.scaling, torch.Tensor)
        if number and self.kind.matrix and a.dtype == b.dtype == weight.dtype:
            return torch.addmm(weight, b, a, alpha=sign * self.scaling)
        return weight + sign * self.delta_weight().to(weight.dtype)

    def fold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        return bias if not self.lora_bias else self._bias_delta() + (0 if bias is None else bias)

    def unfold_bias(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        return bias if not self.lora_bias or bias is None else bias - self._bias_delta()

    def _bias_delta(self) -> torch.Tensor:
        return self.lora_B.bias * self.scaling

    def unmergeable(self) -> str | None:
        return self.kind.no_dense_pair(self.base)

    def initial_scaling(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        return self.lora_alpha / divisor(self.r, self.use_rslora)

    # --- files ------------------------------------------------------------------------------------------------
    def as_saved(self, saved: str, tensor: torch.Tensor) -> torch.Tensor:
        return without_padding(self, saved, tensor)

    def upgrade(self, written_by: str) -> None:
        """Files before 1.0 mean the update of an attention's out_proj twice."""
        if self.kind.read_by_parent and written_by.startswith("0."):
            self.lora_B.weight.data.mul_(2)


@functools.cache
def combined(variants: tuple[type[Lora], ...]) -> type[Lora]:
    """The class of adapters that are all of these variants at once; the first is the outermost."""
    if len(variants) == 1:
        return variants[0]
    members = {
        "__module__": Lora.__module__,
        "__doc__": "All of these at once: " + ", ".join(variant.__name__ for variant in variants) + ".",
        "made_of": variants,
    }
    return type("".join(variant.__name__ for variant in variants), variants, members)


def _blank(variants: tuple[type[Lora], ...]) -> Lora:
    cls = combined(variants)
    return cls.__new__(cls)


class TiedPair(Lora):
    """A module that shares its weight with an adapted embedding: the same update, for a head transposed.

    dW = (B A)^T, so the head's A is the embedding's B^T and the other way round. A further embedding, such as that of
    a decoder beside its encoder, has the pair as it is. Neither holds tensors.
    """

    def make_pair(self, config: LoraConfig) -> None:
        pass

    def held_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = self.tied_to.held_pair()
        return (a, b) if self.kind.lookup else (b.T, a.T)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind.lookup:
            return super().delta(x)
        a, b = self.pair()
        return self.lora_dropout(x).to(a.dtype) @ a.T @ b.T * self.scaling

    def state(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        names = ("lora_embedding_A", "lora_embedding_B") if self.kind.lookup else ("lora_A.weight", "lora_B.weight")
        for name, tensor in zip(names, self.held_pair(), strict=True):
            yield name, "", tensor


class LoraLayer(LoraLayerCompat, ScaledLayer):
    """A layer with LoRA adapters, ``lora_A[name]`` and ``lora_B[name]``. Third parties build on it:

    class MyLinear(nn.Module, LoraLayer):
        def __init__(self, base_layer, adapter_name, r):
            super().__init__()
            LoraLayer.__init__(self, base_layer)
            self.update_layer(adapter_name, r, lora_alpha=16)
    """

    adapter_cls: ClassVar[type[Adapter]] = Lora

    def _class_of(self, name: str, config: Any) -> type[Adapter]:
        cls: Any = super()._class_of(name, config)
        if type(self).resolve_lora_variant is not LoraLayer.resolve_lora_variant:
            variant: Any = self.resolve_lora_variant(config=config)
            if not isinstance(variant, type):  # an object, as a third party's class returns one
                cls = Lora if variant is None else variant.of or Lora.of_others
        return cls.tied() if name in self.tied_to else cls

    @Asked
    def num_experts(self) -> int:
        """How many matrices the adapted parameter holds; 1 for a layer. Mixtures of third parties set their own."""
        if isinstance(self, type) or not isinstance(self.kind, Stack):  # asked of the class, there is no kind
            return 1
        return self.kind.experts(self.get_base_layer())

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """An update in factors (left, right, scale); ``left @ right * scale`` is that of each matrix, as it is kept.

        Returns:
            left ``[experts, rows, r]``, right ``[experts, r, columns]``; of a parameter with two axes those of its
            transpose, ``[1, in, r]`` and ``[1, r, out]``.
        """
        lora: Any = self.adapters[adapter_name]
        right, left = split_pair(lora, *lora.pair())
        stored = self.kind.restore(left.new_empty(self.shape, device="meta"), self.get_base_layer())
        if stored.shape[-2:] != (left.shape[1], right.shape[2]) or stored.dim() == 2:
            left, right = right.mT, left.mT
        return left, right, lora.scaling

    @property
    def lora_variant(self) -> dict[str, Adapter]:
        """The adapters that are more than plain LoRA, by name; of a third party's variant, the variant."""
        held = self.adapters.items()
        found = {name: adapter for name, adapter in held if isinstance(adapter, Lora) and type(adapter) is not Lora}
        return {name: getattr(adapter, "variant", adapter) for name, adapter in found.items()}

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, r: int, lora_alpha: int = 8, config: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Give the layer an adapter, active and trained: third parties call it in the constructors of their layers.

        Args:
            config: a :class:`LoraConfig`; or, as there was none once, ``lora_dropout``, with ``init_lora_weights``,
                ``use_rslora``, ``use_dora`` and ``lora_bias`` behind it.
            kwargs: fields of the config by name; others are of no use here.
        """
        given = {name: value for name, value in kwargs.items() if name in LoraConfig.__dataclass_fields__}
        if isinstance(config, LoraConfig):
            fixed = {"r": r, "lora_alpha": lora_alpha, "rank_pattern": {}, "alpha_pattern": {}}
            config = LoraConfig(**{**config.to_dict(), **fixed, **given})
        else:
            positional = args if config is None else (config, *args)
            once = ("lora_dropout", "init_lora_weights", "use_rslora", "use_dora", "lora_bias")
            config = LoraConfig(r=r, lora_alpha=lora_alpha, **dict(zip(once, positional)), **given)
        self.add_adapter(adapter_name, config, self.key)
        self.set_adapter(self.active_adapters or [adapter_name])

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> type[Adapter] | None:
        """The class of the variant that a config asks for, or None for plain LoRA."""
        variant = Lora.of(config)
        return None if variant is Lora else variant

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any, **options: Any) -> None:
        """Start A and B of an adapter anew, with options as fields of the config; an earlier start is undone."""
        adapter: Any = self.adapters[adapter_name]
        check_start(init_lora_weights)
        config = LoraConfig(init_lora_weights=init_lora_weights, r=adapter.r, **options)
        if reason := adapter.refuses_start(config):
            raise ValueError(reason)
        if not isinstance(adapter, variant := Lora.of(config)):
            raise ValueError(f"adapter {adapter_name!r} is no {variant.__name__}; it has to be made as one.")
        give_back(self, adapter_name)
        with for_a_start(self):
            adapter.start(config)


def check_start(init: Any) -> None:
    """Refuse a start that only a third party's layers may know."""
    if init is not None and init is not True:
        rules = LoraConfig.__dataclass_fields__["init_lora_weights"].metadata
        check_choice("init_lora_weights", init, {**rules, "others": None})


def starts_otherwise() -> bool:
    """Whether a third party has written how some layers start."""
    return is_replaced(LoraLayer, "reset_lora_parameters")

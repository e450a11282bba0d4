"""A method on a layer in a dtype: what the laws are checked on, and what they measure it with."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from peft.config import PeftConfig
from peft.core.families import Copy, Delta, Fold, Output, Rotation, Rows, Sample, Scale
from peft.core.layer.layer import BaseTunerLayer
from peft.core.model.tuner import BaseTuner
from peft.core.model.walk import locate, walk
from peft.mapping_func import get_peft_model
from peft.options import value_of
from peft.peft_model import PeftModel
from peft.peft_types import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.testing.places import Place


@dataclass(frozen=True)
class Refusal:
    """Cells without meaning.

    Attributes:
        operation: "adapt", "merge" (and `get_delta_weight`), "delta" (that alone), "several", "mixed", "combine".
        phrase: what the error must say, as a regular expression.
        reason: why there is no meaning.
    """

    operation: str
    phrase: str
    reason: str
    when: Callable[[Method, Place], bool]


@dataclass(frozen=True)
class Method:
    """A method with a small config, and what has to be known of it to hold it to the laws.

    Attributes:
        name: what it is called; with a switch in brackets, as ``lora[dora]``, for a setting of a method.
        fields: fields of the config, by name. second: those that a second adapter beside the first has otherwise.
        identity: a fresh adapter changes nothing.
        times: how much larger than those of others its tensors must be made to show in an output.
        constant: its definition takes something for a constant in the backward pass, so gradients are no derivatives.
        shifts: it adds to the output what merging puts into the bias, of a layer without one too.
        waits: it acts from an invocation token on only.
        on: names of the only places that it meets; any, if empty.
        holes: where it has no meaning, beyond what its family says.
    """

    name: str
    config_cls: type[PeftConfig]
    layer_cls: type[BaseTunerLayer]
    fields: tuple[tuple[str, Any], ...] = ()
    second: tuple[tuple[str, Any], ...] = ()
    identity: bool = True
    times: float = 1
    constant: bool = False
    shifts: bool = False
    waits: bool = False
    on: tuple[str, ...] = ()
    holes: tuple[Refusal, ...] = field(default=(), hash=False)

    @classmethod
    def of(cls, tuner: type[BaseTuner], fields: dict[str, Any], **facts: Any) -> Method:
        """The method of a tuner, with a rank of 4 where it has one, these fields, and what else is to be known."""
        key = next(key for key, found in PEFT_TYPE_TO_TUNER_MAPPING.items() if found is tuner)
        config = PEFT_TYPE_TO_CONFIG_MAPPING[key]
        ranks = {f.name: 4 for f in dataclasses.fields(config) if f.name == "r" and f.default}
        facts = {"name": str(value_of(key)).lower(), **facts}
        return cls(config_cls=config, layer_cls=tuner.layer_cls, fields=tuple((ranks | fields).items()), **facts)

    @property
    def given(self) -> dict[str, Any]:
        return dict(self.fields)

    @property
    def switch(self) -> bool:
        """Whether it is a setting of a method rather than the method as it comes."""
        return "[" in self.name

    def has(self, name: str) -> bool:
        """Whether the config knows a field."""
        return name in {f.name for f in dataclasses.fields(self.config_cls)}

    @property
    def by_sample(self) -> bool:
        """Whether what it does depends on the sample: by its family, or by a gate."""
        return self.is_a(Sample) or bool(self.given.get("use_gating"))

    @property
    def sums(self) -> bool:
        """Whether adapters that differ in all their numbers have a weighted sum."""
        possible = self.layer_cls.adapter_cls.adds.possible
        return possible or "combination_type" in inspect.signature(self.tuner_cls.add_weighted_adapter).parameters

    @property
    def tuner_cls(self) -> type[BaseTuner]:
        return PEFT_TYPE_TO_TUNER_MAPPING[self.config_cls.METHOD]

    def is_a(self, *families: type) -> bool:
        """Whether its adapters are of one of these families."""
        return issubclass(self.layer_cls.adapter_cls, families)


DTYPES = {
    "float32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, True),
    "bfloat16-uncast": (torch.bfloat16, False),
}
"""Name -> dtype of the base model, and whether 16-bit adapters are held in float32 (`autocast_adapter_dtype`)."""


HOLES = [
    Refusal(
        "adapt",
        "it is none of",
        "only methods that replace whole modules know what to do with a module that has no weight W in W x + b",
        lambda m, p: p.kind == "LayerNorm" and not m.layer_cls.adapter_cls.any_module,
    ),
    Refusal(
        "adapt",
        "token rows exist only in embeddings and in linear",
        "a token is a row of a table, or an output of a head; other layers have no tokens",
        lambda m, p: m.is_a(Rows) and p.kind not in ("Linear", "Conv1D", "Embedding", "LayerNorm"),
    ),
    Refusal(
        "adapt",
        "its weight is read by another computation",
        "the update depends on the sample, so there is no weight to give to a computation that reads one",
        lambda m, p: m.by_sample and (p.kind == "MultiheadAttention" or p.name == "Linear[out_proj]"),
    ),
    Refusal(
        "merge",
        "no one weight equals it",
        "the update depends on the sample",
        lambda m, p: m.by_sample or m.waits,
    ),
    Refusal(
        "delta",
        "replaces the module",
        "a copy of a module is no change of one weight",
        lambda m, p: m.is_a(Copy),
    ),
    Refusal(
        "several",
        "one adapter can be active at a time",
        "two copies cannot both stand in for one module",
        lambda m, p: m.is_a(Copy),
    ),
    Refusal(
        "mixed",
        "computes with the weight of an adapted layer",
        "the attention around out_proj reads its weight once for all rows; adapting the attention itself is the way",
        lambda m, p: p.name == "Linear[out_proj]",
    ),
    Refusal(
        "mixed",
        "not known row by row",
        "what a module makes of a bare parameter need not keep the rows of a batch apart",
        lambda m, p: p.parameters,
    ),
    Refusal(
        "combine",
        "depends on the sample, so no sum",
        "what the adapters do is no tensor, so there is nothing to sum",
        lambda m, p: m.by_sample,
    ),
    Refusal(
        "combine",
        "not linear in their tensors",
        "a product, a rotation or another curve of tensors: the sum of such has another form",
        lambda m, p: not m.sums and not m.by_sample,
    ),
]
"""Where the family of a method, or a layer, leaves no meaning: the error gives this reason."""


@dataclass(frozen=True)
class Cell:
    """A method on a layer in a dtype."""

    method: Method
    place: Place
    precision: str

    @property
    def id(self) -> str:
        return f"{self.method.name}-{self.place.name}-{self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision][0]

    @property
    def autocast(self) -> bool:
        return DTYPES[self.precision][1]

    def base(self, seed: int = 0) -> nn.Module:
        """The plain model, in evaluation mode; its weights depend on the seed only."""
        torch.default_generator.manual_seed(seed)
        model = self.place.build()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.3)  # a bias of 0, a norm of 1 or a tiny weight would hide mistakes
        return model.to(self.dtype).eval()

    def inputs(self) -> tuple[torch.Tensor, ...]:
        generator_state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(1)
        tensors = self.place.inputs()
        torch.random.set_rng_state(generator_state)
        return tuple(t.to(self.dtype) if t.is_floating_point() else t for t in tensors)

    def config(self, second: bool = False, **changes: Any) -> PeftConfig:
        """A small config that targets the layer; that of a second adapter which can be active beside the first."""
        fields = copy.deepcopy(self.method.given) | (dict(self.method.second) if second else {})
        fields["target_parameters" if self.place.parameters else "target_modules"] = list(self.place.targets)
        return self.method.config_cls(**fields | changes)

    def fresh(self, *names: str, base: nn.Module | None = None, seed: int = 2) -> PeftModel:
        """The model with fresh adapters, in evaluation mode; the first one is active."""
        base = self.base() if base is None else base
        torch.default_generator.manual_seed(seed)
        model = get_peft_model(base, self.config(), names[0], autocast_adapter_dtype=self.autocast)
        for i, name in enumerate(names[1:], 1):
            self.add(model, name, second=i == 1)
        return model.eval()

    def add(self, model: PeftModel, name: str, second: bool = False) -> None:
        model.add_adapter(name, self.config(second), autocast_adapter_dtype=self.autocast)

    def adapted(self, *names: str) -> PeftModel:
        """The model with adapters far from their start, in evaluation mode; the first one is active."""
        model = self.fresh(*names)
        for i, name in enumerate(names):
            perturb(model, name, 10 + i, self.method.times)
        return model

    def run(self, model: nn.Module, **kwargs: Any) -> torch.Tensor:
        """The output without gradients, as float32."""
        with torch.no_grad():
            return model(*self.inputs(), **kwargs).float()

    def loss(self, model: nn.Module, rows: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """A fixed random functional of the output, linear in it; `rows` weighs the samples."""
        output = model(*self.inputs(), **kwargs)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        each = (output.float() * weight).flatten(1).mean(1)
        return each.sum() if rows is None else (each * rows).sum()

    # --- tolerances
    @property
    def relative(self) -> float:
        """Bound of rounding errors, relative to the largest entry: 16 bits round each number by up to 1/256."""
        if self.dtype == torch.float32:
            return 2e-5
        return 0.06 if self.place.deep else 0.02

    def near(self, found: torch.Tensor, wanted: torch.Tensor, what: str = "", factor: float = 1.0) -> None:
        """Two outputs are equal but for rounding."""
        assert found.shape == wanted.shape and found.isfinite().all()
        error, size = (found.float() - wanted.float()).abs().max().item(), wanted.float().abs().max().item()
        assert error <= factor * self.relative * (size + 1), f"{what}: {error} of {size}"

    def apart(self, found: torch.Tensor, other: torch.Tensor) -> None:
        """Two outputs differ by more than rounding: without that, the law would show nothing."""
        difference, size = (found.float() - other.float()).abs().max().item(), other.float().abs().max().item()
        enough = difference > 2 * self.relative * (size + 1)
        assert enough, f"{difference} of {size}: the adapter does too little; give fields with which it does more"

    # --- holes
    def refusal(self, operation: str) -> Refusal | None:
        """The hole in the table that this operation falls into, if any."""
        holes = (*HOLES, *self.method.holes)
        return next((r for r in holes if r.operation == operation and r.when(self.method, self.place)), None)

    @property
    def mixes(self) -> bool:
        """Whether the method can be active beside others."""
        return self.method.config_cls.METHOD in PEFT_TYPE_TO_MIXED_MODEL_MAPPING

    def phrase(self, operation: str) -> str:
        """What the error says of that hole, as a regular expression."""
        hole = self.refusal(operation)
        assert hole is not None, f"{self.id} has no hole at {operation!r}"
        return hole.phrase

    @property
    def differentiable(self) -> bool:
        """Whether the gradient is the derivative: not where the method, or a padding token, holds a part constant."""
        return not self.method.constant and self.place.name != "Embedding[padding_idx]"

    @property
    def unmergeable(self) -> bool:
        return self.refusal("merge") is not None


def cells(
    methods: Iterable[Method],
    places: Iterable[Place],
    *operations: str,
    precisions: tuple[str, ...] = tuple(DTYPES),
    refused: bool = False,
    switches: bool = True,
    each_layer: bool = True,
) -> list[Cell]:
    """The cells in which all these operations mean something; with ``refused``, those in which the last means nothing.

    Methods meet every layer in float32 (unless a law says that one of each kind will do: ``each_layer``), and one
    layer of each kind in the other precisions. Their switches meet one layer of each kind, in float32 unless the law
    is asked for in all precisions, and only if a switch could break it (``switches``).
    """
    found = []
    for method, place in itertools.product(methods, places):
        if not method.has("target_parameters" if place.parameters else "target_modules"):
            continue  # the config has no words for it
        if method.switch and not (switches and place.typical):
            continue
        if place.invoked != method.waits or (method.on and place.name not in method.on):
            continue
        for precision in precisions if not method.switch or len(precisions) == len(DTYPES) else precisions[:1]:
            if not place.typical and not (each_layer and precision == "float32"):
                continue
            cell = Cell(method, place, precision)
            *before, last = ("adapt", *operations) if operations != ("adapt",) else operations
            if all(cell.refusal(op) is None for op in before) and (cell.refusal(last) is not None) == refused:
                found.append(cell)
    return found


# --- helpers --------------------------------------------------------------------------------------------------


def layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """All tuner layers of a model, with the names that their modules have in the plain model; outer ones first."""
    root = model.base_model.model if isinstance(model, PeftModel) else model
    return [(site.key, w) for site in walk(root) for _, w in site.wrappers if isinstance(w, BaseTunerLayer)]


def perturb(model: nn.Module, name: str, seed: int, times: float = 1) -> None:
    """Add seeded noise to all tensors of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in layers(model):
            for p in layer.adapter_parameters(name):
                p.add_((torch.randn(p.shape, generator=generator) * 0.3 * times).to(p.dtype))


def parameters_of(model: nn.Module, name: str) -> list[torch.Tensor]:
    """The tensors of an adapter, each once."""
    return list({id(p): p for _, layer in layers(model) for p in layer.adapter_parameters(name)}.values())


def gradient(p: torch.Tensor) -> torch.Tensor:
    """The gradient of a tensor; zero where the loss does not depend on it."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's state dict."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base model's parameters as they are now, under the names that they have in the plain model."""
    root = model.base_model.model if isinstance(model, PeftModel) else model
    named = ((site.key, n, p) for site in walk(root) for n, p in site.module._parameters.items() if p is not None)
    return {f"{key}.{n}".removeprefix("."): p.detach().clone() for key, n, p in named}


def equal_states(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The same names in the same order, and the same bits."""
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def by_definition(cell: Cell, model: PeftModel, names: list[str]) -> nn.Module:
    """The plain model with the weights that the method's family defines for several adapters, from those of each.

    Updates add up, each from the unmerged W; scales multiply; rotations follow each other.
    """
    plain = cell.base()
    each = [_merged(model, name) for name in names]
    for key, layer in layers(model):
        target = locate(plain, key).module
        for slot in (layer.kind.weight, layer.kind.bias):
            if slot is None or (key, slot) not in each[0]:
                continue
            alone = [values[key, slot].double() for values in each]
            start = getattr(target, slot)  # None where merging gives a bias to a layer without
            wide = torch.zeros_like(alone[0]) if start is None else start.detach().double()
            if cell.method.is_a(Output):
                wide = _mapped(layer, names, wide, slot)
            elif not cell.method.is_a(Rotation):
                wide = _combined(cell.method, wide, alone)
            elif slot == layer.kind.weight:
                wide = _turned(layer, names, wide)
            setattr(target, slot, nn.Parameter(wide.to(cell.dtype), requires_grad=False))
    return plain


def weighted(cell: Cell, model: PeftModel, weights: dict[str, float], as_scales: bool = False) -> nn.Module:
    """The plain model with W + sum_i w_i (W_i - W); `as_scales`: with sum_i w_i W_i where the adapters act."""
    plain, base, alone, model = cell.base(), base_weights(cell.base()), {}, copy.deepcopy(model)
    for name in weights:
        model.merge_adapter([name])
        alone[name] = base_weights(model)
        model.unmerge_adapter()
    for key in dict.fromkeys(key for values in alone.values() for key in values):
        each = [values[key].double() for values in alone.values()]
        start = base[key].double() if key in base else torch.zeros_like(each[0])
        if as_scales and any(not torch.equal(one, start) for one in each):
            start = torch.zeros_like(start)
        wide = start + sum(weight * (one - start) for weight, one in zip(weights.values(), each))
        path, _, slot = key.rpartition(".")
        setattr(plain.get_submodule(path), slot, nn.Parameter(wide.to(cell.dtype), requires_grad=False))
    return plain


def _merged(model: PeftModel, name: str) -> dict[tuple[str, str], torch.Tensor]:
    """The weights and biases of the adapted layers with one adapter merged."""
    model.merge_adapter([name])
    values = {}
    for key, layer in layers(model):
        for slot in (layer.kind.weight, layer.kind.bias):
            if slot and getattr(layer.get_base_layer(), slot, None) is not None:
                values[key, slot] = getattr(layer.get_base_layer(), slot).detach().clone()
    model.unmerge_adapter()
    return values


def _combined(method: Method, start: torch.Tensor, alone: list[torch.Tensor]) -> torch.Tensor:
    if method.is_a(Delta, Fold, Rows):
        return start + sum(one - start for one in alone)
    assert method.is_a(Scale), f"say here what two active adapters of {method.layer_cls.__name__} mean"
    factors = [torch.where(start == 0, 1, one / start) for one in alone]
    return start * torch.stack(factors).prod(0)


def _mapped(layer: BaseTunerLayer, names: list[str], start: torch.Tensor, slot: str) -> torch.Tensor:
    """M_2 M_1 W, and M_2 (M_1 b + c_1) + c_2: what comes out of one map goes into the next."""
    base = layer.get_base_layer()
    for name in names:
        adapter = layer.adapters[name]
        matrix = adapter.map_output(torch.eye(layer.shape[0], dtype=torch.float64)).detach().T
        shift = adapter.shift()
        if slot == layer.kind.bias:
            start = matrix @ start + (0 if shift is None else shift.detach().double())
        else:
            weight = layer.kind.orient(start, base)
            start = layer.kind.restore((matrix @ weight.flatten(1)).view_as(weight), base)
    return start


def _turned(layer: BaseTunerLayer, names: list[str], start: torch.Tensor) -> torch.Tensor:
    """S_2 S_1 W (R_1 R_2)^T, (R_2 R_1)^T where the last comes first; S_2 R_2^T S_1 R_1^T W for tables, which rotate
    their output. S scales the output.
    """
    base, cls = layer.get_base_layer(), cast(type[Rotation], layer.adapter_cls)
    weight = layer.kind.orient(start, base)
    for name in names if layer.kind.lookup or cls.last_comes_first else names[::-1]:
        adapter = layer.adapters[name]
        rotation, s = adapter.rotation().detach().double(), adapter.scale_out()
        weight = rotation.T @ weight if layer.kind.lookup else (weight.flatten(1) @ rotation.T).view_as(weight)
        if s is not None:
            weight = s.detach().double().view(-1, *[1] * (weight.dim() - 1)) * weight
    return layer.kind.restore(weight, base)

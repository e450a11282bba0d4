"""Runs the laws over a method, and reports."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft.core.blocks.blocks import BlockLayer
from peft.core.model.tuner import BaseTuner
from peft.peft_types import PEFT_TYPE_TO_TUNER_MAPPING, parse_peft_type
from peft.testing.cells import Cell, Method, Refusal, cells
from peft.testing.laws import IN_ONE_MODEL, LAWS, Law
from peft.testing.places import LAYERS


@dataclass
class Broken:
    """A law that does not hold: where, and what was found."""

    law: Law
    cell: str
    error: BaseException

    def __str__(self) -> str:
        steps = traceback.extract_tb(self.error.__traceback__)
        step = next((step for step in reversed(steps) if step.name == self.law.name), None)
        at = f"\n    at:   {step.line} ({step.filename}:{step.lineno})" if step is not None else ""
        said = str(self.error) or "the assertion is false"
        return f"  on {self.cell}\n    {type(self.error).__name__}: {said}{at}"


@dataclass
class Report:
    """What came of checking a method.

    Attributes:
        held: law -> the cells on which it holds, ``method-layer-dtype``.
        refused: cells on which the method refuses something, by the reason that stands in the table of holes.
        broken: the laws that do not hold.
    """

    method: str
    held: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)

    def __str__(self) -> str:
        checks = sum(map(len, self.held.values()))
        lines = [f"{self.method}: {len(self.held)} laws hold, in {checks} checks."]
        for reason, where in self.refused.items():
            lines.append(f"Not on {', '.join(where)}: {reason}.")
        laws = {id(one.law): one.law for one in self.broken}
        if laws:
            lines[0] = (
                f"{self.method} breaks {len(laws)} laws, in {len(self.broken)} of {checks + len(self.broken)} checks."
            )
        for law in laws.values():
            lines += ["", f"{law.name}: {' '.join((law.check.__doc__ or '').split())}"]
            lines += [str(one) for one in self.broken if one.law is law]
        return "\n".join(lines)


def check_method(
    method: Any,
    fields: dict[str, Any] | None = None,
    *,
    second: dict[str, Any] | None = None,
    identity: bool = True,
    holes: Sequence[Refusal] = (),
    only: str = "",
    **facts: Any,
) -> Report:
    """Check that a method keeps the laws that hold for all methods of this package.

    Among them: merged equals unmerged, on each kind of layer, in 32 and 16 bits; a row of a mixed batch has the value
    and the gradient of its adapter alone; what is loaded is what was saved; a fresh adapter changes nothing; two
    active adapters are what their family says; nothing remains after unloading; it works beside LoRA. It takes
    some ten seconds, and needs neither pytest nor a network.

    Args:
        method: the class of its config, of its tuner or of its adapters, or its name. It has to be registered.
        fields: small values for fields that need some; a rank is 4.
        second: fields that a second adapter has to have otherwise if both are to be active.
        identity: whether a fresh adapter changes nothing.
        holes: where the method has no meaning, each with the reason. There, what it refuses is checked.
        only: check laws and cells with this text in ``law method-layer-dtype`` only, such as ``"Conv2d[groups]"``.
        facts: what else is to be known of it, see :class:`peft.testing.cells.Method`.

    Returns:
        the report, to print.

    Raises:
        AssertionError: a law does not hold; the message is the report, which names each such law and cell.
        TypeError: it is no method that adapts single layers, such as one of prompts or of whole blocks.
        ValueError: nothing has the text ``only``.

    Examples:
        >>> print(check_method("IA3", only="Linear[no-bias]-float32").method)
        ia3
    """
    row = Method.of(_tuner(method), fields or {}, second=tuple((second or {}).items()), identity=identity,
                    holes=tuple(holes), **facts)  # fmt: skip
    report = Report(row.name)
    for law, *on in _checks(row):
        names = [cell.id for cell in on]
        name = " and ".join(names)
        if only in f"{law.name} {name}":
            try:
                law.run(*on)
            except Exception as error:
                report.broken.append(Broken(law, name, error))
            else:
                report.held.setdefault(law.name, []).append(name)
    for cell in cells([row], LAYERS, precisions=("float32",), refused=True) if not only else ():
        hole = cell.refusal("adapt")
        report.refused.setdefault(hole.reason if hole else "", []).append(cell.place.name)
    if report.broken:
        raise AssertionError(str(report))
    if not report.held:
        raise ValueError(f"no law on any layer of {row.name} has the text {only!r}.")
    return report


def _checks(row: Method) -> Iterator[tuple[Any, ...]]:
    for law in LAWS:
        yield from ((law, cell) for cell in cells([row], LAYERS, *law.operations, **law.which) if law.when(cell))
    lora = Method.of(PEFT_TYPE_TO_TUNER_MAPPING["LORA"], {})
    found = cells([row, lora], LAYERS, *IN_ONE_MODEL.operations, **IN_ONE_MODEL.which)
    yield from ((IN_ONE_MODEL, *pair) for pair in beside(row, lora, found))


def beside(method: Method, other: Method, found: Iterable[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """The cells of two methods on one layer, each of them in turn the first, where a model can mix them."""
    at = {(cell.method.name, cell.place.name): cell for cell in found if cell.mixes}
    for place in ("Linear", "Conv2d[stride]", "Embedding[scaled]"):
        mine, theirs = at.get((method.name, place)), at.get((other.name, place))
        if mine is not None and theirs is not None:
            yield theirs, mine
            if mine is not theirs:
                yield mine, theirs


def _tuner(method: Any) -> type[BaseTuner]:
    """The tuner of a method, by whichever of its classes."""
    if isinstance(method, str):
        method = PEFT_TYPE_TO_TUNER_MAPPING[parse_peft_type(method.upper())]
    layer = getattr(method, "layer_cls", None)
    for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values():
        held = getattr(tuner, "layer_cls", None)
        if tuner is method or (held is not None and method is held.adapter_cls):
            layer = held
            break
    else:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(getattr(method, "METHOD", None))
        layer = getattr(tuner, "layer_cls", None)
    if layer is None or issubclass(layer, BlockLayer) or not issubclass(tuner, BaseTuner):
        raise TypeError(
            f"check_method takes a registered method that adapts single layers: the class of its config, or its name. "
            f"{getattr(method, '__name__', method)!r} is none."
        )
    return tuner

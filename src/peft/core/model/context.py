"""What one forward call carries to the adapted layers: one small object, shared by all layers of a model.

The facts stay until the next call replaces them, for what recomputes by means of its own; the blocks that a model of
transformers recomputes get those of the call that they repeat, see :meth:`Context.as_noted`. Each thread has facts of
its own, see :mod:`peft.core.model.threads`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from peft.core.composition import Composition, alternatives
from peft.core.layer.together import Readers
from peft.core.model.sequence import Tokens, note_in_cache, tokens_of
from peft.core.model.threads import Common, Facts
from peft.errors import PeftWarning
from peft.meanwhile import having


if TYPE_CHECKING:
    from peft.core.base.kinds import Kind


BASE = "__base__"  # the adapter name of rows that use no adapter


class Groups(NamedTuple):
    """The rows of a batch by adapter, which :meth:`Context.split` computes one after another.

    Attributes:
        parts: the rows of each adapter, the adapters in the order in which the rows name them.
        order: where each row of the batch stands once the parts are put one after another.
        index: which of the parts each row of the batch belongs to.
    """

    parts: list[tuple[Any, torch.Tensor]]
    order: torch.Tensor
    index: torch.Tensor


class Known(Common):
    """What the calls of all threads share.

    Attributes:
        compositions: the adapters of the model that are made of others: name -> expression.
        reads_tokens: some adapter reads the tokens of calls; without one they are not looked at.
        pooled: the adapters belong to a pool, and nothing else writes into their tensors; a copy belongs to none.
        unprepared: adapters that wait for a start from data: name -> gives what to say of it where it trains now, None
            where it does not. A copy knows of none.
    """

    def __init__(self, compositions: dict[str, Composition] | None = None, reads_tokens: bool = False) -> None:
        super().__init__()
        self.compositions: dict[str, Composition] = compositions or {}
        self.reads_tokens, self.pooled = reads_tokens, False
        self.unprepared: dict[str, Callable[[], str | None]] = {}

    def __reduce__(self) -> Any:
        return Known, (self.compositions, self.reads_tokens)

    def nothing(self) -> dict[str, Any]:
        none = ("adapter_names", "task_ids", "scalings", "mask", "labels", "current", "rows", "tokens", "prompt")
        facts: dict[str, Any] = dict.fromkeys(none)
        return facts | {
            **{"held": False, "looks_ahead": False, "_led": False},
            **{"worked_out": {}, "leads": {}, "_groups": {}, "readers": Readers()},
        }


class Context(Facts):
    """Facts of the current forward call of this thread.

    Attributes:
        adapter_names: one adapter for each row of the batch (:data:`BASE` for none; or an expression), or None.
        task_ids: one task number for each row, ``[batch]``, or None.
        scalings: weights of routed adapters, ``[batch, tokens, layers, adapters]``; None: they give nothing.
        mask: the model's ``attention_mask``, ``[batch, tokens]``, 0 where padded, or None.
        labels: the call's labels, ``[batch, tokens]``, where it has one for each token of its text, or None.
        current: while a group of rows is computed, the adapters of that group; else None.
        rows: while rows of a mixed batch are computed, which they are, and how many there are in all; else None.
        held: a call that carries such facts is under way.
        looks_ahead: the call under way only finds out what the call that is wanted needs.
        readers: which layers read one input, see :mod:`peft.core.layer.together`.
        tokens: those of the call, None where it has no ids.
        prompt: while ``generate`` runs, the ids that it was given, else None.
        worked_out: what adapters have worked out from the facts of this call, for the layers after them.
        leads: how many virtual tokens stand before the texts of a stack of layers, those in the cache included: at
            most, and in each row. True: of a decoder beside an encoder, False: of the encoder or the only stack.
    """

    adapter_names: tuple[Any, ...] | None
    task_ids: torch.Tensor | None
    scalings: torch.Tensor | None
    mask: torch.Tensor | None
    labels: torch.Tensor | None
    current: list[Any] | None
    rows: tuple[torch.Tensor, int] | None
    held: bool
    looks_ahead: bool
    readers: Readers
    tokens: Tokens | None
    prompt: torch.Tensor | None
    worked_out: dict[tuple, Any]
    leads: dict[bool, tuple[int, torch.Tensor | None]]
    _led: bool
    _groups: dict[tuple, Groups]

    common: Known

    @property
    def compositions(self) -> dict[str, Composition]:
        """The adapters of the model that are made of others: name -> expression."""
        return self.common.compositions

    def noted(self) -> dict[str, Any] | None:
        """All facts of this moment for :meth:`as_noted`, None where the call says nothing that layers ask for."""
        facts = (self.adapter_names, self.task_ids, self.scalings, self.mask, self.labels, self.tokens)
        told = (*facts, self.leads or None)
        return None if all(fact is None for fact in told) else dict(self.__dict__)

    @contextmanager
    def as_noted(self, facts: dict[str, Any]) -> Iterator[None]:
        """While a part of an earlier call is computed again."""
        now = dict(self.__dict__)
        self.__dict__.update(facts)
        try:
            yield
        finally:
            self.__dict__.clear()  # a thread of autograd has no facts of its own
            self.__dict__.update(now)

    @contextmanager
    def told(self, names: Sequence[Any] | None, tasks: torch.Tensor | None, keep: bool) -> Iterator[None]:
        """While a call runs whose rows have these adapters, or tasks; ``keep``: its backward pass may run it again."""
        before, tasks_before, held = self.adapter_names, self.task_ids, self.held
        self.set_adapter_names(names)
        self.task_ids, self.held = tasks, names is not None or tasks is not None
        try:
            yield
        finally:
            self.held = held
            if not keep:
                self.set_adapter_names(before)
                self.task_ids = tasks_before

    @property
    def is_mixed(self) -> bool:
        """Whether the call names adapters for its rows, and no group of rows is computed on its own just now."""
        return self.adapter_names is not None and self.current is None

    @contextmanager
    def only(self, name: Any) -> Iterator[None]:
        """While the rows of one adapter are computed."""
        outer, self.current = self.current, [name]
        try:
            yield
        finally:
            self.current = outer

    @contextmanager
    def on_rows(self, rows: torch.Tensor | None, total: int) -> Iterator[None]:
        """While these rows of a batch of ``total`` are computed; None: those that are anyway."""
        outer = self.rows
        if rows is not None:
            self.rows = rows, total
        try:
            yield
        finally:
            self.rows = outer

    def split(
        self, groups: Groups, kind: Kind, m: Any, args: tuple, kwargs: dict[str, Any], run: Callable[..., Any]
    ) -> Any:
        """A call of a module with the rows of each adapter alone, put back into the order of the batch.

        Args:
            kind: takes the call of ``m`` apart, and puts the outputs together. run: ``run(adapter, args, kwargs)``.
        """
        done = []
        for name, rows in groups.parts:
            with self.on_rows(rows, len(groups.order)):
                done.append(run(name, *kind.take_rows(m, args, kwargs, rows)))
        return kind.join_rows(m, done, groups.order)

    def prompted(self, ids: Any) -> AbstractContextManager[None]:
        """While ``generate`` goes on with these ids, ``[batch, tokens]``; what it adds is no part of the prompt."""
        self.begin()
        known = isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point()
        return having([self], prompt=ids if known else None)

    def behind(self, names: Iterable[Any], training: bool = False) -> list[str]:
        """The adapters that act where these do: themselves, and those that they are made of.

        Args:
            names: adapters, or expressions. training: without those that a fusion reads, as it trains on its own.
        """
        found: dict[str, None] = {}
        for name in names:
            made_of = name if isinstance(name, Composition) else self.compositions.get(name)
            if isinstance(name, str):
                found[name] = None
            if made_of is not None and not (training and made_of.trains_alone):
                found.update(dict.fromkeys(self.behind(made_of.members, training)))
        return list(found)

    def together(self, names: Sequence[Any]) -> list[Sequence[Any]]:
        """The sets of adapters that act on a row each: one, unless a composition divides the rows of calls."""
        compositions = self.compositions
        dividing = [known for name in names if (known := compositions.get(name)) is not None and known.splits_rows]
        return [[row] for row in alternatives(dividing[0])] if dividing else [names]

    def set_adapter_names(self, names: Sequence[str] | None) -> None:
        self.adapter_names = None if names is None else tuple(names)
        self._groups.clear()

    def lead(self, decoder: bool, most: int, each: torch.Tensor | None) -> None:
        """Note virtual tokens for the next call of the model: ``most``, or of ``each`` row its own, ``[batch]``."""
        self.begin()
        self.leads, self._led = {**(self.leads if self._led else {}), decoder: (most, each)}, True

    def lead_of(self, decoder: bool, batch: int, device: torch.device) -> tuple[int, torch.Tensor]:
        """How many virtual tokens stand before texts at most, and before that of each row, ``[batch]``."""
        most, each = self.leads.get(decoder, (0, None))
        if each is None:
            return most, torch.full((batch,), most, device=device)
        return most, self.of_rows("virtual tokens", each, batch, device)

    def forget(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook of the model: a call that says nothing of adapters or tasks does not use those of an earlier one."""
        self.begin()
        if self.common.unprepared and module.training and torch.is_grad_enabled():
            self._tell_unprepared()
        self.rows = None
        self.leads, self._led = self.leads if self._led else {}, False
        # Of two sequences, the mask and the labels are not of the tokens that a layer sees.
        two_lengths = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        by_token = (kwargs.get(name) for name in ("attention_mask", "labels"))
        self.mask, self.labels = (
            x if isinstance(x, torch.Tensor) and x.dim() == 2 and not two_lengths else None for x in by_token
        )
        texts = (*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs_embeds")))
        # Not by next(.., None), which torch 2.8 does not compile.
        found = [x for x in texts if isinstance(x, torch.Tensor) and x.dim() > 1]
        text = found[0] if found else None
        if self.mask is not None and text is not None:
            self.mask = self.mask[:, -text.shape[1] :]  # the columns before are those of tokens in the cache
        if self.common.reads_tokens:
            self.tokens = tokens_of(args, kwargs, self.prompt)
            self.worked_out = {}  # what was worked out for earlier calls may be needed to recompute them
        if self.held:
            return
        self.task_ids = None
        if self.adapter_names is not None:
            self.set_adapter_names(None)

    def _tell_unprepared(self) -> None:
        """Warn once of each adapter that begins to train and is still to get its start from data."""
        for name, remark in list(self.common.unprepared.items()):
            if not torch.compiler.is_compiling() and (said := remark()) is not None:
                del self.common.unprepared[name]
                if said:
                    warnings.warn(said, PeftWarning)

    def note(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Hook of the model, after the call: its cache knows the tokens that it now holds."""
        if self.common.reads_tokens:
            note_in_cache(self.tokens, kwargs, output)

    def tasks(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """The task of each of ``batch`` rows, ``[batch]``, None where the call names none.

        A batch with a multiple of the rows repeats each task: beams, or tokens laid out as rows.

        Raises:
            ValueError: if the rows of the batch cannot be told apart by the tasks.
        """
        return None if self.task_ids is None else self.of_rows("task_ids", self.task_ids, batch, device)

    def tasks_of(self, count: int, batch: int, device: torch.device) -> torch.Tensor:
        """The same for an adapter that knows ``count`` tasks; where it knows one, a call need not name it.

        Raises:
            ValueError: also if the call names no tasks, or one that the adapter does not know.
        """
        tasks = self.tasks(batch, device)
        if tasks is None:
            if count > 1:
                raise ValueError(
                    f"the adapter knows {count} tasks, so a call needs task_ids: one number in 0..{count - 1} for "
                    "each sample, model(..., task_ids=torch.tensor([...]))."
                )
            return torch.zeros(batch, dtype=torch.long, device=device)
        compiling = torch.compiler.is_compiling()  # which cannot look at values
        if not compiling and not all(0 <= task < count for task in tasks.tolist()):
            raise ValueError(f"task_ids={tasks.tolist()} names a task outside 0..{count - 1} (n_tasks).")
        return tasks

    def padding(self, batch: int, tokens: int, device: torch.device) -> torch.Tensor | None:
        """1 for the tokens of the rows, 0 for their padding, ``[batch, tokens]``; None where it is not known."""
        if self.mask is None or self.mask.shape[1] != tokens:
            return None
        return self.of_rows("attention_mask", self.mask, batch, device)

    def of_rows(self, what: str, values: torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
        """What belongs to the ``batch`` rows that are computed, of values ``[samples, ...]`` with one for each sample.

        Raises:
            ValueError: if the rows cannot be told apart by the samples.
        """
        rows, total = self.rows or (None, batch)
        each, left = divmod(total, max(len(values), 1))
        if left:
            raise ValueError(
                f"{what} has {len(values)} entries, but the batch has {total} rows. Give one for each sample."
            )
        values = values.to(device).repeat_interleave(each, 0)
        return values if rows is None else values[rows]

    def groups(self, names: tuple[Any, ...], batch: int, device: torch.device) -> Groups:
        """Rows of each adapter in a batch.

        A batch with a multiple of ``len(names)`` rows repeats each name: beams, or tokens laid out as rows.

        Raises:
            ValueError: if the rows of the batch cannot be told apart by the names.
        """
        if batch % len(names):
            raise ValueError(
                f"adapter_names holds {len(names)} names, but the batch has {batch} rows. Give one name for each "
                f"sample ({BASE!r} for the base model)."
            )
        key = (names, batch, device)
        if key not in self._groups:
            rows: dict[Any, list[int]] = {}
            repeat = batch // len(names)
            for i, name in enumerate(names):
                rows.setdefault(name, []).extend(range(i * repeat, (i + 1) * repeat))
            parts = [(name, torch.tensor(rows[name], device=device)) for name in rows]
            order = torch.argsort(torch.cat([part for _, part in parts]))
            index = torch.repeat_interleave(torch.tensor([len(part) for _, part in parts], device=device))[order]
            self._groups[key] = Groups(parts, order, index)
        return self._groups[key]

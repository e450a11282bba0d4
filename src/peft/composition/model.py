"""What a model offers for compositions: adapters that are made of others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.composition import adding
from peft.composition.config import CompositionConfig
from peft.composition.expressions import Fuse, unused
from peft.core.composition import Composition
from peft.core.files.io import CONFIG_NAME
from peft.core.model import operations
from peft.core.model.context import BASE
from peft.core.model.record import behind, context_of
from peft.model_mixin import ModelMixin


def beside(model_id: Any, name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Where an adapter was saved together with another one: folder or repository, and options; None if it was not."""
    if options.get("subfolder"):
        parent = os.path.dirname(options["subfolder"])
        # `save_pretrained` puts an adapter called "default" into the folder itself, and others into folders below it.
        folder = parent if name == "default" else os.path.join(parent, name)
        return model_id, {"subfolder": folder or None}
    parent = os.path.dirname(os.path.abspath(os.fspath(model_id)))
    folder = parent if name == "default" else os.path.join(parent, name)
    return (folder, {}) if os.path.isfile(os.path.join(folder, CONFIG_NAME)) else None


class Compositions(ModelMixin):
    """Mixin of :class:`PeftModel`: adapters that are made of others."""

    @property
    def active_composition(self) -> Composition | None:
        """The expression that is active, None where adapters are active by themselves."""
        configs = [self.peft_config[name] for name in self.active_adapters]
        return configs[0].expression if len(configs) == 1 and isinstance(configs[0], CompositionConfig) else None

    def add_composition(
        self,
        adapter_name: str,
        expression: Composition,
        modules_to_save: list[str] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Give the model an adapter that is made of others, inactive and frozen until :meth:`set_adapter`.

        It is saved, loaded and deleted like any other. What of it trains (fusions, ``modules_to_save``) is its own.

        Args:
            expression: of what: ``Stack``, ``Average``, ``Fuse`` and the like.
            modules_to_save: modules that it trains whole, such as the head of a task on which a fusion is trained.

        Raises:
            ValueError: if the name is taken, or an adapter unknown, or the expression has no meaning for an adapter;
                the model is then unchanged.

        Examples:
            >>> model.add_adapter("other", LoraConfig(r=2, task_type="CAUSAL_LM"))
            >>> model.add_composition("both", Average("default", "other", weights=[3, 1]))
            >>> model.set_adapter("both")
        """
        config = CompositionConfig(expression=expression, modules_to_save=modules_to_save)
        self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)

    def _add_composition(self, name: str, config: CompositionConfig, *options: bool) -> None:
        model, before = self.get_base_model(), list(self.peft_config)
        try:
            known = context_of(model).compositions
            config.expression = adding.with_names(config.expression, self._name_of, known)
            self._check_no_prompts(config.expression)
            adding.add(model, name, config, list(self.peft_config), *options)
        except BaseException:
            for other in [other for other in self.peft_config if other not in before]:
                self.delete_adapter(other)
            raise
        self.peft_config[name] = config

    def _load_members(self, model_id: Any, config: CompositionConfig, options: dict[str, Any]) -> None:
        """Load the adapters that a saved composition is made of, where they are missing and have folders beside it."""
        for name in config.expression.names():
            if name != BASE and name not in self.peft_config and (where := beside(model_id, name, options)):
                self.load_adapter(where[0], adapter_name=name, **{**options, **where[1]})

    @classmethod
    def _from_composition(
        cls,
        model: Any,
        model_id: Any,
        name: str,
        is_trainable: bool,
        config: CompositionConfig,
        options: dict[str, Any],
    ) -> Any:
        """The model with a saved composition and what it is made of, as ``from_pretrained`` gives it."""
        first = next((name for name in config.expression.names() if name != BASE), None)
        where = beside(model_id, first, options) if first is not None else None
        if where is None:
            raise ValueError(
                f"{model_id} is {config.expression!r}, which is made of other adapters, and {first!r} has no folder "
                f"beside it. Load one of them with from_pretrained, the others and this with load_adapter."
            )
        made = cls.from_pretrained(model, where[0], first, is_trainable, **{**options, **where[1]})  # type: ignore[attr-defined]
        made.load_adapter(model_id, adapter_name=name, is_trainable=is_trainable, **options)
        made.set_adapter(name, inference_mode=not is_trainable)
        return made

    def _check_expression(self, name: str, config: CompositionConfig) -> None:
        """Raise ValueError where values for another composition, or for no one, are given to an adapter."""
        known = context_of(self.get_base_model()).compositions.get(name)
        if known != config.expression:
            what = "an adapter of a method" if known is None else repr(known)
            raise ValueError(f"{name!r} is {what}, and the file is of {config.expression!r}. Load it by another name.")

    def _check_no_prompts(self, expression: Composition) -> None:
        for name in context_of(self.get_base_model()).behind([expression]):
            members = self.peft_config[name].members if name in self.peft_config else ()
            if any(member.is_prompt_learning for member in members):
                raise ValueError(
                    f"{name!r} in {expression!r} has virtual tokens, which are no part of a layer, so they cannot be "
                    "put together with others. Rows of a batch can have one each: model(..., adapter_names=[...])."
                )

    def _name_of(self, expression: Composition) -> str:
        """The composition that is this expression: the one that the model has, or a new one."""
        known = context_of(self.get_base_model()).compositions
        expression = adding.with_names(expression, self._name_of, known)
        name = next((name for name, other in known.items() if other == expression), None)
        if name is None:
            name = unused(expression.slug, self.peft_config)
            own = isinstance(expression, Fuse)  # tensors, which stay
            self.add_adapter(name, CompositionConfig(expression=expression, passing=not own))
            if own:
                warnings.warn(
                    f"{expression!r} is new, and has to be trained: it is the adapter {name!r} from now on. Load one "
                    "that was trained with load_adapter; add_composition gives it a name of your own."
                )
        return name

    @contextmanager
    def _composing(self, adapter: Any) -> Iterator[str | list[str]]:
        """A context for activating an adapter: gives the name of an expression, which is added if need be."""
        if isinstance(adapter, Composition):
            adapter = self._name_of(adapter)
        elif not hasattr(adapter, "__iter__"):  # None, or a number
            operations.require_adapters(self, [adapter])
        elif not isinstance(adapter, str) and len(adapter) > 1:
            self._check_list(adapter)
        try:
            yield adapter
        finally:
            self._drop_passing()

    def _dividing(self) -> Composition | None:
        """The active expression, if it divides the rows of calls."""
        expression = self.active_composition
        divides = expression is not None and expression.splits_rows and self.has_active_enabled_adapter
        return expression if divides else None

    def _part_with(self, name: str) -> None:
        """Raise ValueError if an adapter cannot be deleted; what an active composition trains is frozen."""
        model = self.get_base_model()
        adding.check_unused(model, name)
        if name in self.active_adapters and name in context_of(model).compositions:
            operations.set_requires_grad(model, behind(model, [name]), False)

    def _forget_composition(self, name: str) -> None:
        context_of(self.get_base_model()).compositions.pop(name, None)

    def _check_no_division(self, names: Sequence[str]) -> None:
        """Raise ValueError for an adapter of a row that divides rows itself."""
        known = context_of(self.get_base_model()).compositions
        for name in set(names):
            if name in known and known[name].splits_rows:
                raise ValueError(
                    f"adapter_names has {name!r}, which is {known[name]!r} and divides the rows of a batch itself. "
                    "Name its members for their rows, or activate it and pass no adapter_names."
                )

    def _check_list(self, names: Sequence[Any]) -> None:
        for name in names:
            if isinstance(name, Composition):
                raise ValueError(f"set_adapter takes names in a list, not {name!r}: write Stack(...) of all of them.")
            expression = getattr(self.peft_config.get(name), "expression", None)
            if isinstance(expression, Composition) and expression.splits_rows:
                raise ValueError(
                    f"{name!r} is {expression!r}, which divides the rows of a batch, so it is active alone. Put the "
                    "others into its members: Stack('other', 'member')."
                )

    def _drop_passing(self) -> None:
        """Compositions that were made for one :meth:`set_adapter` go with the next one."""
        used = context_of(self.get_base_model()).behind(self.active_adapters)
        passing = [name for name, config in self.peft_config.items() if getattr(config, "passing", False)]
        for name in passing:
            if name not in used:
                self.delete_adapter(name)

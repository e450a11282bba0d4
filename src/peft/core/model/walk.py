"""Walking a model without entering the adapters: the cost of a walk does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from peft.core.filling import no_collection
from peft.core.layer.layer import BaseTunerLayer
from peft.core.layer.switch import Switch


@dataclass(slots=True)
class Site:
    """One module of the model, as an adapter sees it.

    Attributes:
        path: where it is now, ``layers.0.q_proj.base_layer``.
        key: its name in the unadapted model, ``layers.0.q_proj``.
        module: the module itself.
        wrappers: the adapter layers around it, outermost first, each with its own path.
        above: the adapter layers around modules that hold this one.
    """

    path: str
    key: str
    module: nn.Module
    wrappers: list[tuple[str, Wrapper]]
    above: list[tuple[str, Wrapper]]


class AuxiliaryWrapper(Switch, nn.Module):
    """Base of the wrappers that are no tuner layers; ``inner`` is the path to what they wrap."""

    inner = "original_module"


Wrapper = BaseTunerLayer | AuxiliaryWrapper
_WRAPPERS = (BaseTunerLayer, AuxiliaryWrapper)
_PASSED = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


def passed_through(module: nn.Module) -> str | None:
    """The name of the one child of what torch puts around a module (compile, FSDP, checkpoints), which has no name."""
    name = next(iter(module._modules), None) if len(module._modules) == 1 else None
    return name if name in _PASSED else None


def unreplicated(module: nn.Module) -> nn.Module:
    """The module inside ``DataParallel`` and ``DistributedDataParallel``."""
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    return module


def bare(module: nn.Module) -> nn.Module:
    """The module inside what torch has put around it."""
    module = unreplicated(module)
    while name := passed_through(module):
        module = module._modules[name]
    return module


def plain(name: str) -> str:
    """The dotted name that a tensor or module has without what torch puts around modules."""
    return ".".join([part for part in name.split(".") if part not in _PASSED]) if "._" in f".{name}" else name


def plain_names(state_dict: dict[str, Any], *models: nn.Module) -> dict[str, Any]:
    """A state dict of one of these models under plain names, and without what a replica (DDP) puts before them."""
    given = {plain(name): value for name, value in state_dict.items()}
    own = any("module" in model._modules for model in models)
    if not given or not all(name.startswith("module.base_model." if own else "module.") for name in given):
        return given
    return {name.removeprefix("module."): value for name, value in given.items()}


def inner_name(module: nn.Module) -> str | None:
    """The path from ``module`` to the module that it wraps, or None if it wraps none."""
    if isinstance(module, BaseTunerLayer):
        return "base_layer"
    return module.inner if isinstance(module, AuxiliaryWrapper) else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers."""
    while inner := inner_name(module) or passed_through(module):
        module = module.get_submodule(inner)
    return module


def embeddings_of(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Input and output embedding of a transformer, without wrappers; None where it has none."""
    ends: list[nn.Module | None] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter, lambda: None)()
        except (NotImplementedError, AttributeError):  # transformers' answer for models without embeddings
            module = None
        ends.append(unwrapped(module) if isinstance(module, nn.Module) else None)
    return ends[0], ends[1]


def shares_embeddings(model: nn.Module) -> bool:
    """Whether the output embedding of a transformer has the weight of the input embedding."""
    first, last = (getattr(module, "weight", None) for module in embeddings_of(model))
    return isinstance(first, nn.Parameter) and first is last


Holders = dict[int, list[tuple[nn.Module, str]]]


def walk(model: nn.Module, repeated: bool = False) -> Iterator[Site]:
    """All modules of a model, wrapped ones once, in the order of ``named_modules``.

    Args:
        repeated: also give modules that occur in several places each time.
    """
    if repeated or _SURVEYS.get() is None:
        return _walk(model, repeated, [])
    return iter(survey(model).sites)


def _walk(model: nn.Module, repeated: bool, met: list[nn.Module]) -> Iterator[Site]:
    """The walk itself; it puts into ``met`` all modules whose children it has looked at."""
    seen: set[int] = set()
    stack: list[tuple[str, str, nn.Module, list, list]] = [("", "", model, [], [])]
    while stack:  # the names are joined here, not by calls: every operation walks
        path, key, module, wrappers, above = stack.pop()
        if not repeated:
            if id(module) in seen:
                continue
            seen.add(id(module))
        met.append(module)
        children = module._modules
        if isinstance(module, _WRAPPERS):
            inner = "base_layer" if isinstance(module, BaseTunerLayer) else module.inner
            if inner in children:
                inside = children[inner]
            else:
                inside = module.get_submodule(inner)
                met.append(children[inner.partition(".")[0]])
            inner_path = f"{path}.{inner}" if path else inner
            stack.append((inner_path, key, inside, [*wrappers, (path, module)], above))
            continue
        if len(children) == 1 and (passed := passed_through(module)) is not None:
            stack.append((join(path, passed), key, children[passed], wrappers, above))
            continue
        yield Site(path, key, module, wrappers, above)
        if children:
            around = [*above, *wrappers] if wrappers else above
            path, key = path and path + ".", key and key + "."
            for name, child in reversed(children.items()):
                if child is not None:
                    stack.append((path + name, key + name, child, [], around))


class Survey:
    """What a walk through a model has found, and whether that is still so; nothing in it is to be changed.

    Attributes:
        sites: what :func:`walk` gives.
    """

    def __init__(self, model: nn.Module) -> None:
        self._met: list[nn.Module] = []
        self.sites = list(_walk(model, False, self._met))
        self._children = [module._modules.copy() for module in self._met]

    def holds(self) -> bool:
        """Whether all modules that were met have the children that they had: a tenth of the time of a walk."""
        return [module._modules for module in self._met] == self._children

    @cached_property
    def holders(self) -> Holders:
        """See :func:`holders_of`."""
        children = [id(child) for site in self.sites for child in site.module._modules.values() if child is not None]
        if len(set(children)) == len(children):  # nearly always
            return {}
        found: Holders = {}
        for site in self.sites:
            for name, child in site.module._modules.items():
                if child is not None:
                    found.setdefault(id(child), []).append((site.module, name))
        return {child: places for child, places in found.items() if len(places) > 1}


_SURVEYS: ContextVar[dict[int, Survey] | None] = ContextVar("surveys", default=None)
"""What the operation under way has found, by id of the model; a survey keeps its model alive, and so its id."""


@contextmanager
def surveyed() -> Iterator[None]:
    """Within this context a model is walked through again only where its modules have changed, and garbage waits.

    Loading an adapter asks a dozen times. Nothing is kept beyond an operation: what a user takes out of a model
    between two of them has to be free.
    """
    if _SURVEYS.get() is not None:
        yield
        return
    token = _SURVEYS.set({})
    try:
        with no_collection():
            yield
    finally:
        _SURVEYS.reset(token)


def survey(model: nn.Module) -> Survey:
    """What a walk through a model finds, by an earlier walk of the same operation if nothing has changed since."""
    known = _SURVEYS.get()
    if known is None:
        return Survey(model)
    found = known.get(id(model))
    if found is None or not found.holds():
        found = known[id(model)] = Survey(model)
    return found


def names_of_modules(model: nn.Module) -> dict[int, list[str]]:
    """The names of each module that has several in the unadapted model: id -> names, the first one first."""
    if not survey(model).holders:
        return {}
    found: dict[int, list[str]] = {}
    for site in walk(model, repeated=True):
        found.setdefault(id(site.module), []).append(site.key)
    return {module: names for module, names in found.items() if len(names) > 1}


def other_names(model: nn.Module) -> dict[str, str]:
    """The names beside the first of modules that stand in several places: other name -> first name, both unadapted.

    What is within such a module has none here: its name begins with one of these.
    """
    if not (holders := survey(model).holders):
        return {}
    keys = {id(site.module): site.key for site in walk(model)}
    found = {}
    for site in walk(model):
        module = site.wrappers[0][1] if site.wrappers else site.module
        names = [join(keys[id(parent)], name) for parent, name in holders.get(id(module), ())]
        found.update({name: site.key for name in names if name != site.key})
    return found


def names_in(model: nn.Module) -> list[str]:
    """What a config can name in a model: its modules, and their parameters."""
    return [name for s in walk(model) for name in (s.key, *(join(s.key, p) for p in s.module._parameters)) if name]


def holders_of(model: nn.Module) -> Holders:
    """Where each module that stands in several places stands: id -> (the module that holds it, its name there)."""
    return dict(survey(model).holders)


def join(path: str, name: str) -> str:
    """The path of ``name`` in the module at ``path``."""
    return f"{path}.{name}" if path else name


def wrappers_of(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """All tuner layers and auxiliary wrappers with their paths, outer ones first."""
    for site in walk(model):
        yield from site.wrappers


def layers_of(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """All tuner layers with their paths, outer ones first, those inside auxiliary wrappers included."""
    for path, wrapper in wrappers_of(model):
        if isinstance(wrapper, BaseTunerLayer):
            yield path, wrapper
        elif isinstance(layer := wrapper.get_submodule(wrapper.inner.rpartition(".")[0]), BaseTunerLayer):
            yield join(path, wrapper.inner.rpartition(".")[0]), layer


def file_path(path: str, adapter: str, around: list[tuple[str, Wrapper]], wrapper: Wrapper | None = None) -> str:
    """The path that a module would have if ``adapter`` were the only adapter of the model.

    Args:
        around: the wrappers above the module, outermost first; those of other adapters leave no trace.
        wrapper: the module itself, if it is a tuner layer: those of other methods leave none either.
    """
    method = getattr(type(wrapper), "adapter_cls", None)
    if not around:
        return path
    parts = path.split(".")
    for outer, other in reversed(around):
        held = isinstance(other, BaseTunerLayer) and adapter in other
        if not held or method not in (None, type(other).adapter_cls):
            start = len(outer.split(".")) if outer else 0
            del parts[start : start + len(str(inner_name(other)).split("."))]
    return ".".join(parts)


def locate(model: nn.Module, key: str) -> Site:
    """The module that is called ``key`` in the unadapted model, wherever it is now.

    Raises:
        KeyError: if there is none.
    """
    path, module = "", model
    above: list[tuple[str, Wrapper]] = []
    wrappers: list[tuple[str, Wrapper]] = []
    for part in [*key.split("."), None] if key else [None]:
        wrappers = []
        while inner := (inner_name(module) if isinstance(module, _WRAPPERS) else passed_through(module)):
            if inner not in _PASSED:
                wrappers.append((path, module))
            path, module = join(path, inner), module.get_submodule(inner)
        if part is not None:
            above = [*above, *wrappers] if wrappers else above
            path, module = join(path, part), module._modules[part]
    return Site(path, key, module, wrappers, above)


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds ``path`` and the last part of its name."""
    *above, name = path.split(".")
    module: Any = model
    for part in above:  # as get_submodule, in a third of its time
        module = module._modules[part]
    return module, name


def replace_module(model: nn.Module, path: str, new: nn.Module, holders: Holders | None = None) -> None:
    """Put ``new`` at ``path``, and wherever else the module that is there stands by ``holders``."""
    replace_at(parent_of(model, path), new, holders)


def replace_at(place: tuple[nn.Module, str], new: nn.Module, holders: Holders | None = None) -> None:
    """The same for a place that is known: a module, and the name of what it holds."""
    parent, name = place
    places = [place]
    if holders and id(parent._modules[name]) in holders:
        places = holders[id(new)] = holders.pop(id(parent._modules[name]))
    for place in places:
        put_module(*place, new)


def put_module(parent: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place called ``name`` in ``parent``."""
    setattr(parent, name, new)  # also in a Sequential, where the name "0" need not be that of the first
    if name == "_orig_mod" and hasattr(parent, "_initialize"):  # what is compiled is bound to the old module
        parent._initialize()

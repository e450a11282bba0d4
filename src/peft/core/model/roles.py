"""What part a layer plays in a transformer, by the structure of the model: projections, feed-forward layers, norms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from peft.core.base.kinds import kind_of
from peft.core.model.walk import Site, walk


ROLES = ("query", "key", "value", "feedforward", "norm")
"""Parts that layers play. "feedforward" is the layer that leads back from the wide activations of a block."""

# Words in the names of projections, and what these project to. A name may hold several: `query_key_value`, `to_kv`.
_LETTERS = {
    **dict.fromkeys(("q", "wq", "query", "queries"), "q"),
    **dict.fromkeys(("k", "wk", "key", "keys"), "k"),
    **dict.fromkeys(("v", "wv", "value", "values"), "v"),
    **dict.fromkeys(("kv", "wkv"), "kv"),
    **dict.fromkeys(("qkv", "wqkv"), "qkv"),
    "qk": "qk",
}
_OF_ROLE = {"query": "q", "key": "k", "value": "v"}

# Words of layers beside the projections proper: gates, relative positions, factors of low rank that others read.
_BESIDE = {"gate", "norm", "rel", "relative", "pos", "bias", "conv"}


def find_roles(model: nn.Module, roles: Iterable[str]) -> list[str]:
    """Names of the layers that play one of these roles, in the order of the model; empty where none can be found.

    Projections are found by what they are called *together*: an attention is a module with a projection to values, and
    one to queries or keys, among its children; one layer may be named for all of them. In a module that calls itself
    attention and names none, it is the layer whose output is up to three times as wide as its input. Feed-forward
    layers are found by their sizes.

    Args:
        roles: of :data:`ROLES`.
    """
    wanted = set(roles)
    sites = {site.key: site for site in walk(model)}
    projections = _projections(sites)
    found: set[str] = set()
    for role in wanted & set(_OF_ROLE):
        found |= {key for key, letters in projections.items() if _OF_ROLE[role] in letters}
    if "feedforward" in wanted:
        found |= _feedforward(sites, projections)
    if "norm" in wanted:
        found |= {key for key in sites if _is_norm(sites[key].module)}
    return [key for key in sites if key in found]


# --- projections ----------------------------------------------------------------------------------------------


def _words(name: str) -> list[str]:
    """``q_proj`` -> q, proj; ``Wqkv`` -> wqkv; ``linearQuery`` -> linear, query."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")


def _letters(name: str) -> str:
    """Which of q, k and v a name says that a layer projects to."""
    words = _words(name)
    if _BESIDE & set(words):
        return ""
    return "".join(dict.fromkeys("".join(_LETTERS.get(word, "") for word in words)))


def _projections(sites: dict[str, Site]) -> dict[str, str]:
    """Name of each attention projection -> what it projects to."""
    children: dict[str, dict[str, str]] = {}  # module -> what a layer in it is called -> the layer's name
    for key, site in sites.items():
        kind = kind_of(site.module)
        if kind is not None and not kind.lookup and not kind.read_by_parent:
            parent, _, name = key.rpartition(".")
            if not _letters(name) and _letters(parent.rpartition(".")[2]):  # q_proj.linear: a layer in a wrapper
                parent, _, name = parent.rpartition(".")
            children.setdefault(parent, {})[name] = key
    found = {}
    for parent, keys in children.items():
        layers = {name: sites[key].module for name, key in keys.items()}
        letters = _of_attention(type(sites[parent].module).__name__, layers)
        found.update({keys[name]: said for name, said in letters.items()})
    return found


def _of_attention(parent: str, layers: dict[str, nn.Module]) -> dict[str, str]:
    """The projections among the layers of one module, by what these are called in it."""
    found = {name: "qkv" for name, layer in layers.items() if isinstance(layer, nn.MultiheadAttention)}
    named = {name: said for name in layers if name not in found and (said := _letters(name))}
    if any(_is_linear(layers[name]) for name in named):  # convolutions beside them mix tokens
        named = {name: said for name, said in named.items() if _is_linear(layers[name])}
    together = set("".join(named.values()))
    if "v" in together and together & set("qk"):
        found.update(_full(named))
    elif not named and re.search("att", parent, re.IGNORECASE):
        sizes = {name: _sizes(layer) for name, layer in layers.items() if _is_linear(layer)}
        found.update({name: "qkv" for name, (inner, out) in sizes.items() if inner < out <= 3 * inner})
    return found


def _full(named: dict[str, str]) -> dict[str, str]:
    """Without the first of two factors of low rank (``q_a_proj`` of ``q_a_proj``, ``q_b_proj``)."""
    second = {said for name, said in named.items() if "b" in _words(name)}
    return {name: said for name, said in named.items() if not ("a" in _words(name) and said in second)}


# --- the rest of a block --------------------------------------------------------------------------------------


def _feedforward(sites: dict[str, Site], projections: dict[str, str]) -> set[str]:
    """Linear layers from the wide activations of a transformer block back to its width."""
    attentions = {key.rpartition(".")[0] for key in projections}
    outside = {
        key: _sizes(site.module)
        for key, site in sites.items()
        if _is_linear(site.module) and not any(_inside(key, attention) for attention in attentions)
    }
    found: set[str] = set()
    searched: dict[str, set[str]] = {}
    for key in projections:
        for block in (*entries_around(key, sites), ""):
            if block not in searched:
                width = {_sizes(sites[other].module)[0] for other in projections if _inside(other, block)}
                searched[block] = _leading_back({k: v for k, v in outside.items() if _inside(k, block)}, width)
            if searched[block]:
                found |= searched[block]
                break
    return found


def entries_around(key: str, sites: dict[str, Site]) -> Iterator[str]:
    """What may be the transformer block around a module: entries of lists that it is in, inner ones first."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        parent = sites.get(".".join(parts[: end - 1]))
        if parent is not None and isinstance(parent.module, nn.ModuleList | nn.Sequential):
            yield ".".join(parts[:end])


def _leading_back(layers: dict[str, tuple[int, int]], width: set[int]) -> set[str]:
    """Of layers with their sizes (in, out), those that read what others widened."""
    widened = {out for inner, out in layers.values() if inner in width and out not in width}
    wide = widened | {out // 2 for out in widened}  # gate and values may come out of one layer
    return {key for key, (inner, out) in layers.items() if inner in wide - width and out in width}


def _inside(key: str, block: str) -> bool:
    return not block or key.startswith(f"{block}.")


def _sizes(layer: nn.Module) -> tuple[int, int]:
    kind = kind_of(layer)
    return kind.sizes(layer) if kind else (0, 0)


def _is_linear(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.name == "Linear" and not kind.read_by_parent


def _is_norm(module: nn.Module) -> bool:
    """A layer that normalises, with a weight of its own."""
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1

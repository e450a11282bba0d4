"""The names of the ways in which several adapters become one. The command line reads them, so torch stays out."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


PruningMethod = Literal["magnitude", "random", "sampled", "breadcrumbs"]
Vote = Literal["total", "frequency"]
CombinationType = Literal[
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
    "della_svd",
    "breadcrumbs_svd",
    "knots_svd",
]


class Way(NamedTuple):
    """One way of combining.

    Attributes:
        dense: of the updates dW, factored again by SVD; else of A and B, each for itself.
        pruning: what is set to zero before: small entries, or random ones with the others rescaled, or see ``prune``.
        election: entries against the majority's sign are left out of the mean (TIES).
        align: the updates are brought into one basis before (KnOTS).
    """

    dense: bool = False
    pruning: PruningMethod | None = None
    election: bool = False
    align: bool = False


WAYS: dict[CombinationType, Way] = {
    "cat": Way(),
    "linear": Way(),
    "svd": Way(dense=True),
    "magnitude_prune": Way(pruning="magnitude"),
    "magnitude_prune_svd": Way(True, "magnitude"),
    "ties": Way(False, "magnitude", True),
    "ties_svd": Way(True, "magnitude", True),
    "dare_linear": Way(False, "random"),
    "dare_linear_svd": Way(True, "random"),
    "dare_ties": Way(False, "random", True),
    "dare_ties_svd": Way(True, "random", True),
    "della_svd": Way(True, "sampled", True),
    "breadcrumbs_svd": Way(True, "breadcrumbs"),
    "knots_svd": Way(True, "magnitude", True, align=True),
}


def idle(name: CombinationType, given: dict[str, Any]) -> str | None:
    """What was asked for and does nothing in a way of combining, for a message; None if all is used.

    Args:
        given: arguments of ``add_weighted_adapter`` by their names; None, or a vote by "total", is no wish.
    """
    wished = {key for key, value in given.items() if value not in (None, "total")}
    unused = sorted(wished - _used(WAYS[name]))
    if not unused:
        return None
    those = [other for other, way in WAYS.items() if _used(way) >= {*unused}]
    listed = ", ".join(f"{key}={given[key]!r}" for key in unused)
    return f"{listed} has no effect on {name!r}; {', '.join(those)} would use it"


def _used(way: Way) -> set[str]:
    used = {"density"} if way.pruning else set()
    used |= {"majority_sign_method"} if way.election else set()
    return used | ({"svd_rank", "svd_clamp", "svd_driver"} if way.dense else set())

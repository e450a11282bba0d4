"""Key-value caches of networks that run beside a model, kept with the model's own cache."""

from __future__ import annotations

from functools import partial
from typing import Any


FOLLOWED = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")
"""What generation does to a cache, and so to those beside it."""


def beside(cache: Any, name: str, config: Any) -> Any:
    """The cache that belongs to ``name``, kept with ``cache``; an empty one at first.

    Args:
        config: of the network that fills it.

    Raises:
        ValueError: if ``cache`` was filled while there was none for ``name``.
    """
    from transformers import DynamicCache

    others = cache.__dict__.setdefault("_beside", {})
    if name not in others:
        if cache.get_seq_length() > 0:
            raise ValueError(f"the cache was filled without adapter {name!r}; start with an empty one.")
        for method in FOLLOWED:
            own = getattr(cache, method, None)
            if own is not None and not others:  # the first one wraps them for all
                setattr(cache, method, partial(_all, own, others, method))
        others[name] = DynamicCache(config=config)
    return others[name]


def _all(own: Any, others: dict[str, Any], method: str, *args: Any, **kwargs: Any) -> Any:
    for other in others.values():
        getattr(other, method)(*args, **kwargs)
    return own(*args, **kwargs)

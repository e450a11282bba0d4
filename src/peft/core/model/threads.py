"""What is known of a call, for each thread its own, so that threads which serve one model do not mix their calls."""

from __future__ import annotations

from threading import local
from typing import Any


class OfThread(local):
    """Attributes that each thread has for itself; copies and pickles begin without any."""

    def __reduce__(self) -> Any:
        return type(self), ()


class Common:
    """What all threads share of such facts; copies and pickles of it know of no call.

    Attributes:
        latest: the facts of the last call.
    """

    def __init__(self) -> None:
        self.latest = self.nothing()

    def nothing(self) -> dict[str, Any]:
        """The facts of a call that says nothing, by name."""
        raise NotImplementedError


class Facts(OfThread):
    """Facts of the current call of this thread, as attributes.

    A thread that has begun no call sees those of the last one: autograd runs the backward passes of a device in
    threads of its own, which may compute layers again.
    """

    def __init__(self, common: Any) -> None:
        self.common = common  # runs again in each thread

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["common"].latest[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}") from None

    def __reduce__(self) -> Any:
        return type(self), (self.common,)

    def begin(self) -> None:
        """A call, or what stands around it, begins in this thread: from now on it has facts of its own."""
        own = self.__dict__
        if "begun" not in own:
            own.update({**self.common.nothing(), **own, "begun": True})
        self.common.latest = own

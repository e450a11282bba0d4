"""How adapters of a method add up: what a weighted sum of them is, sum_i w_i dW_i, made of their tensors.

A method says in one line what its tensors mean for a sum, and :mod:`peft.core.combine.sums` makes it:

    adds = LinearIn("ia3_l", neutral=1.0)
    adds = SideBySide("hira_B", hira_A=0, hira_B=1)
    adds = Replaces("token_indices")
    adds = NoSum("a product of rotations is no rotation by the sum of their angles")
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Addition:
    """What the operations of a sum need to know of a method.

    Attributes:
        linear: parts in which, together, what an adapter does is linear, all its others being equal; a part of a
            module is ``"glora_A.X"``.
        stacked: part -> axis along which several adapters can stand side by side: what they do then adds up.
        aligns: settings, and fields of the config, that say which parts of the base the tensors belong to.
        replaces: the tensors take the place of the base's, so it is their differences to these that add up.
        neutral: what an entry of ``linear`` is in an adapter that changes nothing.
        why_not: why no weighted sum of the tensors is a weighted sum of adapters.
    """

    linear: tuple[str, ...] = ()
    stacked: tuple[tuple[str, int], ...] = ()
    aligns: tuple[str, ...] = ()
    replaces: bool = False
    neutral: float = 0.0
    why_not: str = "what they do is not linear in their tensors, so no sum of these does their sum."

    @property
    def possible(self) -> bool:
        """Whether there is a sum at all."""
        return bool(self.linear) or self.replaces


def LinearIn(*parts: str, neutral: float = 0.0) -> Addition:
    """What an adapter does is linear in these parts, where all others are equal."""
    return Addition(linear=parts, neutral=neutral)


def SideBySide(*linear: str, **axes: int) -> Addition:
    """The same, and adapters of which the others differ can stand side by side along these axes."""
    return Addition(linear=linear, stacked=tuple(axes.items()))


def Replaces(*aligns: str) -> Addition:
    """The tensors stand in for tensors of the base."""
    return Addition(aligns=aligns, replaces=True)


def NoSum(why: str | None = None) -> Addition:
    """No sum of the tensors is the sum of what adapters do."""
    return Addition() if why is None else Addition(why_not=why)

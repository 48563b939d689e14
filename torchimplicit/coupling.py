"""What is known of how the samples of a batch depend on each other."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn

from torchimplicit.members import known_by


@dataclass
class Memory:
    """What has been seen of one function.

    Attributes:
        found: whether its rows depend on each other.
        together: whether a method that combines each row's steps by themselves is known to solve them as one system
            alone.
        looks: how often that was looked at in vain.
        apart: how often its rows were seen not to depend on each other, where a linear solver had not come to its end.
    """

    found: bool = False
    together: bool = False
    looks: int = 0
    apart: int = 0


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """Which rows of a batch may depend on each other.

    A batch is solved row by row, since rows seldom do; what shows that they do is remembered for the function, and its
    rows are then solved as one system.

    Attributes:
        rows: so many neighbouring rows were given to one call of the function: they alone may depend on each other.
        promised: whether the user says that they do not (``rowwise=True``).
        memory: shared by all the solves with one function.
    """

    rows: int
    promised: bool = False
    memory: Memory = field(default_factory=Memory)

    @property
    def found(self) -> bool:
        """Whether rows have been seen to depend on each other: of a function whose rows do not, by another problem that
        its code was written for as well."""
        return self.memory.found and not self.promised

    @staticmethod
    def of(function: Callable[..., Any], rows: int, promised: bool) -> Coupling | None:
        """For a batch of ``rows`` that ``function`` is called with; ``None`` where there are no others to depend on."""
        return None if rows < 2 else Coupling(rows=rows, promised=promised, memory=_memory_of(function))


_memories: weakref.WeakKeyDictionary[Any, dict[bool, Memory]] = weakref.WeakKeyDictionary()


def _memory_of(function: Callable[..., Any]) -> Memory:
    """That of the function in its module's mode of now: batch normalization couples rows in training alone."""
    owner = known_by(function)
    training = owner.training if isinstance(owner, nn.Module) else False
    return _memories.setdefault(owner, {}).setdefault(training, Memory())


def broken_promise(what: str, cause: Exception | None = None) -> NoReturn:
    """Raise the error of a function that does not keep ``rowwise=True``."""
    raise ValueError(
        f"{what}. The problem says rowwise=True, which holds only if f treats every row on its own, captures no tensor "
        "that carries the batch, and every argument whose dim 0 has the batch's size does carry the batch: pass "
        "batched tensors as arguments and shared ones as parameters or captured tensors, or take the promise back "
        "(rowwise=False)"
    ) from cause

"""Detect whether the samples of a batch depend on each other, and remember the answer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn

from torchimplicit.members import known_by


@dataclass
class Memory:
    """The memory of one function.

    Attributes:
        found: whether its rows were found to depend on each other.
        together: whether a method that combines each row's past steps (Anderson, Broyden) is known to converge only if
            the rows are solved as one system.
        looks: how often solving them as one system was tried in vain.
        apart: how often its rows were found independent after a linear solver had not converged.
    """

    found: bool = False
    together: bool = False
    looks: int = 0
    apart: int = 0


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """The rows of a batch that may depend on each other.

    A batch is solved row by row, since rows are seldom coupled. If a coupling is found, it is remembered for the
    function, and its rows are then solved as one system.

    Attributes:
        rows: number of neighbouring rows in one call of the function; only these may depend on each other.
        promised: whether the user promises that they do not (``rowwise=True``).
        memory: shared by all solves with one function.
    """

    rows: int
    promised: bool = False
    memory: Memory = field(default_factory=Memory)

    @property
    def found(self) -> bool:
        """True if rows are known to depend on each other. Functions are remembered by their code, so this may stem from
        another problem with the same code; hence the promise has precedence."""
        return self.memory.found and not self.promised

    @staticmethod
    def of(function: Callable[..., Any], rows: int, promised: bool) -> Coupling | None:
        """The coupling of a batch of ``rows`` that ``function`` is called with; ``None`` for a single row."""
        return None if rows < 2 else Coupling(rows=rows, promised=promised, memory=_memory_of(function))


_memories: weakref.WeakKeyDictionary[Any, dict[bool, Memory]] = weakref.WeakKeyDictionary()


def _memory_of(function: Callable[..., Any]) -> Memory:
    """The memory of the function, one for each mode of its module: batch normalization couples rows only in
    training."""
    owner = known_by(function)
    training = owner.training if isinstance(owner, nn.Module) else False
    return _memories.setdefault(owner, {}).setdefault(training, Memory())


def broken_promise(what: str, cause: Exception | None = None) -> NoReturn:
    """Raise the error of a function that breaks the promise ``rowwise=True``.

    Args:
        what: how that showed.
        cause: the error by which it showed, if any.
    """
    raise ValueError(
        f"{what}. The problem says rowwise=True, which holds only if f treats every row on its own, captures no tensor "
        "that carries the batch, and every argument whose dim 0 has the batch's size does carry the batch: pass "
        "batched tensors as arguments and shared ones as parameters or captured tensors, or take the promise back "
        "(rowwise=False)"
    ) from cause

"""Support for hooks on the tensors that autograd saves (``save_on_cpu``, activation checkpointing).

If products are taken over a graph many times, every saved tensor would go through the hooks as many times, which for
checkpointing means a new forward pass each time. So graphs that live within a solve bypass the hooks, and the tensors
of a graph that is kept between the forward and the backward pass go through them once in each.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from torchimplicit._torch import (
    pop_saved_tensor_hooks,
    push_saved_tensor_hooks,
    top_saved_tensor_hooks,
    when_backward_ends,
)


class Once:
    """A saved tensor, packed by the user's hook; during a backward pass, with its unpacked value."""

    def __init__(self, packed: Any, unpack: Callable[[Any], Tensor], value: Tensor):
        self._packed = packed
        self._unpack = unpack
        self._value: Tensor | None = value  # for gradients that are taken while the tape is recorded

    def value(self) -> Tensor:
        """The tensor, unpacked if it is not held."""
        return self._unpack(self._packed) if self._value is None else self._value

    def hold(self) -> None:
        """Unpack the tensor and keep it, until :meth:`let_go`."""
        self._value = self.value()

    def let_go(self) -> None:
        """Drop the unpacked tensor."""
        self._value = None


Saved = Sequence["weakref.ref[Once]"]


def past_hooks() -> contextlib.AbstractContextManager[None]:
    """A context without hooks on saved tensors."""
    return _past_hooks() if hooked() else contextlib.nullcontext()


@contextlib.contextmanager
def _past_hooks() -> Iterator[None]:
    before = _popped()
    try:
        yield
    finally:
        _pushed(before)


def kept() -> contextlib.AbstractContextManager[Saved]:
    """A context for recording a graph that will be differentiated many times: its tensors are packed by the hooks, and
    unpacked once in a backward pass (:func:`unpack`)."""
    return _kept() if hooked() else contextlib.nullcontext(())


@contextlib.contextmanager
def _kept() -> Iterator[Saved]:
    before = _popped()
    saved: list[weakref.ref[Once]] = []
    pack, unpack_one = before[0]

    def pack_once(t: Tensor) -> Once:
        once = Once(pack(t), unpack_one, t)
        saved.append(weakref.ref(once))  # the graph owns it: autograd frees it with the graph
        return once

    push_saved_tensor_hooks(pack_once, Once.value)
    try:
        yield saved
    finally:
        pop_saved_tensor_hooks()
        _pushed(before)
        for once in _living(saved):
            once.let_go()


def hooked() -> bool:
    """Return whether saved tensors go through hooks now."""
    return top_saved_tensor_hooks(False) is not None


def unpack(saved: Saved) -> None:
    """Unpack the saved tensors now, once, and hold them until the running backward pass ends."""
    for once in _living(saved):
        once.hold()
        when_backward_ends(once.let_go)


def _living(saved: Saved) -> Iterator[Once]:
    return filter(None, (reference() for reference in saved))


Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def _popped() -> list[Hooks]:
    """Remove all hooks; returns them, the innermost first."""
    hooks: list[Hooks] = []
    top: Hooks | None = top_saved_tensor_hooks(False)
    while top is not None:
        pop_saved_tensor_hooks()
        hooks.append(top)
        top = top_saved_tensor_hooks(False)
    return hooks


def _pushed(hooks: Sequence[Hooks]) -> None:
    """Set hooks again that :func:`_popped` has removed."""
    for pack, unpack in reversed(hooks):
        push_saved_tensor_hooks(pack, unpack)

"""Hooks on the tensors that autograd saves (``save_on_cpu``, activation checkpointing), and how the library meets them.

A graph whose products are taken many times would send every saved tensor through the hooks as many times, which for
checkpointing means a new forward pass for each. What the library differentiates on its own goes past the hooks; what
it keeps between the forward and the backward pass goes through them once in each.
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
    """A saved tensor as the user's hook packed it, and what unpacking gave while a backward pass runs."""

    def __init__(self, packed: Any, unpack: Callable[[Any], Tensor], value: Tensor):
        self._packed = packed
        self._unpack = unpack
        self._value: Tensor | None = value  # for gradients that are taken while the tape is recorded

    def value(self) -> Tensor:
        return self._unpack(self._packed) if self._value is None else self._value

    def hold(self) -> None:
        self._value = self.value()

    def let_go(self) -> None:
        self._value = None


Saved = Sequence["weakref.ref[Once]"]


@contextlib.contextmanager
def past_hooks() -> Iterator[None]:
    """No hooks, while the context lasts."""
    before = _popped()
    try:
        yield
    finally:
        _pushed(before)


@contextlib.contextmanager
def kept() -> Iterator[Saved]:
    """What is recorded in the context may be differentiated many times: see :func:`unpack`."""
    before = _popped()
    saved: list[weakref.ref[Once]] = []
    if not before:
        yield saved
        return
    pack, unpack_one = before[0]

    def pack_once(t: Tensor) -> Once:
        once = Once(pack(t), unpack_one, t)
        saved.append(weakref.ref(once))  # autograd lets go of it when it frees the graph
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
    """Whether saved tensors go through hooks now."""
    return top_saved_tensor_hooks(False) is not None


def unpack(saved: Saved) -> None:
    """Each of the saved tensors goes through its hook now, once for the whole of the backward pass that runs."""
    for once in _living(saved):
        once.hold()
        when_backward_ends(once.let_go)


def _living(saved: Saved) -> Iterator[Once]:
    return filter(None, (reference() for reference in saved))


Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]


def _popped() -> list[Hooks]:
    """The hooks, the innermost first, taken off."""
    hooks: list[Hooks] = []
    top: Hooks | None = top_saved_tensor_hooks(False)
    while top is not None:
        pop_saved_tensor_hooks()
        hooks.append(top)
        top = top_saved_tensor_hooks(False)
    return hooks


def _pushed(hooks: Sequence[Hooks]) -> None:
    for pack, unpack in reversed(hooks):
        push_saved_tensor_hooks(pack, unpack)

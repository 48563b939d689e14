"""Solving under inference mode, in which autograd records nothing although a solver may need a derivative, and whose
tensors autograd cannot save."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchimplicit.state import leaves_of

P = ParamSpec("P")
R = TypeVar("R")

_left: ContextVar[bool] = ContextVar("left_inference_mode", default=False)


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: where ``function`` is called in inference mode, it runs outside of it, with ordinary tensors and
    without gradients.

    Inference tensors are copied even where it is called outside that mode, since autograd could not save them.
    """

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*thawed(args), **thawed(kwargs))
        token = _left.set(True)
        try:
            with torch.inference_mode(False), torch.no_grad():
                return function(*thawed(args), **thawed(kwargs))
        finally:
            _left.reset(token)

    return outside


def thawed(tree: Any) -> Any:
    """The tree with its inference tensors replaced by ordinary copies; itself if it has none."""
    for leaf in leaves_of(tree):
        if _frozen(leaf):
            break
    else:
        return tree
    return pytree.tree_map(lambda leaf: leaf.clone() if _frozen(leaf) else leaf, tree)


def thawing() -> contextlib.AbstractContextManager[Any]:
    """A context for evaluating a function that may capture inference tensors: in a derivative of a solve that was
    called in inference mode, operations get ordinary copies of them."""
    return _Thawing() if thaws() else contextlib.nullcontext()


def thaws() -> bool:
    """Return whether :func:`thawing` does anything here."""
    return _left.get() and torch.is_grad_enabled()


class _Thawing(TorchFunctionMode):
    """Replaces inference tensors by ordinary copies in every operation."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._replace(args), **{key: self._replace(value) for key, value in (kwargs or {}).items()})

    def _replace(self, tree: Any) -> Any:
        if isinstance(tree, Tensor):
            if not _frozen(tree):
                return tree
            if id(tree) not in self._copies:
                self._copies[id(tree)] = tree, tree.clone()
            return self._copies[id(tree)][1]
        if type(tree) in (tuple, list):
            return type(tree)([self._replace(item) for item in tree])
        return tree


def _frozen(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_inference()

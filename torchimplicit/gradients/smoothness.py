"""Whether a map has a second derivative, as far as autograd's graph tells."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchimplicit.errors import SmoothnessWarning
from torchimplicit.notices import notice

ROUGH = {
    "Relu": "relu",
    "LeakyRelu": "leaky_relu",
    "Prelu": "prelu",
    "Rrelu": "rrelu",
    "Hardtanh": "hardtanh or relu6",
    "Hardsigmoid": "hardsigmoid",
    "Threshold": "threshold",
    "Abs": "abs",
    "Clamp": "clamp",
    "Round": "round",
    "Sign": "sign",
    "Floor": "floor",
    "Ceil": "ceil",
    "MaxPool": "max pooling",
    "Softshrink": "softshrink",
    "Hardshrink": "hardshrink",
}
"""Operations that are linear in pieces, by the beginning of their node's name: their second derivative is zero where
it exists, and is not the curvature that one sees."""


def rough_operations(out: Tensor) -> list[str]:
    """The operations behind ``out`` that are only linear in pieces."""
    stack: list[Any] = [out.grad_fn]
    seen: set[Any] = set()
    operations: dict[str, None] = {}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = type(node).__name__
        operations |= {said: None for beginning, said in ROUGH.items() if name.startswith(beginning)}
        stack.extend(parent for parent, _ in node.next_functions)
    return sorted(operations)


class Smoothness:
    """Remembers whether a second derivative of a solution was asked for, and warns once where its map has none.

    Asking costs nothing, so that a first derivative never looks at the map; the next linear solve shows it.
    """

    def __init__(self) -> None:
        self._asked = self._told = False

    def asked(self) -> None:
        """A second derivative is wanted."""
        self._asked = True

    def look(self, out: Tensor) -> None:
        """Warn, if one was asked for and ``out`` is a recorded value that is linear in pieces."""
        if self._asked and not self._told:
            self.warn(out)

    def warn(self, out: Tensor) -> None:
        """Warn where ``out`` is linear in pieces."""
        self._told = True
        if rough := rough_operations(out):
            notice(
                "a second derivative was asked for of a function that is linear in pieces",
                f"a second derivative was asked for, and the problem's function uses {', '.join(rough)}, linear in "
                "pieces: autograd takes the second derivative to be zero, which says nothing about the kinks. Use a "
                "smooth function instead: tanh, sin, softplus, silu or gelu",
                SmoothnessWarning,
            )

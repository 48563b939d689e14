"""A check, from autograd's graph, that a map has a second derivative."""

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
"""Piecewise linear operations by the beginning of their node's name. Their second derivative is zero where it exists,
and says nothing about the kinks."""


def rough_operations(out: Tensor) -> list[str]:
    """The piecewise linear operations in the graph of ``out``."""
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
    """Remembers whether a second derivative of a solution was asked for, and warns once if its map has none.

    Noting the request costs nothing. The graph is searched at the next linear solve after it, so a first derivative
    never pays for it.
    """

    def __init__(self) -> None:
        self._asked = self._told = False

    def asked(self) -> None:
        """Note that a second derivative is asked for."""
        self._asked = True

    def look(self, out: Tensor) -> None:
        """Warn if one was asked for and the recorded value ``out`` is piecewise linear."""
        if self._asked and not self._told:
            self.warn(out)

    def warn(self, out: Tensor) -> None:
        """Warn if ``out`` is piecewise linear."""
        self._told = True
        if rough := rough_operations(out):
            notice(
                "a second derivative was asked for of a function that is linear in pieces",
                f"a second derivative was asked for, but the problem's function uses {', '.join(rough)}, which is "
                "piecewise linear: autograd takes the second derivative to be zero, and the kinks are ignored. Use a "
                "smooth function instead: tanh, sin, softplus, silu or gelu",
                SmoothnessWarning,
            )

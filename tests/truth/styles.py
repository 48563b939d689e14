"""The ways in which a user's function comes by its tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import torchimplicit as ti
from tests.truth.cores import Tensors

Function = Callable[..., Any]
"""``function(*state, tensors)``."""
Solve = Callable[[Function, tuple[Any, ...]], ti.Solution]
"""``solve(f, args)``, with a function of the user's style."""
PASSED = ("x", "p")
"""What carries the batch."""


def stated(style: str, function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    """The solution of ``function``, written in the style."""
    return _STYLES[style](function, tensors, solve)


def _arguments(function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    names = tuple(tensors)

    def f(*given: Any) -> Any:
        state, args = given[: -len(names)], given[-len(names) :]
        return function(*state, dict(zip(names, args, strict=True)))

    return solve(f, tuple(tensors.values()))


def _one_dict(function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    return solve(function, (tensors,))


def _closure(function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    return solve(lambda *state: function(*state, tensors), ())


def _derived(function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    made = {name: 2.0 * t - t.clone() for name, t in tensors.items()}
    return solve(lambda *state: function(*state, made), ())


def _mixed(function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    held = _held(tensors)
    return solve(lambda *given: function(*given[:-2], _whole(given, held)), _passed(tensors))


def _partial(function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    def f(*state: Any, **tensors: Tensor) -> Any:
        return function(*state, tensors)

    return solve(functools.partial(f, **tensors), ())


class _Holder:
    """An object with tensors in a list, called or by its method."""

    def __init__(self, function: Function, held: Tensors):
        self.function, self.names, self.held = function, tuple(held), [{"t": t} for t in held.values()]

    def step(self, *given: Any) -> Any:
        held = {name: each["t"] for name, each in zip(self.names, self.held, strict=True)}
        return self.function(*given[:-2], _whole(given, held))

    __call__ = step


def _method(function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    return solve(_Holder(function, _held(tensors)).step, _passed(tensors))


def _callable(function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    return solve(_Holder(function, _held(tensors)), _passed(tensors))


class _Cell(nn.Module):
    """The function with its tensors as parameters."""

    def __init__(self, function: Function, held: Tensors):
        super().__init__()
        self.function, self.names = function, tuple(held)
        for name, t in held.items():
            self.register_parameter(name, t if isinstance(t, nn.Parameter) else nn.Parameter(torch.zeros_like(t)))

    def forward(self, *given: Any) -> Any:
        return self.function(*given[:-2], _whole(given, {name: getattr(self, name) for name in self.names}))


class _Layer(nn.Module):
    """A module that solves in its forward pass, of its cell or of a function of its own."""

    def __init__(self, function: Function, tensors: Tensors, solve: Solve, how: str):
        super().__init__()
        self.cell, self.solve, self.how = _Cell(function, _held(tensors)), solve, how

    def step(self, *given: Any) -> Any:
        return self.cell(*given)

    def forward(self, *passed: Tensor) -> ti.Solution:
        if self.how == "cell":
            return self.solve(self.cell, passed)
        if self.how == "method":
            return self.solve(self.step, passed)
        return self.solve(lambda *state: self.step(*state, *passed), ())


def _module(function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    if all(isinstance(t, nn.Parameter) for t in _held(tensors).values()):
        return solve(_Cell(function, _held(tensors)), _passed(tensors))
    return _functional("cell", function, tensors, solve)


def _functional(how: str, function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    plain = {name: t.detach().clone() for name, t in tensors.items() if name not in PASSED}
    layer = _Layer(function, {**tensors, **plain}, solve, how)
    named = {f"cell.{name}": t for name, t in _held(tensors).items()}
    return functional_call(layer, named, _passed(tensors))


def _nested(function: Function, tensors: Tensors, solve: Solve) -> ti.Solution:
    return solve(lambda *state: function(*state, tensors, nested=equilibrium), ())


def equilibrium(z: Tensor, t: Tensors) -> Tensor:
    """y = 0.3 W y + sin(z), by a solve of its own; see :func:`~tests.truth.cores.inner`."""
    solution = ti.solve(
        ti.FixedPoint(lambda y: 0.3 * y @ t["W"].mT + torch.sin(z)),
        torch.zeros_like(z),
        solver=ti.FixedPointIteration(rtol=1e-14 if z.dtype == torch.float64 else None, max_steps=200),
        gradient=ti.Implicit(linear_solver=ti.Dense()),
    )
    return solution.value


def _held(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if name not in PASSED}


def _passed(tensors: Tensors) -> tuple[Tensor, ...]:
    return tuple(tensors[name] for name in PASSED)


def _whole(given: tuple[Any, ...], held: Tensors) -> Tensors:
    return {**held, **dict(zip(PASSED, given[-2:], strict=True))}


_STYLES: dict[str, Callable[[Function, Tensors, Solve], ti.Solution]] = {
    "arguments": _arguments,
    "one-dict": _one_dict,
    "closure": _closure,
    "derived": _derived,
    "mixed": _mixed,
    "partial": _partial,
    "method": _method,
    "callable": _callable,
    "module": _module,
    "functional-call": functools.partial(_functional, "closure"),
    "functional-method": functools.partial(_functional, "method"),
    "nested": _nested,
}

"""Linear systems in compiled code: products traced once and taken apart, and what solves with them.

What a product takes from the point alone is computed before the loop, and what depends on the vector in its body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from torchimplicit.captured.compiled import traced_apart
from torchimplicit.captured.loop import while_loop
from torchimplicit.captured.parts import dependents, is_view, needed_before, part
from torchimplicit.linear import BiCGStab, LinearOperator
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.system import LinearSystem

ASSEMBLED = 128
"""Up to so many unknowns, ``Dense`` is compiled."""

Product = Callable[..., Tensor]
"""``(v, *saved)``: the product of the matrix, or of its transpose, with v."""


class Right(NamedTuple):
    """The system: ``b`` ``[batch, dim]``, of about unit size, its norms and by what it was multiplied, ``[batch]``."""

    b: Tensor
    scale: Tensor
    factor: Tensor


class Solved(NamedTuple):
    """``x`` ``[batch, dim]``; bool ``[batch]``, whether it is the solution as far as the method knows; the steps of
    each row, int64 ``[batch]``; how many products were taken, int64; and what the norm of each row's matrix is at
    least. ``convex``, bool ``[batch]``: the rows that met no negative curvature. ``spent``, bool ``[batch]``: the rows
    that are not solved because they have taken all the steps there are, and ``left``, ``[batch]``, the norm of the
    residual by the recurrence; ``None`` for methods that do not tell."""

    x: Tensor
    solved: Tensor
    steps: Tensor
    products: Tensor
    size: Tensor
    convex: Tensor
    spent: Tensor | None = None
    left: Tensor | None = None


class _Going(NamedTuple):
    """``least`` is the norm of the residual of ``x``, the best iterate; ``going`` the rows that are not solved."""

    taken: Tensor
    state: dict[str, Tensor]
    x: Tensor
    least: Tensor
    steps: Tensor
    going: Tensor


def by_method(
    solver: IterativeSolver,
    tolerance: Tensor,
    max_steps: int,
    product: Product,
    saved: Any,
    right: Right,
    symmetric: bool,
) -> Solved:
    """By the steps that the eager loop takes; rows that are solved run on, and what they come to is not looked at.

    Args:
        tolerance: of the residual's norm, ``[batch]``.
    """
    b, scale, _ = right

    def system(saved: Any) -> LinearSystem:
        operator = LinearOperator(
            product=lambda v: product(v, *saved),
            batch=b.shape[0],
            dim=b.shape[1],
            dtype=b.dtype,
            device=b.device,
            symmetric=symmetric,
        )
        return LinearSystem.of(operator, None, False)

    method = solver.method(system(saved).operator)
    first = method.start(system(saved), b, torch.zeros_like(b), b, scale)
    going = scale > tolerance
    none = torch.zeros((), dtype=torch.int64, device=b.device)
    start = _Going(none, _held(first), torch.zeros_like(b), scale, torch.zeros_like(going, dtype=torch.int64), going)

    def body(now: _Going, constants: Any, rings: Any) -> _Going:
        saved, tolerance = constants
        state = method.step(system(saved), _like(first, now.state), None)
        better = now.going & (state.norm < now.least)
        least = torch.where(better, state.norm, now.least)
        broken = ~(state.norm < torch.inf)
        going = now.going & (least > tolerance) & ~broken
        if getattr(state, "broken", None) is not None:
            going = going & ~state.broken
        count = now.taken + 1
        x = torch.where(better[:, None], state.x, now.x)
        return _Going(count, _held(state), x, least, torch.where(now.going, count, now.steps), going)

    def on(now: _Going) -> Tensor:
        return (now.taken < max_steps) & (now.going.sum() > 0)

    end = while_loop(on, body, start, (saved, tolerance))
    solved = end.least <= tolerance
    convex = torch.ones_like(solved)
    if "curvature" in end.state:
        convex = ~(end.state["curvature"][:, 0] < 0)
    size = end.state["size"][:, 0] if "size" in end.state else torch.zeros_like(scale)
    count = end.taken * (2 if isinstance(solver, BiCGStab) else 1) + 1
    return Solved(end.x, solved & convex, end.steps, count, size, convex)


def _held(state: Any) -> dict[str, Tensor]:
    """The tensors of a method's state, but for what is not carried from step to step."""
    return {name: t.clone() for name, t in state._asdict().items() if isinstance(t, Tensor) and name != "broken"}


def _like(first: Any, held: dict[str, Tensor]) -> Any:
    return first._replace(**held, **({"broken": None} if hasattr(first, "broken") else {}))


def assembled(product: Product, saved: Any, right: Right, symmetric: bool, null: Tensor | None = None) -> Solved:
    """By the inverse matrix, and one step of refinement.

    Args:
        null: unit vectors ``[batch or 1, dim]`` that the matrix takes to zero, and to which ``b`` is orthogonal.
    """
    b, scale, _ = right
    batch, dim = b.shape
    eye = torch.eye(dim, dtype=b.dtype, device=b.device)
    columns = torch.vmap(lambda v: product(v.expand(batch, dim), *saved))(eye)
    matrix = columns.permute(1, 2, 0)
    if null is not None:
        size = matrix.diagonal(dim1=1, dim2=2).abs().mean(dim=1)[:, None, None]
        matrix = matrix + size * null[:, :, None] * null[:, None, :]
    sound = torch.ones_like(scale, dtype=torch.bool)
    if symmetric:
        matrix = 0.5 * (matrix + matrix.mT)
        sound = torch.linalg.cholesky_ex(matrix)[1] == 0
    inverse, info = torch.linalg.inv_ex(matrix)
    x = (inverse @ b[:, :, None])[:, :, 0]
    left = b - (matrix @ x[:, :, None])[:, :, 0]
    x = x + (inverse @ left[:, :, None])[:, :, 0]
    condition = matrix.abs().sum(dim=1).amax(dim=1) * inverse.abs().sum(dim=1).amax(dim=1)
    sound = sound & (info == 0) & (condition < torch.inf)
    length = torch.linalg.vector_norm(x, dim=-1)
    size = condition * torch.where(scale > 0, scale, 1) / torch.where(length > 0, length, 1)  # so that it is that
    one = torch.ones_like(info, dtype=torch.int64)
    count = torch.full((), b.shape[1] + 1, dtype=torch.int64, device=b.device)
    return Solved(x, sound, one, count, size, torch.ones_like(sound))


class Parts(NamedTuple):
    """The graph of the products, taken apart.

    Attributes:
        before: ``(z, *inputs) -> saved``: what depends on neither vector, of ``(v, g, z, *inputs)``.
        product: ``(v, *saved)``.
        after: ``(g, *saved)``, the gradients.
    """

    before: fx.GraphModule
    product: Any
    after: Any

    @staticmethod
    def of(products: Any, z: Tensor, inputs: Sequence[Any], g: Tensor | None = None) -> Parts:
        """Args: ``g``, an example of it where it is not like the state."""
        graph = traced_apart(products, (z, z if g is None else g, z, *inputs))
        places = graph.graph.find_nodes(op="placeholder")
        (output,) = graph.graph.find_nodes(op="output")
        product, *grads = output.args[0]
        of_v, of_g = dependents(graph, places[0]), dependents(graph, places[1])
        late = of_v | of_g
        saved = needed_before(graph, late)
        before = part(graph, places[2:], saved, lambda node: node not in late)
        return Parts(
            before,
            _first(part(graph, (places[0], *saved), [product], lambda node: node in of_v or is_view(node))),
            part(graph, (places[1], *saved), grads, lambda node: node in of_g or is_view(node)),
        )


def _first(module: fx.GraphModule) -> Any:
    return lambda *inputs: module(*inputs)[0]

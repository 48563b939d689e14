"""Joint inference and input optimization (Gurumurthy et al. 2021)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.constraints import Box, L2Ball
from torchimplicit.problems.base import Problem, check_function
from torchimplicit.problems.joint_system import JointSystem, Parts
from torchimplicit.problems.per_sample import column, flat_tree, taken
from torchimplicit.problems.sets import FlatBox, FlatCut
from torchimplicit.problems.system import System
from torchimplicit.solution import Status
from torchimplicit.state import Layout, Leaves

StepSize = float | Tensor | Callable[[int], float]


class JointState(NamedTuple):
    """The state of :class:`JointInference`.

    Attributes:
        z: the equilibrium, :math:`z = f(z, x)`.
        mu: the adjoint, like ``z``: :math:`\\mu = f_z^T\\mu + \\ell_z^T`, the derivative of the loss with respect to
            the value of ``f``.
        x: the input that minimizes the loss.
    """

    z: Any
    mu: Any
    x: Any


@final
@dataclass(frozen=True)
class JointInference(Problem):
    """The input that minimizes the loss of its equilibrium; both are found by one fixed-point iteration (joint
    inference and input optimization, JIIO; Gurumurthy et al. 2021).

    Minimizes :math:`\\ell(z, x)` over :math:`x` in the constraint's set, subject to :math:`z = f(z, x)`. The map is

    .. math::
        z^+ = f(z, x),\\quad \\mu^+ = f_z^T\\mu + \\ell_z^T,\\quad
        x^+ = \\Pi\\bigl(x - \\alpha(f_x^T\\mu + \\ell_x^T)\\bigr),

    with one evaluation and one backward pass of ``f`` and the loss per step. The initial state is the pair
    ``(z0, x0)``, or a :class:`JointState` for a warm start; the solution's value is a :class:`JointState`. Every
    iterate's ``x`` lies in the set. The residual is the largest of the relative residuals of the three parts.

    A solve that does not converge returns the iterate with the smallest cost
    :math:`\\ell + \\langle\\mu, f - z\\rangle + \\lVert f - z\\rVert\\lVert\\mu^+ - \\mu\\rVert +
    \\kappa\\lVert f - z\\rVert^2`: the loss of the exact equilibrium at :math:`x` up to second order, plus the size of
    the second order. :math:`\\kappa` is the rate at which :math:`\\mu^+` changed with :math:`z` along the last step.

    Args:
        f: ``f(z, x, *args)``, returning a state with the structure, shapes and dtype of ``z``.
        loss: ``loss(z, x, *args)``, one value per sample, ``[batch]``; a scalar if not batched.
        step_size: :math:`\\alpha > 0`: a number; a tensor ``[batch]``; or a schedule that is called with the number of
            the solver's step (from 1; its value at 0 is used for the derivatives). Too large a step diverges. It is
            inverse to the scale of the loss: half the loss allows twice the step. Nothing else depends on that scale.
        constraint: an :class:`L2Ball`, a :class:`Box`, a pair of both (their intersection), or ``None``. A start
            outside is projected, with a warning.
        batched, rowwise: see :class:`FixedPoint`. The loss of a sample must depend on that sample alone.
        damping: for z, mu and x, in (0, 1]: each part takes that share of its step. The published settings are
            ``(0.8, 0.6, 1.0)``.
        normalized: whether x takes steps of length :math:`\\alpha` along its gradient, regardless of the gradient's
            size; ``"sign"``: steps of :math:`\\alpha` in every entry, by the sign of the gradient. Such an iteration
            converges only where the solution lies on the boundary of an :class:`L2Ball` or, with signs, at a corner of
            a :class:`Box`.

    Raises:
        TypeError: ``f`` or ``loss`` is not callable, or ``step_size`` or ``constraint`` is of another type.
        ValueError: a number is out of range.
    """

    f: Callable[..., Any]
    loss: Callable[..., Any]
    step_size: StepSize
    constraint: L2Ball | Box | tuple[L2Ball | Box, L2Ball | Box] | None = None
    batched: bool = True
    rowwise: bool = False
    damping: tuple[float, float, float] = (1.0, 1.0, 1.0)
    normalized: bool | Literal["sign"] = False
    by_gradient: ClassVar[bool] = True
    announces_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_function(self.f, "f")
        check_function(self.loss, "loss")
        kinds = [type(part) for part in self._sets]
        if kinds not in ([], [L2Ball], [Box], [L2Ball, Box], [Box, L2Ball]):
            raise TypeError(
                "constraint must be an L2Ball, a Box, the pair of both, or None, not "
                + ", ".join(kind.__name__ for kind in kinds)
            )
        if self.normalized not in (False, True, "sign"):
            raise ValueError(f'JointInference.normalized is {self.normalized!r}, and must be False, True or "sign"')
        if isinstance(self.step_size, (int, float)) and not self.step_size > 0:
            raise ValueError(f"JointInference.step_size is {self.step_size}, and must be positive")
        if not (isinstance(self.step_size, (int, float, Tensor)) or callable(self.step_size)):
            raise TypeError(
                "JointInference.step_size must be a number, a tensor [batch] or a schedule (step -> number), not "
                f"{type(self.step_size).__name__}"
            )
        if len(self.damping) != 3 or not all(0 < share <= 1 for share in self.damping):
            raise ValueError(
                f"JointInference.damping is {self.damping}, and must be three numbers in (0, 1], for z, mu and x"
            )

    @property
    def _sets(self) -> tuple[Any, ...]:
        if self.constraint is None:
            return ()
        return self.constraint if isinstance(self.constraint, tuple) else (self.constraint,)

    def explain(self, status: Status) -> str:
        return (
            "JointInference diverges with too large a step_size, or with a loss that is unbounded below in the input: "
            "lower step_size, add a constraint (L2Ball, Box), or add a term in x to the loss"
        )

    def explain_start(self, moved: int, rows: int) -> str:
        return (
            f"the initial x lies outside the constraint's set in {moved} of {rows} samples, and was projected onto it"
        )

    @property
    def function(self) -> Callable[..., Any]:
        def both(state: JointState, *args: Any) -> tuple[Any, Any]:
            return self.f(state.z, state.x, *args), self.loss(state.z, state.x, *args)

        return both

    @property
    def stated_by(self) -> Callable[..., Any]:
        return self.f

    def start(self, z0: Any) -> JointState:
        if isinstance(z0, JointState):
            return z0
        if not isinstance(z0, (tuple, list)) or len(z0) != 2:
            raise ValueError(
                "JointInference starts from a pair (z0, x0), or from a JointState, but z0 is "
                + (f"a {type(z0).__name__} of {len(z0)}" if isinstance(z0, (tuple, list)) else type(z0).__name__)
            )
        z, x = z0
        return JointState(z, pytree.tree_map(torch.zeros_like, z), x)

    def state(self, layout: Layout, flat: Any) -> JointState:
        if isinstance(flat, Tensor):
            return layout.unflatten(flat)
        z, x = flat
        return JointState(_part(layout, "z").unflatten(z), None, _part(layout, "x").unflatten(x))

    def seen(self, layout: Layout, flat: Tensor) -> tuple[Tensor, Tensor]:
        z, _, x = Parts(_part(layout, "z").dim, _part(layout, "x").dim).split(flat)
        return z, x

    def flat_output(self, layout: Layout, output: Any, rows: int, cast: bool) -> Tensor:
        state, loss = self.flat_parts(layout, output, rows, cast)
        return torch.cat((state, loss[:, None]), dim=1)

    def flat_parts(self, layout: Layout, output: Any, rows: int, cast: bool) -> tuple[Tensor, Tensor]:
        state, loss = output
        flat = _part(layout, "z").flatten(state, "the result of f", cast)
        if flat.shape[0] != rows:
            raise ValueError(f"f was given {rows} samples and returned {flat.shape[0]}: the map must keep the batch")
        expected = (rows,) if layout.batched else ()
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must return a tensor, but it returned {type(loss).__name__}")
        if tuple(loss.shape) != expected:
            raise ValueError(
                f"loss returned shape {tuple(loss.shape)}, but must return {expected}: "
                + (
                    "one value per sample, each sample having its own input; take the mean or the sum over every "
                    "dimension but the first, for example error.flatten(1).mean(dim=1)"
                    if layout.batched
                    else "a scalar, since the problem is not batched"
                )
            )
        if loss.dtype != layout.dtype and not cast:
            raise ValueError(f"loss returned {loss.dtype} for a state of {layout.dtype}: keep the dtype")
        return flat, loss.to(layout.dtype).reshape(rows)

    def constraint_tensors(self, layout: Layout, rows: int) -> tuple[Tensor, ...]:
        size = 0.0 if callable(self.step_size) and not isinstance(self.step_size, Tensor) else self.step_size
        tensors = [column(layout, size, rows, "step_size")]
        inputs = _part(layout, "x")
        sets = {type(part): part for part in self._sets}
        if box := sets.get(Box):
            tensors.append(_flat_or_number(inputs, box.low, rows, "the lower bound"))
            tensors.append(_flat_or_number(inputs, box.high, rows, "the upper bound"))
        if ball := sets.get(L2Ball):
            tensors.append(column(layout, ball.radius, rows, "the radius"))
            tensors.append(_flat_or_number(inputs, ball.center, rows, "the center"))
        if len(sets) == 2:
            tensors[4] = tensors[4].expand(-1, inputs.dim)
            FlatCut(FlatBox(tuple(tensors[1:3])), tuple(tensors[1:])).check(tensors[4])
        return tuple(tensors)

    def system(
        self, fn: Callable[..., Tensor], row_params: tuple[bool, ...] | None, constraint: slice, layout: Layout
    ) -> System:
        schedule = self.step_size if callable(self.step_size) and not isinstance(self.step_size, Tensor) else None
        dims = [_part(layout, name).dim for name in ("z", "x")]
        return JointSystem(
            fn=fn,
            row_params=row_params,
            leaves=Leaves((dims[0], *dims), pytree.tree_structure(JointState(0, 0, 0))),
            parts=Parts(dims[0], dims[1]),
            damping=self.damping,
            own=taken(constraint),
            which=constraint,
            set=_in_both if len(self._sets) == 2 else next((part.project for part in self._sets), None),
            schedule=schedule,
            step_size=None if schedule is None else float(schedule(0)),
            normalized=self.normalized,
        )


def _in_both(x: Tensor, *tensors: Tensor) -> Tensor:
    """The projection of ``x`` onto the intersection of a box and a ball; ``tensors`` are low, high, radius and
    center."""
    return FlatCut(FlatBox(tensors[:2]), tensors).project(x, x[:, :1], *tensors)


@functools.lru_cache(maxsize=64)
def _part(layout: Layout, name: str) -> Layout:
    """The layout of one part of the joint state."""
    state = layout.unflatten(torch.empty(1, layout.dim, device="meta"))  # only shapes are needed
    leaves, spec = pytree.tree_flatten(getattr(state, name))
    which = tuple(leaf.is_complex() for leaf in leaves)
    leaves = [torch.view_as_real(leaf) if c else leaf for leaf, c in zip(leaves, which, strict=True)]
    shapes = tuple(leaf.shape[1:] if layout.batched else leaf.shape for leaf in leaves)
    is_flat = layout.batched and spec.is_leaf() and len(shapes[0]) == 1 and not any(which)
    return replace(layout, spec=spec, shapes=shapes, is_flat=is_flat, complex=which if any(which) else ())


def _flat_or_number(layout: Layout, value: Any, rows: int, what: str) -> Tensor:
    """A scalar as ``[1, 1]``, or a pytree like the state as ``[rows or 1, dim]``."""
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
        return column(layout, value, rows, what)
    return flat_tree(layout, value, rows, what)

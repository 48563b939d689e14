"""A problem with its arguments, in flat coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchimplicit.auxiliary import Auxiliary
from torchimplicit.closure import Closure, through_modes
from torchimplicit.coupling import Coupling
from torchimplicit.inference import thawed, thawing, thaws
from torchimplicit.members import Members, module_of, modules_behind
from torchimplicit.precision import AutocastState
from torchimplicit.problems import Problem, System
from torchimplicit.records import changed
from torchimplicit.saved import past_hooks
from torchimplicit.state import Layout


@dataclass(frozen=True, kw_only=True)
class FlatProblem:
    """A problem with its arguments, in flat coordinates.

    Attributes:
        problem: the user's problem.
        layout: the structure of its state.
        z0: the given state, ``[batch, dim]``.
        closure: the problem's function with its arguments and captured tensors.
        call: the problem's function in flat coordinates.
        system: the problem over flat states.
        params: the tensors that ``system`` depends on: those of the arguments, those of a constraint, captured ones.
        value: the function's value at ``z0``, if it had to be called.
        precision: the dtype in which autocast evaluates the function; ``None`` where it is off.
    """

    problem: Problem
    layout: Layout
    z0: Tensor
    closure: Closure
    call: FlatCall
    system: System
    params: tuple[Tensor, ...]
    value: Tensor | None
    precision: torch.dtype | None


def flatten_problem(
    problem: Problem,
    z: Any,
    args: tuple[Any, ...],
    *,
    capture: bool,
    rowwise: bool = False,
    known: Callable[[Layout, Tensor], tuple[Tensor, ...] | None] | None = None,
    opening: bool = False,
) -> FlatProblem:
    """Bring ``problem`` into flat coordinates at the state ``z``.

    Args:
        problem, z, args: as for :func:`~torchimplicit.solve`.
        capture: whether to find the tensors that the problem's function captures, by one call at ``z``.
        rowwise: whether samples may be evaluated separately, if the problem promises ``rowwise=True``.
        known: returns the captured tensors without that call, or ``None`` if they are not known.
        opening: whether to keep that call's graph for the backward pass, since zero steps will be taken from ``z``.
    """
    z = problem.start(z)
    layout = problem.layout(z)
    z0 = layout.flatten(z, "z0")
    rows = z0.shape[0]
    flattened = problem.flattened(layout, z0)
    constraint = thawed(flattened.constraint_tensors(layout, rows))
    call = FlatCall(problem, layout)
    closure, value = Closure(call, args, extra=len(constraint)), None
    captured = None if known is None else known(layout, z0)
    if captured is not None:
        closure = closure.capturing(captured)
    elif capture:
        with past_hooks():
            closure, value = closure.record(z0.detach().requires_grad_() if opening else z0.detach())
    count = len(closure.tensors)
    params = through_modes((*closure.tensors, *constraint, *closure.captured))
    row_params = None
    # coordinates with a matrix per sample are not among the parameters, and would not be indexed with the rows
    shared = layout.coordinates is None or not layout.coordinates.per_sample
    if rowwise and problem.batched and problem.rowwise and rows > 1 and shared:
        row_params = tuple(_carries_batch(p, rows) for p in params[: count + len(constraint)])
        row_params += (False,) * len(closure.captured)
    system = flattened.system(closure, row_params, slice(count, count + len(constraint)), layout)
    coupling = Coupling.of(problem.stated_by, rows, problem.rowwise) if problem.batched else None
    return FlatProblem(
        problem=problem,
        layout=layout,
        z0=z0,
        closure=closure,
        call=call,
        system=changed(system, coupling=coupling),
        params=params,
        value=value,
        precision=call.autocast.dtype,
    )


def tensors_of(problem: Problem, z: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The tensors in which a solution of ``problem`` at ``z`` is differentiable: those that require grad among the
    arguments and among the captured ones. Takes one evaluation.

    Raises:
        ValueError: there are none.
    """
    closure = flatten_problem(problem, z, args, capture=True).closure
    unique = {id(t): t for t in (*closure.tensors, *closure.captured) if t.requires_grad}
    if not unique:
        raise ValueError(
            "neither an argument nor a tensor that the problem's function captures requires grad: there is nothing to "
            "differentiate with respect to"
        )
    return tuple(unique.values())


class FlatCall:
    """The problem's function in flat coordinates, with the autocast state and the modules' tensors at the time of the
    call of ``solve``.

    A backward pass evaluates the function later, when autocast may be off and ``torch.func.functional_call`` may have
    put other tensors into the modules.

    Attributes:
        modules: the modules that the function may call.
        module: the one that the function is, or whose method it is; ``None`` for none.
        left: whether the call of ``solve`` has ended, so that the modules may hold other tensors.
        aux: collects the auxiliary value; ``None`` for a function without one.
    """

    def __init__(self, problem: Problem, layout: Layout):
        self.problem = problem
        self.layout = layout
        self.aux = Auxiliary() if problem.has_aux else None
        function = problem.function
        self.function = function if self.aux is None else problem.noting(self.aux.note)
        self.modules = modules_behind(function)
        self.module = module_of(function)
        self.members = Members(self.modules)
        self.left = True
        self.autocast = AutocastState(layout.device)
        self._follows = False
        self._latest: tuple[Tensor, Any] | None = None

    def following(self, direct: bool, first: tuple[Tensor, Any] | None = None) -> AbstractContextManager[None]:
        """A context in which a call that begins where the last one ended gets the very leaves that this returned, and
        no copies of them, as in a loop written by hand. Only where autograd differentiates the calls itself
        (``direct``).

        Args:
            direct: see :class:`~torchimplicit.gradients.base.SolveTask`.
            first: where the first call begins, in flat form and as a pytree.
        """
        return self._following(first) if direct and self.layout.parted else nullcontext()

    @contextmanager
    def _following(self, first: tuple[Tensor, Any] | None) -> Iterator[None]:
        self._follows, self._latest = True, first
        try:
            yield
        finally:
            self._follows, self._latest = False, None

    def returned(self, z: Tensor) -> Any:
        """The leaves that the function returned for the flat state ``z``; ``None`` if they are not known, or must not
        be handed to the user."""
        if self._latest is None or self._latest[0] is not z:
            return None
        leaves = pytree.tree_leaves(self._latest[1])
        # a leaf without a graph may be an argument, a buffer or a parameter
        return self._latest[1] if all(leaf.grad_fn is not None for leaf in leaves) else None

    def _state(self, z: Any) -> Any:
        """The state to call the function with."""
        if self._latest is not None and isinstance(z, Tensor):
            flat, state = self._latest
            # the same memory, and either the same graph or none
            if z is flat or (z.data_ptr() == flat.data_ptr() and z.shape == flat.shape and not flat.requires_grad):
                return state
        return self.problem.state(self.layout, z)

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """A context for the time of the solve, in which the modules need not be restored."""
        self.left = False
        try:
            yield
        finally:
            self.left = True

    def __call__(self, z: Tensor | tuple[Tensor, ...], *args: Any) -> Any:
        around = torch.is_grad_enabled() and (self.members.normalize or thaws())
        if self.left or self.autocast.dtype is not None or around:
            output = self._as_stated(z, args)
        else:  # within the solve the state is that of the call, and restoring it would cost time
            output = self.function(self._state(z), *args)
        if self.aux is not None:
            self.aux.called(z)
        cast = self.autocast.dtype is not None
        if isinstance(z, tuple):
            return self.problem.flat_parts(self.layout, output, z[0].shape[0], cast)
        flat = self.problem.flat_output(self.layout, output, z.shape[0], cast)
        if self._follows and not cast:
            self._latest = flat, pytree.tree_map(lambda leaf: leaf.contiguous(), output)
        return flat

    def _as_stated(self, z: Tensor | tuple[Tensor, ...], args: tuple[Any, ...]) -> Any:
        """Call the function with autocast and the modules' tensors as they were at the call of ``solve``."""
        with self.autocast(), self.members.restored() if self.left else nullcontext(), thawing():
            if self.members.normalize and torch.is_grad_enabled():
                with self.members.with_copied_statistics():
                    return self.function(self._state(z), *args)
            return self.function(self._state(z), *args)


def _carries_batch(t: Tensor, rows: int) -> bool:
    # by size alone: ``rowwise=True`` promises that it means the batch, and the loop tests that
    return not isinstance(t, nn.Parameter) and t.ndim > 0 and t.shape[0] == rows

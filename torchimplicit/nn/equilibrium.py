"""The equilibrium layer."""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from torchimplicit._solve import UNTRACED, solve_from
from torchimplicit.closure import eagerly, is_transformed, transforms_running
from torchimplicit.compiler import untraced
from torchimplicit.errors import SolveError
from torchimplicit.gradients import Gradient, Reversible, Unrolled
from torchimplicit.members import compiled_module
from torchimplicit.nn.budget import Budget
from torchimplicit.nn.dropout import VariationalDropout, active_dropouts, drawing
from torchimplicit.nn.normalization import holding, parametrizations, settled_vectors
from torchimplicit.nn.per_solve import PerSolve
from torchimplicit.nn.refresh import refreshable, refreshes, refreshing
from torchimplicit.nn.warm_start import WarmStart
from torchimplicit.precision import without_autocast
from torchimplicit.problems import FixedPoint
from torchimplicit.solution import Solution
from torchimplicit.solvers import Solver
from torchimplicit.state import detached


@final
class Equilibrium(nn.Module):
    """The layer whose output is the fixed point ``z = cell(z, *inputs)`` (Bai et al. 2019, arXiv 1909.01377).

    Parametrized weights (:func:`weight_norm`, :func:`spectral_norm`, and those of ``torch.nn.utils.parametrizations``)
    are computed once per solve, and every :class:`VariationalDropout` draws one mask per solve. A compiled cell is the
    exception: it computes its weights in every evaluation.

    The cell may be compiled (``Equilibrium(torch.compile(cell))``), or the model around the layer; the solve itself is
    a graph break. The layer works inside ``DistributedDataParallel``, ``fully_shard``, activation checkpointing and the
    cell of another equilibrium.

    Args:
        cell: a module called as ``cell(z, *inputs)`` with the inputs of the layer, returning a state like ``z``. If it
            has a method ``initial_state(*inputs)``, this gives the initial state, unless ``start`` does.
        solver, gradient: as for :func:`solve`.
        eval_solver: the solver in eval mode; ``None``: the same.
        budget: a :class:`Budget` that changes ``solver`` from step to step in training.
        start: a module called with the inputs that gives the initial state, such as a :class:`LearnedStart`.
        warm_start: ``True`` or a :class:`WarmStart`: begin at the last solution.
        rowwise: see :class:`FixedPoint`; must be ``False`` for a cell with batch normalization in training.
        batched: see :class:`FixedPoint`.
        has_aux: whether the cell returns a pair ``(state, aux)``; the layer then does, and its solution has ``aux``:
            see :class:`FixedPoint`, and :attr:`Solution.aux` for its derivative.
        unpack: whether the cell takes the entries of a tuple or list as arguments, ``cell(*z, *inputs)``.
        throw, compile: as for :func:`solve`. A refresh in place of a solve (``WarmStart(refresh=...)``) is not
            compiled.

    Attributes:
        solution: the last :class:`Solution`, detached; ``None`` before the first call, and after one under a
            ``torch.func`` transform. Its ``adjoint`` is filled in when the backward pass has run.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: options that exclude each other, such as a warm start with :class:`Unrolled`, which would have
            hardly any steps to differentiate.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        eval_solver: Solver | None = None,
        budget: Budget | None = None,
        start: nn.Module | None = None,
        warm_start: bool | WarmStart = False,
        rowwise: bool = False,
        batched: bool = True,
        has_aux: bool = False,
        unpack: bool = False,
        throw: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_cell(cell)
        for name, value, base, example in (
            ("solver", solver, Solver, "Anderson()"),
            ("gradient", gradient, Gradient, "Implicit()"),
            ("eval_solver", eval_solver, Solver, "Anderson()"),
            ("budget", budget, Budget, "Budget(steps=(10, 20))"),
            ("start", start, nn.Module, "LearnedStart(network)"),
        ):
            if value is not None and not isinstance(value, base):
                raise TypeError(
                    f"{name} must be a {base.__name__} or None, for example {name}={example}, not {value!r}"
                )
        if not isinstance(warm_start, bool | WarmStart):
            raise TypeError(f"warm_start must be True, False or a WarmStart, not {warm_start!r}")
        if budget is not None:
            if solver is None:
                raise ValueError("budget=... changes a solver: give solver=..., for example Anderson()")
            if compile:
                raise ValueError(
                    "compiled code contains its number of steps, so that a budget would compile it again in every "
                    "training step: leave out compile=True or budget=..."
                )
            budget.solver(solver)
        if has_aux and isinstance(warm_start, WarmStart) and warm_start.refresh is not None:
            raise ValueError(
                "WarmStart(refresh=...) does not support has_aux=True, since it replaces the solve that would return "
                "aux: use WarmStart() without refresh"
            )
        self.cell = cell
        self.start = start
        self.solver = solver
        self.gradient = gradient
        self.eval_solver, self.budget = eval_solver, budget
        self.warm_start = WarmStart() if warm_start is True else warm_start or None
        self._check_gradient(gradient)
        self.rowwise, self.batched, self.throw, self.compiles = rowwise, batched, throw, compile
        self.has_aux, self.unpack = has_aux, unpack
        self.solution: Solution | None = None
        self._solution_hooks: OrderedDict[int, Callable[[Equilibrium, Solution], None]] = OrderedDict()

    @untraced(UNTRACED)
    def forward(
        self,
        *inputs: Any,
        z0: Any = None,
        index: Tensor | None = None,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ) -> Any:
        """The equilibrium at ``inputs``.

        Args:
            inputs: tensors or pytrees that the cell gets in every iteration.
            z0: the initial state; ``None``: the one that the warm start remembers, else that of ``start``, else that of
                the cell's ``initial_state(*inputs)``, else zeros like the first input.
            index: int64 ``[batch]``, the numbers of the samples, for ``WarmStart(samples=...)``.
            solver, gradient: used in place of the layer's own in this call.

        Returns:
            a state like ``z0``, with gradients to the inputs and to the cell's parameters, in eval mode too; with
            ``has_aux=True`` the pair ``(state, aux)``.

        Raises:
            SolveError: a sample went non-finite, unless ``throw=False``.
            TypeError: the number of inputs is not the one that the cell takes (a frequent cause: the initial state was
                given by position).
            ValueError: no initial state is known, the cell does not keep the shape of the state, an ``index`` does not
                fit the warm start, or a wrapper such as ``DistributedDataParallel`` is inside the cell.

        Warns:
            ConvergenceWarning: a sample did not converge.
        """
        solution = self.solve(*inputs, z0=z0, index=index, solver=solver, gradient=gradient)
        return (solution.value, solution.aux) if self.has_aux else solution.value

    @untraced(UNTRACED)
    def solve(
        self,
        *inputs: Any,
        z0: Any = None,
        index: Tensor | None = None,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ) -> Solution:
        """The whole :class:`Solution` at ``inputs``, with gradients: for a loss that needs more than its value.

        Takes the arguments of :meth:`forward` and raises the same errors. Module hooks (also those of ``fully_shard``)
        run with :meth:`forward` only.
        """
        _refuse_wrapped(self.cell)
        start_given = z0 is not None
        if not start_given:
            z0 = self._initial(inputs)
        if not self.unpack:
            _check_count(self.cell, self.cell.forward, 1, inputs)
        elif isinstance(z0, tuple | list):
            _check_count(self.cell, self.cell.forward, len(z0), inputs)
        remembered = False
        if self.warm_start is not None:
            self.warm_start.check(z0, index)
            if not start_given:
                z0, remembered = self.warm_start.recall(z0, index)
        elif index is not None:
            raise ValueError("index needs a layer made with warm_start=WarmStart(samples=...), but this one is not")
        if gradient is None:
            gradient = self.gradient
        else:
            self._check_gradient(gradient)
        chosen: dict[str, Any] = {"solver": solver or self._solver(), "gradient": gradient, "throw": self.throw}
        steps = self._refreshing(inputs, gradient) if remembered else None
        try:
            function, args = self._map(inputs, z0)
            problem = FixedPoint(
                function, batched=self.batched, rowwise=self.rowwise, has_aux=self.has_aux, unpack=self.unpack
            )
            if steps is not None:
                chosen |= refreshing(steps, gradient)
            # handed over in a list, with no name left here, so that the solve can free the start after its first step
            start = [z0]
            del z0
            solution = solve_from(start, problem, args, **chosen, compile=self.compiles and steps is None)
        except (ValueError, RuntimeError) as error:
            if not start_given and _SHAPE.search(str(error)) and not isinstance(error, SolveError):
                self._explain(error, inputs)
            raise
        if any(is_transformed(leaf) for leaf in pytree.tree_leaves(solution.value)):
            self.solution = None  # a transform's tensors die with it
            return solution
        # figures only: with its problem the attribute would keep the graph, and all activations, until the next call
        kept = {name: detached(getattr(solution, name)) for name in ("value", "trajectory")}
        if self.has_aux:
            kept["aux"] = detached(solution.aux)
        self.solution = replace(solution.figures(), **kept)
        if self.warm_start is not None:
            self.warm_start.put(kept["value"], index)
        for hook in tuple(self._solution_hooks.values()):
            hook(self, solution)
        return solution

    def _solver(self) -> Solver | None:
        """The solver of a call that names none."""
        if not self.training:
            return self.eval_solver or self.solver
        if self.budget is None or self.solver is None:
            return self.solver
        return self.budget.take(self.solver)

    def _check_gradient(self, gradient: Gradient | None) -> None:
        """Raise if ``gradient`` cannot be used with the layer's warm start."""
        if self.warm_start is None:
            return
        inner = getattr(gradient, "gradient", gradient)  # WhenUnconverged wraps another estimator
        if isinstance(inner, Reversible | Unrolled):
            raise ValueError(
                f"{type(inner).__name__} differentiates the solver's steps, of which a warm start leaves hardly any: "
                "use gradient=Implicit(), or warm_start=False"
            )
        if self.warm_start.refresh is not None and not refreshes(gradient):
            raise ValueError(
                f"WarmStart(refresh=...) does not support {type(gradient).__name__}, which needs a full solve: use "
                "gradient=NeumannPhantom(steps=..., damping=1.0), OneStep() or Implicit(), or WarmStart() without "
                "refresh"
            )

    def register_solution_hook(self, hook: Callable[[Equilibrium, Solution], None]) -> RemovableHandle:
        """Call ``hook(layer, solution)`` after every solve, outside ``torch.func`` transforms.

        The solution carries the gradient and the problem with the weights and dropout masks of this solve, as a
        regularizer or a monitor of training needs it.

        Returns:
            a handle, whose ``remove()`` removes the hook.
        """
        handle = RemovableHandle(self._solution_hooks)
        self._solution_hooks[handle.id] = hook
        return handle

    def _initial(self, inputs: tuple[Any, ...]) -> Any:
        if self.start is not None:
            return self.start(*inputs)
        initial = getattr(self.cell, "initial_state", None)
        if callable(initial):
            _check_count(self.cell, initial, 0, inputs)
            return initial(*inputs)
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].is_floating_point():
            return torch.zeros_like(inputs[0])
        raise ValueError(
            "the initial state is not known: pass z0=..., or give the cell a method initial_state(*inputs). The "
            "default, zeros like the first input, needs a floating-point tensor as first input"
        )

    def _explain(self, error: Exception, inputs: tuple[Any, ...]) -> None:
        """Raise a clearer error if ``error`` was caused by the default start, zeros like the first input."""
        if self.start is not None or callable(getattr(self.cell, "initial_state", None)):
            return
        z0 = self._initial(inputs)
        try:
            function, args = self._map(inputs, z0)
            with torch.no_grad():
                out = function(z0, *args)
                out = out[0] if self.has_aux else out
            if isinstance(out, Tensor) and out.shape == z0.shape:
                return
            outcome = f"returned {_shown(out)} for it"
        except Exception as failure:
            outcome = f"failed on it ({failure})"
        raise ValueError(
            f"no initial state was given, so the solve began at zeros like the first input, {_shown(z0)}, and the cell "
            f"{outcome}: if its state has another shape, give the cell a method initial_state(*inputs) that returns "
            "one (for example zeros of the state's shape), or call the layer with z0=..."
        ) from error

    def _refreshing(self, inputs: tuple[Any, ...], gradient: Gradient | None) -> int | None:
        """The number of evaluations that replace the solve from a remembered state; ``None``: it is solved."""
        if self.warm_start is None or not self.training or not refreshes(gradient):
            return None
        return self.warm_start.refresh if refreshable(pytree.tree_leaves(inputs)) else None

    def _map(self, inputs: tuple[Any, ...], z0: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The cell with its per-solve weights and masks, and its arguments.

        Weights are captured. Masks are drawn in the first evaluation and captured too, except where samples may leave
        the batch during the solve (``rowwise``), the solve is compiled or transformed, or an enclosing equilibrium
        draws the masks: there they are arguments, whose rows the solver selects together with the state's.
        """
        chains = list(parametrizations(self.cell))
        dropouts = active_dropouts(self.cell)
        if not chains and not dropouts:
            return self.cell, inputs
        options: dict[str, Any]
        if compiled_module(self.cell) is None:
            with without_autocast(_device(z0)):
                options = {"weights": [(chain, chain()) for chain in chains]}
        else:
            # the compiled graph reads the parameters; weights computed outside would get no gradient to them
            options = {"vectors": settled_vectors(chains)}
        free = not any(module.drawing or module.held is not None for module in dropouts)
        if "weights" in options and free and not self.rowwise and not self.compiles and not transforms_running():
            return PerSolve(self.cell, **options, dropouts=dropouts), inputs
        prepared = _Masked(PerSolve(self.cell, **options))
        masks = _masks(prepared, dropouts, (*(z0 if self.unpack else (z0,)), *inputs))
        prepared.dropouts = [module for module, _ in masks]
        return prepared, (*inputs, [mask for _, mask in masks])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "solution": None, "_solution_hooks": OrderedDict()}

    def extra_repr(self) -> str:
        parts = [
            f"{name}={value}"
            for name in ("solver", "gradient", "eval_solver")
            if (value := getattr(self, name)) is not None
        ]
        parts += [f"{name}={value}" for name, usual in _USUAL.items() if (value := getattr(self, name)) != usual]
        return ", ".join(parts)


_USUAL = {"rowwise": False, "batched": True, "has_aux": False, "unpack": False, "throw": True}


class _Masked:
    """The cell with the values of one solve, called with its dropout masks as the last argument.

    Attributes:
        module: the cell.
        dropouts: the dropouts whose masks are arguments.
    """

    def __init__(self, prepared: PerSolve):
        self.prepared, self.module = prepared, prepared.module
        self.dropouts: Sequence[VariationalDropout] = ()

    @contextmanager
    def settled(self) -> Iterator[_Masked]:
        """See :meth:`PerSolve.settled`."""
        with self.prepared.settled() as prepared:
            function = _Masked(prepared)
            function.dropouts = self.dropouts
            yield function

    def __call__(self, *args: Any) -> Any:
        *cell_args, masks = args
        with holding(list(zip(self.dropouts, masks, strict=True))):
            return self.prepared(*cell_args)


def _masks(
    prepared: _Masked, dropouts: Sequence[VariationalDropout], cell_args: Sequence[Any]
) -> list[tuple[VariationalDropout, Tensor]]:
    """The dropouts that the cell uses, with their masks; those without a mask from an enclosing equilibrium draw one
    in an evaluation of the cell made for this purpose."""
    missing = [module for module in dropouts if module.held is None]
    if missing:
        with torch.no_grad(), eagerly(), drawing(missing):
            prepared(*cell_args, ())
    masks = [(module, module.held) for module in dropouts if module.held is not None]
    for module in missing:
        if not module.drawing:  # otherwise the enclosing equilibrium, which is drawing, collects it
            module.held = None
    return masks


def _check_cell(cell: Any) -> None:
    if isinstance(cell, nn.Module):
        return
    kind = f"the class {cell.__name__}" if isinstance(cell, type) else type(cell).__name__
    raise TypeError(
        f"cell must be an nn.Module called as cell(z, *inputs), not {kind}. For a function, call "
        "torchimplicit.solve(FixedPoint(f), z0, x)"
    )


def _check_count(cell: nn.Module, function: Any, states: int, inputs: tuple[Any, ...]) -> None:
    """Raise unless ``function``, a method of the cell, takes ``states`` states and all ``inputs``."""
    bounds = _positional(function)
    if bounds is None or bounds[0] <= states + len(inputs) <= bounds[1]:
        return
    least, most = (n - states for n in bounds)
    takes = (
        f"{least:g}" if least == most else f"{least:g} or more" if most == float("inf") else f"{least:g} to {most:g}"
    )
    what, beside = ("initial_state", "") if not states else ("forward", " beside the state")
    raise TypeError(
        f"the layer was called with {len(inputs)} inputs, but {type(cell).__name__}.{what} takes {takes}{beside}: "
        "Equilibrium gives all its inputs to the cell and to its initial_state. The initial state is not an input: "
        "give it by name, layer(x, z0=z)"
    )


def _positional(function: Any) -> tuple[int, float] | None:
    """The least and the largest number of positional arguments of a method; ``None`` if it cannot be told."""
    code = getattr(getattr(function, "__func__", None), "__code__", None)
    # a decorated method shows the signature of its wrapper, often (*args, **kwargs)
    if code is None or hasattr(function.__func__, "__wrapped__"):
        return None
    most = code.co_argcount - 1
    least = most - len(function.__func__.__defaults__ or ())
    return least, float("inf") if code.co_flags & inspect.CO_VARARGS else most


_SHAPE = re.compile(
    "keep the shape of the state|has the structure|cannot be multiplied|[Ss]izes? of tensors?|size mismatch|channels"
    "|normalized_shape|expanded size|is invalid for input|broadcast|must match|subscript|out of range"
)
"""Phrases in the errors of this library and of PyTorch that a state of the wrong shape causes."""


def _shown(tree: Any) -> str:
    shape = getattr(tree, "shape", None)
    return f"a {type(tree).__name__}" if shape is None else f"shape {tuple(shape)}"


def _device(tree: Any) -> torch.device:
    return next((leaf.device for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)), torch.device("cpu"))


def _refuse_wrapped(cell: nn.Module) -> None:
    """Raise if a parallel wrapper is inside the cell, where it would act in every iteration."""
    for name, module in cell.named_modules():
        kind = next((base.__name__ for base in type(module).__mro__ if base.__name__ in _WRAPPERS), None)
        if kind is not None:
            raise ValueError(
                f"{_WRAPPERS[kind]} was applied inside the cell of an Equilibrium, to {name or 'the cell itself'}. "
                f"{_WHY[kind]}. Apply it to the Equilibrium, or to a module that contains it"
            )


_WRAPPERS = {
    "FSDPModule": "fully_shard",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "DistributedDataParallel": "DistributedDataParallel",
    "DataParallel": "DataParallel",
}
_GATHERED = "Its parameters would be gathered in every iteration, and freed before the backward pass needs them"
_WHY = {
    "FSDPModule": _GATHERED,
    "FullyShardedDataParallel": _GATHERED,
    "DistributedDataParallel": "It would prepare to reduce gradients in every iteration, and miss those of the layer",
    "DataParallel": "It would copy the parameters in every iteration, and the copies would get the gradients",
}

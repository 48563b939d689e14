"""The equilibrium layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from torchimplicit.closure import eagerly, is_transformed
from torchimplicit.compiler import untraced
from torchimplicit.gradients import Gradient, Unrolled
from torchimplicit.members import compiled_module
from torchimplicit.nn.dropout import VariationalDropout, active_dropouts, drawing
from torchimplicit.nn.normalization import fixed, holding, parametrizations, settled_vectors
from torchimplicit.nn.refresh import refreshable, refreshed, refreshes
from torchimplicit.nn.warm_start import WarmStart
from torchimplicit.precision import without_autocast
from torchimplicit.problems import FixedPoint
from torchimplicit.solution import Solution
from torchimplicit.solve import UNTRACED, solve
from torchimplicit.solvers import Solver
from torchimplicit.state import detached


@final
class Equilibrium(nn.Module):
    """The layer whose output is the fixed point ``z = cell(z, x)`` (Bai et al. 2019, arXiv 1909.01377).

    Parametrized weights (:func:`weight_norm`, :func:`spectral_norm`, and those of ``torch.nn.utils.parametrizations``)
    are computed once per solve, and every :class:`VariationalDropout` draws one mask. Only a cell that is compiled
    computes its weights in every evaluation.

    The cell may be compiled (``Equilibrium(torch.compile(cell))``), or the model around the layer; the solve itself is
    a graph break. The layer may stand inside ``DistributedDataParallel``, ``fully_shard``, activation checkpointing and
    another equilibrium's cell.

    Args:
        cell: a module called as ``cell(z, x)``, returning a state like ``z``. If it has a method
            ``initial_state(x)``, that gives the initial state.
        solver, gradient: as for :func:`solve`.
        warm_start: ``True`` or a :class:`WarmStart`: begin at the last solution.
        rowwise: see :class:`FixedPoint`; not true of a cell with batch normalization in training.
        batched: see :class:`FixedPoint`.
        throw, compile: as for :func:`solve`. A cell with parametrized weights (:func:`weight_norm`,
            :func:`spectral_norm`) is not compiled, nor are solves that a warm start carries along (``refresh``).

    Attributes:
        solution: the last :class:`Solution`, detached; ``None`` before the first call, and after one under a
            ``torch.func`` transform. Its ``adjoint`` is filled in when the backward pass has run.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a warm start with :class:`Unrolled`, which would have no steps to differentiate.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        warm_start: bool | WarmStart = False,
        rowwise: bool = False,
        batched: bool = True,
        throw: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        _check_cell(cell)
        for name, value, base, example in (
            ("solver", solver, Solver, "Anderson()"),
            ("gradient", gradient, Gradient, "Implicit()"),
        ):
            if value is not None and not isinstance(value, base):
                raise TypeError(
                    f"{name} must be a {base.__name__} or None, for example {name}={example}, and it is {value!r}"
                )
        if not isinstance(warm_start, bool | WarmStart):
            raise TypeError(f"warm_start must be True, False or a WarmStart, not {warm_start!r}")
        if warm_start and isinstance(getattr(gradient, "gradient", gradient), Unrolled):
            raise ValueError(
                "Unrolled differentiates the steps that are taken, and a warm start leaves hardly any: take "
                "gradient=Implicit(), or warm_start=False"
            )
        if isinstance(warm_start, WarmStart) and warm_start.refresh is not None and not refreshes(gradient):
            raise ValueError(
                f"WarmStart(refresh=...) takes no solve that {type(gradient).__name__} could differentiate: take "
                "gradient=NeumannPhantom(steps=..., damping=1.0), OneStep() or Implicit(), or WarmStart() without "
                "refresh"
            )
        self.cell = cell
        self.solver = solver
        self.gradient = gradient
        self.warm_start = WarmStart() if warm_start is True else warm_start or None
        self.rowwise, self.batched, self.throw, self.compiles = rowwise, batched, throw, compile
        self.solution: Solution | None = None
        self._solution_hooks: OrderedDict[int, Callable[[Equilibrium, Solution], None]] = OrderedDict()

    @untraced(UNTRACED)
    def forward(self, x: Any, z0: Any = None, index: Tensor | None = None) -> Any:
        """The equilibrium at ``x``.

        Args:
            x: the input that the cell gets in every iteration, a tensor or a pytree.
            z0: the initial state; ``None``: the one that the warm start remembers, or what the cell's
                ``initial_state(x)`` gives, or zeros like ``x``.
            index: int64 ``[batch]``: which samples these are, for a :class:`WarmStart` that remembers each.

        Returns:
            a state like ``z0``, with gradients to ``x`` and to the cell's parameters, in eval mode too.

        Raises:
            SolveError: a sample went non-finite, unless ``throw=False``.
            ValueError: bad input, said in words.

        Warns:
            ConvergenceWarning: a sample did not converge.
        """
        return self.solve(x, z0, index).value

    @untraced(UNTRACED)
    def solve(self, x: Any, z0: Any = None, index: Tensor | None = None) -> Solution:
        """The whole :class:`Solution` at ``x``, with gradients: for a loss that needs more than its value.

        Hooks of this module (those of ``fully_shard`` too) run with :meth:`forward` only. The arguments are as there.
        """
        _refuse_wrapped(self.cell)
        given = z0 is not None
        if not given:
            z0 = self._initial(x)
        known = False
        if self.warm_start is not None:
            self.warm_start.check(z0, index)
            if not given:
                z0, known = self.warm_start.recall(z0, index)
        elif index is not None:
            raise ValueError("index is for a layer made with warm_start=WarmStart(samples=...), and this one is not")
        function, args = self._map(x, z0)
        problem = FixedPoint(function, batched=self.batched, rowwise=self.rowwise)
        chosen: dict[str, Any] = {"solver": self.solver, "gradient": self.gradient, "throw": self.throw}
        steps = self._refreshing(args) if known else None
        if steps is None:
            solution = solve(problem, z0, *args, **chosen, compile=self.compiles)
        else:
            solution = refreshed(problem, z0, args, steps=steps, **chosen)
        if any(is_transformed(leaf) for leaf in pytree.tree_leaves(solution.value)):
            self.solution = None  # a transform's tensors die with it
            return solution
        kept = detached(solution.value)
        self.solution = replace(solution.figures(), value=kept, trajectory=detached(solution.trajectory))
        if self.warm_start is not None:
            self.warm_start.put(kept, index)
        for hook in tuple(self._solution_hooks.values()):
            hook(self, solution)
        return solution

    def register_solution_hook(self, hook: Callable[[Equilibrium, Solution], None]) -> RemovableHandle:
        """Call ``hook(layer, solution)`` after every solve, outside ``torch.func`` transforms.

        The solution is the one that carries the gradient, with the problem as it was solved (its weights and dropout
        masks are those of this solve): for a regularizer, or to watch training.

        Returns:
            a handle; its ``remove()`` takes the hook away.
        """
        handle = RemovableHandle(self._solution_hooks)
        self._solution_hooks[handle.id] = hook
        return handle

    def _initial(self, x: Any) -> Any:
        initial = getattr(self.cell, "initial_state", None)
        if callable(initial):
            return initial(x)
        if isinstance(x, Tensor) and x.is_floating_point():
            return torch.zeros_like(x)
        raise ValueError(
            "the initial state is not known: pass z0, or give the cell a method initial_state(x). Only for a "
            "floating-point tensor x is zeros_like(x) taken"
        )

    def _refreshing(self, args: Any) -> int | None:
        """By how many evaluations a remembered state is carried along; ``None``: it is solved for."""
        if self.warm_start is None or not self.training or not refreshes(self.gradient):
            return None
        return self.warm_start.refresh if refreshable(pytree.tree_leaves(args)) else None

    def _map(self, x: Any, z0: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The cell with its per-solve values, and its arguments: masks are arguments, for they carry the batch;
        weights are captured."""
        chains = list(parametrizations(self.cell))
        dropouts = active_dropouts(self.cell)
        if not chains and not dropouts:
            return self.cell, (x,)
        if compiled_module(self.cell) is None:
            with without_autocast(_device(z0)):
                prepared = _PerSolve(self.cell, [(chain, chain()) for chain in chains], [], [])
        else:
            # its graph holds the parameters, so that weights computed outside would cut them off
            prepared = _PerSolve(self.cell, [], settled_vectors(chains), [])
        masks = _masks(prepared, dropouts, z0, x)
        prepared.dropouts = [module for module, _ in masks]
        return prepared, (x, [mask for _, mask in masks])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "solution": None, "_solution_hooks": OrderedDict()}

    def extra_repr(self) -> str:
        parts = [f"{name}={value}" for name in ("solver", "gradient") if (value := getattr(self, name)) is not None]
        parts += [f"{name}={value}" for name, usual in _USUAL.items() if (value := getattr(self, name)) != usual]
        return ", ".join(parts)


_USUAL = {"rowwise": False, "batched": True, "throw": True}


class _PerSolve:
    """The cell with the values of one solve.

    Attributes:
        module: the cell.
        weights: parametrizations and what they give.
        vectors: spectral norms and their vectors, where weights are computed in every evaluation.
        dropouts: those whose masks are arguments.
    """

    def __init__(
        self,
        cell: nn.Module,
        weights: Sequence[tuple[ParametrizationList, Tensor]],
        vectors: Sequence[tuple[nn.Module, Tensor]],
        dropouts: Sequence[VariationalDropout],
    ):
        self.module = cell
        self.weights = weights
        self.vectors = vectors
        self.dropouts = dropouts

    def __call__(self, z: Any, x: Any, masks: Sequence[Tensor]) -> Any:
        with ExitStack() as stack:
            stack.enter_context(fixed(self.weights))
            stack.enter_context(holding(self.vectors))
            stack.enter_context(holding(list(zip(self.dropouts, masks, strict=True))))
            return self.module(z, x)


def _masks(
    prepared: _PerSolve, dropouts: Sequence[VariationalDropout], z0: Any, x: Any
) -> list[tuple[VariationalDropout, Tensor]]:
    """The dropouts that the cell uses, with their masks, drawn by one evaluation where an enclosing equilibrium has
    not done so."""
    missing = [module for module in dropouts if module.held is None]
    if missing:
        with torch.no_grad(), eagerly(), drawing(missing):
            prepared(z0, x, ())
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
        f"cell must be an nn.Module called as cell(z, x), and it is {kind}. For a function, call "
        "torchimplicit.solve(FixedPoint(f), z0, x)"
    )


def _device(tree: Any) -> torch.device:
    return next((leaf.device for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)), torch.device("cpu"))


def _refuse_wrapped(cell: nn.Module) -> None:
    """Raise where a wrapper inside the cell would act in every iteration."""
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
_GATHERED = "Its parameters would be gathered anew in every iteration, and gone when the backward pass needs them"
_WHY = {
    "FSDPModule": _GATHERED,
    "FullyShardedDataParallel": _GATHERED,
    "DistributedDataParallel": "It would prepare to reduce gradients in every iteration, and miss those of the layer",
    "DataParallel": "It would copy the parameters in every iteration, and the copies would get the gradients",
}

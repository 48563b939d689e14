"""The equilibrium layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from torchimplicit.closure import compiled_module
from torchimplicit.gradients import Gradient
from torchimplicit.nn.dropout import active_dropouts, drawing
from torchimplicit.nn.normalization import held_parametrizations, holding
from torchimplicit.nn.warm_start import WarmStart
from torchimplicit.problems import FixedPoint
from torchimplicit.solution import Solution
from torchimplicit.solve import solve
from torchimplicit.solvers import Solver
from torchimplicit.state import detached


@final
class Equilibrium(nn.Module):
    """The layer whose output is the fixed point ``z = cell(z, x)`` (Bai et al. 2019).

    Weights under :func:`weight_norm` or :func:`spectral_norm` are computed once per solve, and every
    :class:`VariationalDropout` draws one mask.

    Args:
        cell: a module called as ``cell(z, x)``, returning a state like ``z``. If it has a method
            ``initial_state(x)``, that gives the initial state.
        solver, gradient: as for :func:`solve`.
        warm_start: ``True`` or a :class:`WarmStart`: begin at the last solution.
        rowwise: see :class:`FixedPoint`; not true of a cell with batch normalization in training.
        batched: see :class:`FixedPoint`.
        throw: as for :func:`solve`.

    Attributes:
        solution: the last :class:`Solution`, its value detached; ``None`` before the first call. Its ``adjoint`` is
            filled in when the backward pass has run.
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
    ) -> None:
        super().__init__()
        if not isinstance(cell, nn.Module):
            raise TypeError(f"cell must be an nn.Module called as cell(z, x), and it is {type(cell).__name__}")
        for name, value, kind in (("solver", solver, Solver), ("gradient", gradient, Gradient)):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__} or None, not {value!r}")
        self.cell = cell
        self.solver = solver
        self.gradient = gradient
        self.warm_start = WarmStart() if warm_start is True else warm_start or None
        self.rowwise, self.batched, self.throw = rowwise, batched, throw
        self.solution: Solution | None = None

    @torch.compiler.disable
    def forward(self, x: Any, z0: Any = None) -> Any:
        """The equilibrium at ``x``.

        Args:
            x: the input that the cell gets in every iteration, a tensor or a pytree.
            z0: the initial state; ``None``: what the cell's ``initial_state(x)`` gives, or zeros like ``x``; with
                ``warm_start``, the last solution where it fits.

        Returns:
            a state like ``z0``, with gradients to ``x`` and to the cell's parameters, in eval mode too.
        """
        _refuse_sharded(self.cell)
        if z0 is None:
            z0 = self._initial(x)
            if self.warm_start is not None:
                z0 = self.warm_start.get(z0)
        function, args = self._map(x, z0)
        solution = solve(
            FixedPoint(function, batched=self.batched, rowwise=self.rowwise),
            z0,
            *args,
            solver=self.solver,
            gradient=self.gradient,
            throw=self.throw,
        )
        kept = detached(solution.value)
        self.solution = replace(solution, value=kept, _attach=None)
        if self.warm_start is not None:
            self.warm_start.put(kept)
        return solution.value

    def _initial(self, x: Any) -> Any:
        if hasattr(self.cell, "initial_state"):
            return self.cell.initial_state(x)
        if isinstance(x, Tensor) and x.is_floating_point():
            return torch.zeros_like(x)
        raise ValueError(
            "the initial state is not known: pass z0, or give the cell a method initial_state(x). Only for a "
            "floating-point tensor x is zeros_like(x) taken"
        )

    def _map(self, x: Any, z0: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The cell with its per-solve values drawn, and its arguments: masks are arguments, for they carry the
        batch; weights are captured."""
        dropouts = active_dropouts(self.cell)
        masks: list[Tensor] = []
        if dropouts:
            with torch.no_grad(), drawing(dropouts):
                self.cell(z0, x)
            drawn = [(module, module.held) for module in dropouts if module.held is not None]
            dropouts, masks = [module for module, _ in drawn], [mask for _, mask in drawn]
            for module in dropouts:
                module.held = None
        # a compiled cell computes its weights itself: holding them would hide their parameters from its graph
        weights = [] if compiled_module(self.cell) is not None else held_parametrizations(self.cell)
        if not dropouts and not weights:
            return self.cell, (x,)
        return _PerSolve(self.cell, weights, dropouts), (x, masks)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "solution": None}

    def extra_repr(self) -> str:
        return f"solver={self.solver}, gradient={self.gradient}, rowwise={self.rowwise}"


class _PerSolve:
    """The cell with the values of one solve."""

    def __init__(self, cell: nn.Module, weights: Sequence[tuple[Any, Tensor]], dropouts: Sequence[Any]):
        self.module = cell
        self.weights = weights
        self.dropouts = dropouts

    def __call__(self, z: Any, x: Any, masks: Sequence[Tensor]) -> Any:
        with ExitStack() as stack:
            stack.enter_context(holding(self.weights))
            stack.enter_context(holding(list(zip(self.dropouts, masks, strict=True))))
            return self.module(z, x)


def _refuse_sharded(cell: nn.Module) -> None:
    sharded = [name or "the cell" for name, module in cell.named_modules() if _is_fsdp(module)]
    if sharded:
        raise ValueError(
            f"fully_shard was applied inside the cell of an Equilibrium ({', '.join(sharded)}): its parameters would be "
            "gathered anew in every iteration, and gone when the backward pass needs them. Apply fully_shard to the "
            "Equilibrium or to a module that contains it"
        )


def _is_fsdp(module: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)



"""A case as the library is given it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import torchimplicit as ti
from tests.truth import cores, styles
from tests.truth.case import Case
from tests.truth.cores import Tensors
from tests.truth.data import DTYPES, Data, strided
from tests.truth.trees import Tree

STEP_SIZE = 0.5
"""Of a joint inference, in units of order one."""
DAMPING = 0.05
"""Of :class:`DampedImplicit`."""
NEUMANN = {"steps": 4, "damping": 0.6}
UNROLLED = {"steps": 3, "damping": 0.7}


class Statement:
    """The library's solution of a case, as a function of its tensors.

    Attributes:
        solution: the last one.
    """

    def __init__(self, case: Case, data: Data):
        self.case, self.data, self.tree = case, data, Tree(case)
        self.dtype = DTYPES[case.dtype]
        self.solution: ti.Solution | None = None
        self.start: Tensor = data.start

    def solve(self, tensors: Tensors) -> Tensor:
        """The state ``[batch, width]``, in units of order one."""
        of_map = {name: t for name, t in tensors.items() if name not in ("w", "N")}

        def solve(f: Any, args: tuple[Any, ...]) -> ti.Solution:
            problem = self._problem(f, tensors)
            return ti.solve(
                problem, self._start(), *args, solver=self._solver(), gradient=self._gradient(), throw=False
            )

        self.solution = styles.stated(self.case.style, self._function(), of_map, solve)
        value = self.solution.value
        if self.case.kind == "joint":
            loss = self.case.unit if self.case.of == "energy" else 1.0
            mu = self.tree.join(value.mu) * self.units() ** 2 / loss
            return torch.cat((self.tree.join(value.z), mu, self.tree.join(value.x)), dim=-1)
        return self.tree.join(value)

    def units(self) -> Tensor:
        """Of the state's numbers, ``[dim]``."""
        return torch.cat(
            [
                torch.full((torch.Size(shape).numel(),), unit, dtype=self.dtype)
                for shape, unit in zip(self.tree.shapes, self.tree.units, strict=True)
            ]
        )

    def _function(self) -> styles.Function:
        case, tree = self.case, self.tree
        unit = case.unit if case.of in ("residual", "energy") else 1.0

        def function(state: Any, *rest: Any, nested: Any = None) -> Any:
            if case.kind == "joint":
                y, tensors = rest
                mapped, loss = cores.joint(tree.join(state), tree.join(y), tensors, case.activation)
                return tree.split(mapped), unit * (loss if case.batched else loss.sum())
            (tensors,) = rest
            core = {"fixed_point": cores.image, "root": cores.root, "minimum": cores.energy}[case.kind]
            out = core(tree.join(state), tensors, case.activation, case.coupling, nested)
            if case.kind == "minimum":
                return unit * (out if case.batched else out.sum())
            return tree.split(unit * out)

        return function

    def _problem(self, f: Any, tensors: Tensors) -> Any:
        case = self.case
        rows = {"batched": case.batched, "rowwise": case.rowwise}
        if case.kind == "fixed_point":
            return ti.FixedPoint(f, **rows)
        if case.kind == "root":
            return ti.Root(f, **rows)
        if case.kind == "minimum":
            constraint = None
            if case.constraint:
                weight = self.tree.split(tensors["w"])
                units = self.tree.split(torch.ones_like(tensors["w"]))
                weight = torch.utils._pytree.tree_map(lambda w, u: w / u**2, weight, units)  # a covector's units
                constraint = ti.LinearEquality(weight, tensors["N"])
            return ti.Minimum(
                f, constraint, **rows, metric=self._metric() if case.metric else None, eliminate=case.eliminate
            )
        shape = (case.dim,) if case.batched else (case.batch, case.dim)
        low, high = (self.tree.split(torch.full(shape, bound, dtype=self.dtype)) for bound in (-0.1, 0.15))
        size = float(self.units()[0])
        constraint = {"box": ti.Box(low, high), "ball": ti.L2Ball(0.2 * size)}.get(case.constraint)
        loss = case.unit if case.of == "energy" else 1.0
        return ti.JointInference(
            lambda z, y, *args: f(z, y, *args)[0],
            lambda z, y, *args: f(z, y, *args)[1],
            STEP_SIZE * size**2 / loss,
            constraint,
            **rows,
        )

    def _metric(self) -> ti.Metric:
        matrix = self.data.metric
        units = self.units().double()
        if not self.case.batched:
            matrix, units = torch.block_diag(*[matrix] * self.case.batch), units.repeat(self.case.batch)
            order = self._order()
            matrix = matrix[order][:, order]
            units = units[order]
        return ti.Metric((matrix / units[:, None] / units[None]).to(self.dtype))

    def _order(self) -> Tensor:
        """Where the numbers of a state that is no batch lie: leaf after leaf."""
        places = torch.arange(self.case.batch * self.case.dim).reshape(self.case.batch, self.case.dim)
        sizes = [torch.Size(shape).numel() for shape in self.tree.shapes]
        return torch.cat([part.flatten() for part in places.split(sizes, dim=1)])

    def _start(self) -> Any:
        start = self.start.to(self.dtype)
        if self.case.noncontiguous:
            start = strided(start)
        if self.case.kind != "joint":
            return self.tree.split(start)
        z, mu, y = start.split(self.case.dim, dim=1)
        if self.case.start in ("zero", "random", "far"):
            return self.tree.split(z), self.tree.split(0.01 * y)
        loss = self.case.unit if self.case.of == "energy" else 1.0
        return ti.JointState(self.tree.split(z), self.tree.split(mu * loss / self.units() ** 2), self.tree.split(y))

    @property
    def forward_tolerance(self) -> float:
        given = self.case.tolerance
        return torch.finfo(self.dtype).eps ** (2 / 3) if given is None else given

    def _solver(self) -> Any:
        case = self.case
        given = {} if case.tolerance is None else {"rtol": case.tolerance}
        if case.solver == "descent":
            energy = case.unit if case.of == "energy" else 1.0
            step = 0.3 * float(self.units()[0]) ** 2 / energy
            return ti.GradientDescent(step_size=step, momentum=0.5, **given)
        if case.solver == "default":
            named = {"fixed_point": "anderson", "root": "newton", "minimum": "lbfgs", "joint": "anderson"}[case.kind]
            return None if case.tolerance is None else _SOLVERS[named](given)
        return _SOLVERS[case.solver](given)

    def _linear(self) -> Any:
        if self.case.linear == "default":
            return None
        given = {} if self.case.tolerance is None else {"rtol": self.case.tolerance}
        kind = {
            "dense": ti.Dense,
            "gmres": ti.GMRES,
            "bicgstab": ti.BiCGStab,
            "lsmr": ti.LSMR,
            "neumann": ti.Neumann,
            "cg": ti.CG,
            "minres": ti.MINRES,
        }[self.case.linear]
        return kind(**given)

    def _gradient(self) -> Any:
        return {
            "implicit": lambda: ti.Implicit(linear_solver=self._linear()),
            "one-step": ti.OneStep,
            "neumann-phantom": lambda: ti.NeumannPhantom(**NEUMANN),
            "unrolled-phantom": lambda: ti.UnrolledPhantom(**UNROLLED),
            "adaptive-phantom": ti.AdaptivePhantom,
            "unbiased-neumann": lambda: ti.UnbiasedNeumann(steps=2, generator=torch.Generator().manual_seed(1)),
            "shared-inverse": ti.SharedInverse,
            "damped-implicit": lambda: ti.DampedImplicit(damping=DAMPING, linear_solver=self._linear()),
        }[self.case.estimator]()


_SOLVERS: dict[str, Any] = {
    "plain": lambda given: ti.FixedPointIteration(max_steps=1000, **given),
    "anderson": lambda given: ti.Anderson(**given),
    "broyden": lambda given: ti.Broyden(**given),
    "newton": lambda given: ti.NewtonKrylov(**given),
    "newton-dense": lambda given: ti.NewtonKrylov(linear_solver=ti.Dense(), **given),
    "newton-bicgstab": lambda given: ti.NewtonKrylov(linear_solver=ti.BiCGStab(), **given),
    "newton-cg": lambda given: ti.NewtonKrylov(linear_solver=ti.CG(), **given),
    "lbfgs": lambda given: ti.LBFGS(memory=4, **given),
}

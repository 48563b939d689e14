"""The suite of linear solvers, for compiled adjoint solves: the systems are those of roots and minima at zero."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.linear import LinearOperator, LinearSolution, LinearSolver
from torchimplicit.problems import Problem
from torchimplicit.testing.linear_suite import LinearSolverSuite

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("interpreted", "compiled_as_declared")]


def root(z: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    return torch.matmul(z[:, None], matrix)[:, 0] - shift  # the Jacobian is the transposed matrix


def energy(z: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    return (0.5 * torch.matmul(z[:, None], matrix)[:, 0] * z - z * shift).sum(dim=1)


def image(z: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    return z - root(z, matrix, shift)


@final
@dataclass(frozen=True, kw_only=True)
class Captured(LinearSolver):
    """The compiled adjoint solve of a problem that has the operator's matrix, by a given solver."""

    inner: LinearSolver
    kind: str

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        return self.inner.tolerances(dtype)

    def solve(self, operator: LinearOperator, b: Tensor, x0: Tensor | None = None) -> LinearSolution:
        matrix, shift = operator.dense(), torch.zeros_like(b).requires_grad_()
        problem: Problem = ti.FixedPoint(image) if self.kind == "contraction" else ti.Root(root)
        solver: Any = ti.Broyden()
        if self.kind == "definite":
            problem, solver = ti.Minimum(energy), ti.GradientDescent(step_size=0.1)
        gradient = ti.Implicit(linear_solver=self.inner)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = ti.solve(
                problem, torch.zeros_like(b), matrix, shift, solver=solver, gradient=gradient, compile=True
            )
            (value,) = torch.autograd.grad(found.value, shift, b)
        return LinearSolution(value, found.adjoint)


class _Compiled(LinearSolverSuite):
    iterative = False
    null = False
    # one of its right-hand sides is not finite: the eager path answers for the other samples
    falls_back: ClassVar[dict[str, str]] = {"test_leaves_its_arguments_alone": ""}
    # of operators that are put together by hand, of starts, of budgets, and of what is said where options are bad
    test_empty_batch = test_rows_that_depend_on_each_other = test_warm_start = None  # type: ignore[assignment]
    test_rows_that_were_promised_not_to_depend_on_each_other = test_costly_restriction = None  # type: ignore[assignment]
    test_a_bad_start_is_left_aside = test_budget = test_looking_less_often = None  # type: ignore[assignment]
    test_host_reads = test_null_vector = test_a_block_is_solved_like_its_parts = None  # type: ignore[assignment]
    test_blocks_that_do_not_fit = test_singular_system_without_a_solution = None  # type: ignore[assignment]
    test_preconditioners = test_an_exact_preconditioner_takes_few_steps = None  # type: ignore[assignment]
    test_records_no_gradient = test_is_a_frozen_value = test_vectors_that_do_not_fit = None  # type: ignore[assignment]
    test_bad_options_fail_when_made = test_half_precision = None  # type: ignore[assignment]
    # products are not counted by rows, and a problem whose matrix is not finite has no solution to differentiate
    test_report = test_a_bad_sample_changes_no_other = None  # type: ignore[assignment]

    @abstractmethod
    def by(self, **options: Any) -> LinearSolver:
        """The method whose solves are compiled."""

    def make(self, **options: Any) -> LinearSolver:
        return Captured(inner=self.by(**options), kind=self.kind)


class TestCompiledBiCGStab(_Compiled):
    def by(self, **options: Any) -> LinearSolver:
        return ti.BiCGStab(**options)


class TestCompiledDense(_Compiled):
    falls_back: ClassVar = dict.fromkeys(  # with a tolerance of its own
        (
            "test_agrees_with_a_direct_solve",
            "test_every_sample_meets_its_own_tolerance",
            "test_one_dimension_and_one_sample",
            "test_zero_right_hand_side",
            "test_samples_do_not_see_each_other",
            "test_leaves_its_arguments_alone",
        ),
        "Dense is not compiled",
    )

    def by(self, **options: Any) -> LinearSolver:
        return ti.Dense(**options)


class TestCompiledCG(_Compiled):
    kind = "definite"

    def by(self, **options: Any) -> LinearSolver:
        return ti.CG(**options)


class TestCompiledMINRES(_Compiled):
    kind = "definite"

    def by(self, **options: Any) -> LinearSolver:
        return ti.MINRES(**options)


class TestCompiledNeumann(_Compiled):
    kind = "contraction"

    def by(self, **options: Any) -> LinearSolver:
        return ti.Neumann(**options)

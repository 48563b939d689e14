"""The shipped suites, with ``compile=True``; what of them is not compiled is declared, and nothing else falls back."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

import torchimplicit as ti
from torchimplicit import LBFGS, Anderson, Broyden, FixedPointIteration, GradientDescent, Implicit, NewtonKrylov
from torchimplicit.gradients import Gradient
from torchimplicit.solvers import Solver
from torchimplicit.testing import GradientSuite
from torchimplicit.testing.gradient_suite import Kind
from torchimplicit.testing.solver_suite import SolverSuite

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::torchimplicit.errors.CaptureWarning"),
    pytest.mark.usefixtures("compiled_as_declared"),
]
SPIED = "keeps tensors that it computes"
KEPT = "keep what compiled code does not"
COUPLED = "depend on each other"
SILENTLY = ""


def _turn(dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dim)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q


TURNS = {dim: _turn(dim) for dim in (1, 8, 16, 24, 40)}


class _Compiled(SolverSuite):
    compile = True
    falls_back: ClassVar = {
        "test_an_empty_batch_is_solved": "the batch is empty",
        "test_a_finished_sample_does_not_move": SPIED,
        "test_finished_samples_leave_the_batch": SPIED,
        "test_a_bad_row_is_named_and_changes_no_other": SPIED,
        "test_a_batch_of_bad_rows_stops_at_once": SPIED,
        "test_given_steps_are_those_of_a_solve_and_are_all_taken": KEPT,
        "test_keeps_the_trajectory": KEPT,
        "test_a_state_that_is_a_tree": KEPT,
        "test_every_leaf_is_judged_by_itself": "structure",  # of a tolerance, which the eager loop does not take either
    }

    def function(self, z: torch.Tensor, x: torch.Tensor, difficulty: torch.Tensor) -> torch.Tensor:
        # as the suite's, but for the matrix, which it draws in every evaluation
        return difficulty[..., None] * torch.tanh(z @ TURNS[x.shape[-1]].to(z)) + x

    def test_asking_less_often_gives_the_same(self) -> None:  # the host does not ask at all
        pass


class TestCompiledAnderson(_Compiled):
    def make(self, **options: Any) -> Solver:
        return Anderson(**options)


class TestCompiledIteration(_Compiled):
    def make(self, **options: Any) -> Solver:
        return FixedPointIteration(**options)


@pytest.mark.usefixtures("interpreted")
class TestCompiledBroyden(_Compiled):
    def make(self, **options: Any) -> Solver:
        return Broyden(**options)


@pytest.mark.usefixtures("interpreted")
class TestCompiledGradientDescent(_Compiled):
    kind = "energy"
    free_of_units = False
    function = SolverSuite.function

    def make(self, **options: Any) -> Solver:
        return GradientDescent(**{"step_size": 0.5, "momentum": 0.5, **options})


@pytest.mark.usefixtures("interpreted")
class TestCompiledLBFGS(_Compiled):
    kind = "energy"
    unrolled = False
    reads, row_cost = 2.5, 1.8  # where the eager loop serves
    function = SolverSuite.function

    def make(self, **options: Any) -> Solver:
        return LBFGS(**options)


@pytest.mark.usefixtures("interpreted")
class TestCompiledNewton(_Compiled):
    # once it is known that samples depend on each other, they are solved as one system
    falls_back: ClassVar = {**_Compiled.falls_back, "test_the_figures_are_those_of_what_is_returned": COUPLED}
    unrolled = False
    half = False
    reads, row_cost = 60.0, 3.9

    def make(self, **options: Any) -> Solver:
        return NewtonKrylov(**options)


@pytest.mark.usefixtures("interpreted")
class TestCompiledNewtonDescent(_Compiled):
    kind = "energy"
    unrolled = False
    half = False
    reads, row_cost = 60.0, 3.9
    function = SolverSuite.function

    def make(self, **options: Any) -> Solver:
        return NewtonKrylov(**options)

    def test_stops_at_once_at_a_solution(self) -> None:  # where the eager loop serves, its search evaluates once more
        pass


@pytest.mark.usefixtures("interpreted")
class _CompiledGradient(GradientSuite):
    compile = True
    # cotangents that are not finite and transforms take the eager path; so do higher orders, after a compiled solve
    falls_back: ClassVar = dict.fromkeys(
        (
            "test_a_cotangent_that_is_not_finite_comes_out",
            "test_hessian_of_torch_func",
            "test_nested_jvp",
            "test_dual_tensors",
            "test_forward_and_reverse_mode_are_transposed",
            "test_functional_gradient",
            "test_jacrev",
            "test_vmap",
            "test_vmap_of_grad",
        ),
        SILENTLY,
    )

    def solver(self, kind: Kind) -> Solver:
        return Anderson(rtol=1e-13) if kind == "fixed_point" else Broyden(rtol=1e-12)


class TestCompiledImplicit(_CompiledGradient):
    def make(self) -> Gradient:
        return Implicit(linear_solver=ti.Dense())


class TestCompiledKrylov(_CompiledGradient):
    kinds = ("fixed_point", "root")

    def make(self) -> Gradient:
        return Implicit(linear_solver=ti.GMRES(rtol=1e-12))


class TestCompiledOneStep(_CompiledGradient):
    bound = 0.7
    second_order = False

    def make(self) -> Gradient:
        return ti.OneStep()


class TestCompiledPhantom(_CompiledGradient):
    # the compiled steps carry any cotangent back
    falls_back: ClassVar = {
        name: reason
        for name, reason in _CompiledGradient.falls_back.items()
        if name != "test_a_cotangent_that_is_not_finite_comes_out"
    }
    bound = 1e-6

    def make(self) -> Gradient:
        return ti.UnrolledPhantom(steps=40, damping=0.75)


class TestCompiledNeumannPhantom(_CompiledGradient):
    bound = 1e-6
    second_order = False

    def make(self) -> Gradient:
        return ti.NeumannPhantom(steps=60, damping=0.9)

"""Warnings once for each solver and line, and the count of all solves."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import torchimplicit as ti


def slow(z: Tensor, x: Tensor) -> Tensor:
    return 0.999 * z.sin() + x


def short(solver: ti.FixedPointIteration | ti.Anderson, x: Tensor) -> ti.Solution:
    return ti.solve(ti.FixedPoint(slow), torch.zeros_like(x), x, solver=solver)


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()


def told(job: Callable[[], object], action: str = "default") -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)  # type: ignore[arg-type]
        job()
    return caught


def test_once_for_each_solver_and_line_though_the_figures_change(x: Tensor) -> None:
    def loop(solver: ti.FixedPointIteration | ti.Anderson) -> None:
        for k in range(1, 6):
            short(solver, k * x.detach())

    caught = told(lambda: loop(ti.FixedPointIteration(max_steps=2)))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "4 MAX_STEPS" in str(caught[0].message)
    assert "said once" in str(caught[0].message)
    assert told(lambda: loop(ti.FixedPointIteration(max_steps=3))) == []  # in another context, too
    assert len(told(lambda: loop(ti.Anderson(max_steps=1)))) == 1  # another solver
    one = told(lambda: [ti.solve(ti.FixedPoint(slow), 0 * x, x, solver=ti.Anderson(max_steps=1)) for _ in range(3)])
    assert len(one) == 1  # another line
    for action, count in (("always", 5), ("ignore", 0)):
        caught = told(lambda: loop(ti.FixedPointIteration(max_steps=2)), action)
        assert len(caught) == count
        assert not any("said once" in str(w.message) for w in caught)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error", ti.ConvergenceWarning)
            with pytest.raises(ti.ConvergenceWarning):
                loop(ti.FixedPointIteration(max_steps=2))


def test_what_is_ignored_at_one_line_is_said_when_it_no_longer_is(x: Tensor) -> None:
    def once() -> None:
        ti.solve(ti.FixedPoint(slow), 0 * x, x, solver=ti.Broyden(max_steps=1))

    assert [len(told(once, action)) for action in ("ignore", "default", "default", "always")] == [0, 1, 0, 1]


def test_statements_of_an_interactive_session_are_lines_of_their_own(x: Tensor) -> None:
    def type_in(steps: int) -> None:
        text = f"for _ in range(3): ti.solve(ti.FixedPoint(slow), 0 * x, x, solver=ti.Anderson(max_steps={steps}))"
        exec(compile(text + "\n", "<stdin>", "single"), {"ti": ti, "slow": slow, "x": x})

    assert [len(told(lambda steps=steps: type_in(steps))) for steps in (1, 2)] == [1, 1]  # type: ignore[misc]


def test_the_backward_pass_warns_once_too(x: Tensor) -> None:
    gradient = ti.Implicit(linear_solver=ti.GMRES(max_steps=1, rtol=1e-12))

    def train() -> None:
        for _ in range(3):
            ti.solve(ti.FixedPoint(slow), 0 * x, 0.1 * x, gradient=gradient).value.square().sum().backward()

    before = ti.solve_counts()
    caught = told(train)
    assert [str(w.message).startswith("the adjoint solve did not converge") for w in caught] == [True]
    assert caught[0].filename == __file__
    counts = ti.solve_counts() - before
    assert (counts.adjoint_solves, counts.adjoint_samples, counts.adjoint_fell_short) == (3, 12, 12)
    assert counts.adjoint_share == 1.0
    assert counts.warnings == {"the adjoint solve did not converge": 3}


def test_counts_of_forward_solves(x: Tensor) -> None:
    easy = torch.tensor([[0.1], [0.1], [0.1], [1.0]], dtype=torch.float64)
    before = ti.solve_counts()
    for solver in (ti.FixedPointIteration(max_steps=30), ti.FixedPointIteration(steps=3)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            solution = ti.solve(ti.FixedPoint(lambda z, x: easy * z.cos() + x), 0 * x, x, solver=solver)
    ti.solve(ti.FixedPoint(lambda z: 0.5 * z, batched=False), torch.ones(3))
    counts = ti.solve_counts() - before
    assert (counts.solves, counts.samples, counts.fell_short) == (3, 9, 1)
    assert counts.share == pytest.approx(1 / 9)
    assert not solution.fell_short.any()
    assert counts.warnings == {"FixedPointIteration did not converge": 1}
    assert (ti.solve_counts() - ti.solve_counts()) == ti.SolveCounts()


def test_counts_of_many_threads(x: Tensor) -> None:
    before = ti.solve_counts()

    def work() -> None:
        for _ in range(20):
            short(ti.FixedPointIteration(max_steps=1), x.detach())

    caught = told(lambda: _together(work, 4))
    assert len(caught) <= 1
    counts = ti.solve_counts() - before
    assert (counts.solves, counts.fell_short) == (80, 320)
    assert counts.warnings["FixedPointIteration did not converge"] == 80


def _together(work: Callable[[], None], count: int) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("problem", "solver", "named", "unnamed"),
    [
        (ti.FixedPoint(lambda z: z * torch.nan), ti.Anderson(), "Broyden, NewtonKrylov", "Anderson,"),
        (ti.FixedPoint(lambda z: z * torch.nan), ti.Broyden(), "Anderson, NewtonKrylov", "damping"),
        (ti.FixedPoint(lambda z: z * torch.nan), ti.FixedPointIteration(), "smaller damping", "step_size"),
        (ti.Root(lambda z: z * torch.nan), ti.NewtonKrylov(), "Anderson, Broyden", "NewtonKrylov,"),
        (ti.Minimum(lambda z: z.sum(1) * torch.nan), ti.LBFGS(), "GradientDescent, NewtonKrylov", "contraction"),
        (ti.Minimum(lambda z: z.sum(1) * torch.nan), ti.GradientDescent(), "a smaller step_size", "spectral_norm"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_advises_other_solvers(problem: ti.FixedPoint, solver: ti.Anderson, named: str, unnamed: str) -> None:
    with pytest.raises(ti.SolveError, match=named) as caught:
        ti.solve(problem, torch.ones(2, 3), solver=solver)
    assert unnamed not in str(caught.value).split("Try ")[1]

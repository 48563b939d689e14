"""The contract of solvers, as a suite of tests that a new one inherits.

Write a ``TestMySolver(SolverSuite)`` in your tests, say in ``make`` how the solver is made, describe it by the class
attributes, and run pytest: the inherited tests hold it, in the loop that all solvers share, to what
:class:`~torchimplicit.solvers.Solver` and :func:`~torchimplicit.solve` promise.
"""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchimplicit._solve import solve
from torchimplicit.errors import ConvergenceWarning, SolveError, UnsupportedDerivativeError
from torchimplicit.gradients import Implicit, Unrolled
from torchimplicit.problems import FixedPoint, Minimum, Problem
from torchimplicit.solution import Solution, Status
from torchimplicit.solvers import Solver

EASY, HARD = 0.2, 0.95
DIM = 8


class Spy:
    """A function that notes the states it is called with, and spoils one row from a given call on.

    Attributes:
        seen: the states, in the order of the calls.
        bad: ``(row, call)``: the row of the result that is NaN from that call on (counted from 0).
    """

    def __init__(self, function: Callable[..., Tensor], bad: tuple[int, int] | None = None):
        self.function = function
        self.bad = bad
        self.seen: list[Any] = []

    def __call__(self, z: Any, *args: Any) -> Tensor:
        self.seen.append(z.detach().clone() if isinstance(z, Tensor) else z)
        out = self.function(z, *args)
        if self.bad is not None and len(self.seen) > self.bad[1]:
            row = torch.arange(out.shape[0], device=out.device).reshape(-1, *(1,) * (out.ndim - 1)) == self.bad[0]
            out = out * torch.where(row, torch.nan, 1.0).to(out)
        return out

    @property
    def rows(self) -> int:
        """How many rows were evaluated."""
        return sum(len(z) for z in self.seen)


class HostReads(TorchFunctionMode):
    """Counts how often tensors are read by the host, each time a wait for the device."""

    READS: ClassVar = {
        Tensor.tolist,
        Tensor.item,
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__index__,
        Tensor.nonzero,
        torch.nonzero,
        Tensor.cpu,
        Tensor.numpy,
    }

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.READS
        return func(*args, **(kwargs or {}))


class SolverSuite(ABC):
    """The conformance suite of solvers.

    Attributes:
        kind: the problems that the solver is for: ``"map"`` (fixed points, here of a contraction) or ``"energy"``.
        unrolled: whether autograd may run through its steps.
        half: whether it works in bfloat16.
        reads: the most reads by the host per step.
        free_of_units: whether the steps on an energy are the same in every unit of it; those of a given size are not.
        per_step: how often a step evaluates the function.
        row_cost: the most rows that the function may see, over the evaluations that the samples' steps take plus one
            each, where finished samples leave the batch.
        compile: whether the solves are compiled (``compile=True``); the function must be one that can be.
    """

    kind: ClassVar[Literal["map", "energy"]] = "map"
    unrolled: ClassVar[bool] = True
    half: ClassVar[bool] = True
    reads: ClassVar[float] = 1.0
    per_step: ClassVar[int] = 1
    row_cost: ClassVar[float] = 1.3
    free_of_units: ClassVar[bool] = True
    device: ClassVar[str] = "cpu"
    compile: ClassVar[bool] = False

    @abstractmethod
    def make(self, **options: Any) -> Solver:
        """The solver, with the options given."""

    # -- problems ------------------------------------------------------------------------------------------------------

    def function(self, z: Tensor, x: Tensor, difficulty: Tensor) -> Tensor:
        """The map, or the energies. ``x``: ``[batch, dim]``; ``difficulty``: ``[batch]``, hard near 1."""
        dim = x.shape[-1]
        if self.kind == "map":
            generator = torch.Generator().manual_seed(dim)
            turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
            return difficulty[..., None] * torch.tanh(z @ turn.to(z)) + x
        ramp = torch.linspace(0, 1, dim, dtype=z.dtype, device=z.device)
        curvature = 1 - difficulty[..., None] * ramp
        return (0.5 * curvature * (z - x) ** 2 + 0.1 * torch.sqrt(1 + z**2)).sum(-1)

    def problem(self, function: Callable[..., Any], **options: Any) -> Problem:
        """The problem of such a function."""
        return FixedPoint(function, **options) if self.kind == "map" else Minimum(function, **options)

    def arguments(
        self, batch: int, dim: int = DIM, hard: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``z0``, ``x`` and the difficulties, those of the rows ``hard`` being :data:`HARD`."""
        generator = torch.Generator().manual_seed(batch + 100 * dim)
        x = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
        difficulty = torch.full((batch,), EASY, dtype=torch.float64)
        difficulty[list(hard)] = HARD
        return torch.zeros_like(x).to(self.device, dtype), x.to(self.device, dtype), difficulty.to(self.device, dtype)

    def defect(self, z: Tensor, x: Tensor, difficulty: Tensor) -> Tensor:
        """``[batch]``: how far ``z`` is from a solution, as the relative tolerance has it, in float64."""
        z, x, difficulty = z.double(), x.double(), difficulty.double()
        if self.kind == "map":
            image = self.function(z, x, difficulty)
            return (image - z).norm(dim=-1) / image.norm(dim=-1)

        def slope(z: Tensor) -> Tensor:
            return torch.func.grad(lambda z: self.function(z, x, difficulty).sum())(z).norm(dim=-1)

        return slope(z) / slope(torch.zeros_like(z))

    def solve(self, function: Any, z0: Any, *args: Any, throw: bool = True, **options: Any) -> Solution:
        """A solve without derivatives; ``rowwise`` and ``batched`` go to the problem, other options to the solver."""
        words = {key: options.pop(key) for key in ("rowwise", "batched") if key in options}
        solver = self.make(**{"rtol": 1e-8, "max_steps": 1000, **options})
        with torch.no_grad():
            return solve(self.problem(function, **words), z0, *args, solver=solver, throw=throw, compile=self.compile)

    # -- it finds the solution -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("batch", "dim"), [(5, DIM), (1, DIM), (3, 1), (2, 40)])
    def test_converges_in_every_sample(self, batch: int, dim: int) -> None:
        z0, *args = self.arguments(batch, dim, hard=(batch - 1,))
        solution = self.solve(self.function, z0, *args)
        assert solution.converged.all(), solution.summary()
        assert (self.defect(solution.value, *args) <= 1.1e-8).all()
        assert (solution.residual <= 1e-8).all()
        assert (solution.steps > 0).all()

    def test_an_empty_batch_is_solved(self) -> None:
        solution = self.solve(self.function, *self.arguments(0))
        assert solution.value.shape == (0, DIM)
        assert solution.status.shape == solution.steps.shape == solution.residual.shape == (0,)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_keeps_the_dtype(self, dtype: torch.dtype) -> None:
        if dtype.itemsize == 2 and not self.half:
            return
        z0, *args = self.arguments(4, dtype=dtype)
        solution = self.solve(self.function, z0, *args, rtol=None)
        assert solution.value.dtype == dtype
        assert solution.converged.all(), solution.summary()
        assert (self.defect(solution.value, *args) <= 3 * torch.finfo(dtype).eps ** (2 / 3)).all()

    def test_stops_at_once_at_a_solution(self) -> None:
        z0, *args = self.arguments(4)
        start = self.solve(self.function, z0, *args, rtol=1e-12).value
        solution = self.solve(self.function, start, *args)
        assert torch.equal(solution.value, start)
        assert solution.converged.all()
        assert not solution.steps.any()
        assert solution.evaluations == 1

    def test_does_not_touch_its_input(self) -> None:
        z0, *args = self.arguments(4)
        before = [t.clone() for t in (z0, *args)]
        self.solve(self.function, z0, *args, rowwise=True)
        assert all(torch.equal(a, b) for a, b in zip(before, (z0, *args), strict=True))

    def test_absolute_tolerance(self) -> None:
        z0, x, difficulty = self.arguments(3)
        loose = self.solve(self.function, z0, x, difficulty, rtol=0.0, atol=1e-2)
        tight = self.solve(self.function, z0, x, difficulty, rtol=0.0, atol=1e-9)
        assert loose.converged.all()
        assert tight.converged.all()
        assert (loose.steps < tight.steps).all()

    # -- units ---------------------------------------------------------------------------------------------------------

    UNITS: ClassVar = {torch.float64: (1e-12, 1e-6, 1e6, 1e12), torch.float32: (1e-6, 1e-3, 1e3, 1e6)}

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_the_unit_of_the_state_changes_nothing(self, dtype: torch.dtype) -> None:
        z0, x, difficulty = self.arguments(4, dtype=dtype)
        z0 = z0 + 0.5 * x

        def stated(unit: float) -> Solution:
            def function(z: Tensor, x: Tensor, difficulty: Tensor) -> Tensor:
                out = self.function(z / unit, x, difficulty)
                # a step along a gradient is in the unit of the energy over that of the state
                return unit * out if self.kind == "map" else unit**2 * out

            return self.solve(function, unit * z0, x, difficulty, rtol=None)

        one = stated(1.0)
        assert one.converged.all()
        for unit in self.UNITS[dtype]:
            other = stated(unit)
            assert torch.equal(other.status, one.status), unit
            assert (other.steps - one.steps).abs().max() <= 1, unit
            accurate = 10 * torch.finfo(dtype).eps ** (2 / 3)
            torch.testing.assert_close(other.value / unit, one.value, rtol=accurate, atol=accurate)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_the_unit_of_the_energy_changes_nothing(self, dtype: torch.dtype) -> None:
        z0, x, difficulty = self.arguments(4, dtype=dtype)
        if self.kind == "map" or not self.free_of_units:
            return
        one = self.solve(self.function, z0, x, difficulty, rtol=None)
        for unit in self.UNITS[dtype]:
            other = self.solve(lambda *args, unit=unit: unit * self.function(*args), z0, x, difficulty, rtol=None)
            assert torch.equal(other.status, one.status), unit
            assert (other.steps - one.steps).abs().max() <= 1, unit

    def test_every_leaf_is_judged_by_itself(self) -> None:
        z0, x, difficulty = self.arguments(3)
        large = 1e6

        def function(z: tuple[Tensor, Tensor], x: Tensor, difficulty: Tensor) -> Any:
            first, second = self.function(z[0] / large, x, difficulty), self.function(z[1], x.flip(1), difficulty)
            return (large * first, second) if self.kind == "map" else large**2 * first + second

        if self.kind == "energy" and not self.free_of_units:
            return
        start = (large * z0, z0)
        solution = self.solve(function, start, x, difficulty)
        assert solution.converged.all(), solution.summary()
        assert (self.defect(solution.value[0] / large, x, difficulty) <= 1e-7).all()
        assert (self.defect(solution.value[1], x.flip(1), difficulty) <= 1e-7).all()
        loose = self.solve(function, start, x, difficulty, rtol=(1e-8, 1e-2))
        assert (loose.steps <= solution.steps).all()
        with pytest.raises(ValueError, match="structure"):
            self.solve(function, start, x, difficulty, rtol=[1e-8, 1e-2])

    # -- samples that depend on each other -----------------------------------------------------------------------------

    def coupled(self, z: Tensor, x: Tensor, difficulty: Tensor) -> Tensor:
        """:meth:`function` of states that lean towards their mean over the batch."""
        return self.function(z + 0.5 * (z.mean(0, keepdim=True) - z), x, difficulty)

    def test_samples_that_depend_on_each_other(self) -> None:
        z0, *args = self.arguments(6, hard=(2,))
        solution = self.solve(self.coupled, z0, *args)
        assert solution.converged.all(), solution.summary()
        z = solution.value
        if self.kind == "map":
            image = self.coupled(z, *args)
            defect = (image - z).norm(dim=1) / image.norm(dim=1)
        else:
            slope = torch.func.grad(lambda z: self.coupled(z, *args).sum())(z)
            defect = slope.norm(dim=1) / (2 * z.norm(dim=1))  # the curvature is below 2
        assert (defect <= 1.1e-8).all()

    def test_the_figures_are_those_of_what_is_returned(self) -> None:
        if self.kind != "map":
            return
        z0, *args = self.arguments(6, hard=(2, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            for budget in (1, 2, 3, 5):
                solution = self.solve(self.coupled, z0, *args, max_steps=budget, rtol=1e-14)
                image = self.coupled(solution.value, *args)
                defect = (image - solution.value).norm(dim=1) / image.norm(dim=1)
                torch.testing.assert_close(solution.residual, defect, rtol=1e-6, atol=1e-12)

    # -- samples are on their own --------------------------------------------------------------------------------------

    def test_every_sample_stops_at_its_own_tolerance(self) -> None:
        z0, x, difficulty = self.arguments(4, hard=(2,))
        together = self.solve(self.function, z0, x, difficulty)
        for i in range(4):
            row = slice(i, i + 1)
            alone = self.solve(self.function, z0[row], x[row], difficulty[row])
            assert abs(int(alone.steps[0]) - int(together.steps[i])) <= 1
            torch.testing.assert_close(together.value[row], alone.value, rtol=1e-6, atol=1e-6)
        assert (together.steps[2] > together.steps[[0, 1, 3]]).all()

    def test_a_finished_sample_does_not_move(self) -> None:
        z0, *args = self.arguments(4, hard=(2,))
        spy = Spy(self.function)
        solution = self.solve(spy, z0, *args)
        assert all(len(z) == 4 for z in spy.seen)
        assert torch.equal(spy.seen[-1][[0, 1, 3]], solution.value[[0, 1, 3]])

    def test_finished_samples_leave_the_batch(self) -> None:
        z0, *args = self.arguments(64, hard=(17,))
        spy = Spy(self.function)
        solution = self.solve(spy, z0, *args, rowwise=True)
        masked = self.solve(self.function, z0, *args)
        assert solution.converged.all()
        torch.testing.assert_close(solution.value, masked.value, rtol=1e-7, atol=1e-7)
        assert (solution.steps - masked.steps).abs().max() <= 1
        assert min(map(len, spy.seen)) == 1
        ideal = int((self.per_step * solution.steps + 1).sum())
        assert spy.rows <= self.row_cost * ideal, f"{spy.rows} rows, ideal {ideal}: {spy.rows / ideal:.2f}"
        assert solution.evaluations * 64 <= 1.3 * ideal

    # -- faults --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("call", [0, 4])
    def test_a_bad_row_is_named_and_changes_no_other(self, call: int) -> None:
        z0, *args = self.arguments(5)
        others = [0, 2, 3, 4]
        good = self.solve(self.function, z0, *args)
        spy = Spy(self.function, bad=(1, call))
        with pytest.warns(ConvergenceWarning, match=r"1 of 5 samples \(1\)"):
            bad = self.solve(spy, z0, *args, throw=False)
        assert bad.status[1] == Status.NONFINITE
        assert torch.isfinite(bad.value).all()
        assert bad.converged[others].all()
        assert torch.equal(bad.value[others], good.value[others])
        assert torch.equal(bad.steps[others], good.steps[others])
        assert len(spy.seen) <= 3 * int(good.steps.max()) + 60, "it keeps the batch running"

    def test_a_bad_row_leaves_the_batch(self) -> None:
        z0, x, difficulty = self.arguments(4)
        good = self.solve(self.function, z0, x, difficulty, rowwise=True)
        spoilt = x.clone()
        spoilt[1] = torch.nan
        with pytest.raises(SolveError, match=r"1 of 4 samples \(1\)") as caught:
            self.solve(self.function, z0, spoilt, difficulty, rowwise=True)
        bad = caught.value.solution
        assert torch.equal(bad.value[1], z0[1])
        torch.testing.assert_close(bad.value[[0, 2, 3]], good.value[[0, 2, 3]], rtol=1e-7, atol=1e-7)

    def test_a_bad_start_is_named(self) -> None:
        z0, *args = self.arguments(3)
        z0[1, 2] = torch.nan
        with pytest.warns(ConvergenceWarning, match="NaN"):
            solution = self.solve(self.function, z0, *args, throw=False)
        assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
        assert solution.steps[1] == 0

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_batch_of_bad_rows_stops_at_once(self, value: float) -> None:
        z0, x, difficulty = self.arguments(3)
        spy = Spy(self.function)
        with pytest.raises(SolveError, match=r"3 of 3 samples \(0, 1, 2\).*Try") as caught:
            self.solve(spy, z0, torch.full_like(x, value), difficulty)
        assert len(spy.seen) == 1
        assert (caught.value.solution.status == Status.NONFINITE).all()
        assert torch.equal(caught.value.solution.value, z0)

    def test_the_step_budget_is_kept_and_said(self) -> None:
        z0, *args = self.arguments(3, hard=(1,))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solution = self.solve(self.function, z0, *args, rtol=1e-14, atol=0.0, max_steps=2)
        assert [w.category for w in caught] == [ConvergenceWarning]
        assert "3 MAX_STEPS" in str(caught[0].message)
        assert caught[0].filename == __file__
        assert (solution.status == Status.MAX_STEPS).all()
        assert (solution.steps == 2).all()
        assert (self.defect(solution.value, *args) < self.defect(z0, *args)).all()

    def test_given_steps_are_those_of_a_solve_and_are_all_taken(self) -> None:
        z0, *args = self.arguments(3, hard=(1,))
        way = self.solve(self.function, z0, *args, keep_trajectory=True).trajectory
        short = min(3, len(way) - 1)
        for steps in (0, short):
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("error", ConvergenceWarning)
                solution = solve(self.problem(self.function), z0, *args, solver=self.make().given(steps))
            assert solution.status.eq(Status.STEPS_TAKEN).all()
            assert solution.steps.eq(steps).all()
            active = (way[short] != way[-1]).any(dim=1)  # in an ordinary solve, one that has stopped stays there
            torch.testing.assert_close(solution.value[active], way[steps][active], rtol=1e-12, atol=1e-12)

    # -- what it keeps and costs ---------------------------------------------------------------------------------------

    def test_keeps_the_trajectory(self) -> None:
        z0, *args = self.arguments(3, hard=(1,))
        solution = self.solve(self.function, z0, *args, keep_trajectory=True)
        steps = int(solution.steps.max())
        assert len(solution.trajectory) == steps + 1
        assert torch.equal(solution.trajectory[0], z0)
        for i, count in enumerate(solution.steps.tolist()):
            assert all(torch.equal(z[i], solution.value[i]) for z in solution.trajectory[count:])
        assert not self.solve(self.function, z0, *args).trajectory

    @pytest.mark.parametrize("every", [3, 50])
    def test_asking_less_often_gives_the_same(self, every: int) -> None:
        z0, *args = self.arguments(5, hard=(1,))
        counts = []
        for check_every in (1, every):
            with HostReads() as reads:
                solution = self.solve(self.function, z0, *args, check_every=check_every)
            counts.append((reads.count, solution))
        (often, first), (seldom, second) = counts
        assert torch.equal(first.value, second.value)
        assert torch.equal(first.steps, second.steps)
        assert torch.equal(first.status, second.status)
        assert seldom < often or self.reads > 1
        assert often <= self.reads * int(first.steps.max()) + 6

    # -- forms of the state --------------------------------------------------------------------------------------------

    def test_a_state_that_is_one_system(self) -> None:
        z0, x, difficulty = self.arguments(1)
        batched = self.solve(self.function, z0, x, difficulty)
        single = self.solve(self.function, z0[0], x[0], difficulty[0], batched=False)
        torch.testing.assert_close(single.value, batched.value[0])
        assert single.status.shape == single.steps.shape == single.residual.shape == ()
        assert single.steps == batched.steps[0]

    def test_a_state_that_is_a_tree(self) -> None:
        z0, *args = self.arguments(4)

        def function(z: dict[str, Any], *args: Tensor) -> Any:
            flat = torch.cat((z["a"].flatten(1), z["b"][0]), dim=1)
            out = self.function(flat, *args)
            return split(out) if self.kind == "map" else out

        def split(flat: Tensor) -> dict[str, Any]:
            return {"a": flat[:, :6].reshape(-1, 2, 3), "b": [flat[:, 6:]]}

        flat = self.solve(self.function, z0, *args)
        tree = self.solve(function, split(z0), *args, keep_trajectory=True)
        # each leaf is judged by itself, which may take a step more or less than the whole
        assert (tree.steps - flat.steps).abs().max() <= 3
        torch.testing.assert_close(tree.value, split(flat.value), rtol=1e-6, atol=1e-6)
        assert tree.trajectory[-1]["a"].shape == (4, 2, 3)

    # -- derivatives ---------------------------------------------------------------------------------------------------

    def test_unrolled(self) -> None:
        z0, x, difficulty = self.arguments(3)
        x.requires_grad_()

        def gradient(method: Any) -> Tensor:
            solver = self.make(rtol=1e-10, max_steps=1000)
            solution = solve(self.problem(self.function), z0, x, difficulty, solver=solver, gradient=method)
            return torch.autograd.grad(solution.value.square().sum(), x)[0]

        if self.unrolled:
            torch.testing.assert_close(gradient(Unrolled()), gradient(Implicit()), rtol=1e-6, atol=1e-6)
        else:
            with pytest.raises(UnsupportedDerivativeError, match="Implicit"):
                gradient(Unrolled())

    def test_a_plain_solve_carries_no_graph(self) -> None:
        z0, x, difficulty = self.arguments(3)
        solution = solve(self.problem(self.function), z0, x, difficulty, solver=self.make(max_steps=1000))
        assert not solution.value.requires_grad

    # -- validation ----------------------------------------------------------------------------------------------------

    def test_is_a_frozen_value(self) -> None:
        solver = self.make()
        assert dataclasses.is_dataclass(solver)
        assert solver == self.make()
        hash(solver)
        with pytest.raises(dataclasses.FrozenInstanceError):
            solver.rtol = 1.0  # type: ignore[misc]
        with pytest.raises(TypeError, match="positional"):
            type(solver)(3)  # type: ignore[call-arg]

    @pytest.mark.parametrize("name", ["rtol", "atol"])
    @pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
    def test_refuses_a_wrong_tolerance(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=rf"\.{name} is .*finite number of at least zero"):
            self.make(**{name: value})

    @pytest.mark.parametrize("name", ["max_steps", "check_every"])
    def test_refuses_a_wrong_count(self, name: str) -> None:
        with pytest.raises(ValueError, match=rf"\.{name} is 0, and must be at least 1"):
            self.make(**{name: 0})
        with pytest.raises(TypeError, match=rf"\.{name} must be an integer, not float"):
            self.make(**{name: 10.0})

    def test_refuses_what_is_no_number(self) -> None:
        with pytest.raises(TypeError, match=r"\.rtol must be a number, not str"):
            self.make(rtol="1e-3")
        with pytest.raises(TypeError, match="unexpected keyword"):
            self.make(tolerance=1e-3)

"""The contract of linear solvers, as a suite of tests that a new one inherits.

Write a ``TestMySolver(LinearSolverSuite)`` in your tests, say in ``make`` how the solver is made, describe it by the
class attributes, and run pytest: the inherited tests hold it to the contract of
:class:`~torchimplicit.linear.LinearSolver`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from torchimplicit.coupling import Coupling
from torchimplicit.linear import Diagonal, Factorized, Inverse, Jacobi, LinearOperator, LinearSolution, LinearSolver
from torchimplicit.linear.base import BlockSolver
from torchimplicit.linear.confirmed import solve_any
from torchimplicit.linear.neumann import Neumann
from torchimplicit.solution import Status


def matrix_operator(matrix: Tensor, tally: list[int] | None = None, **fields: Any) -> LinearOperator:
    """The operator of given matrices ``[batch, dim, dim]``; every product adds its rows to ``tally[0]``."""

    def multiply(a: Tensor, v: Tensor) -> Tensor:
        if tally is not None:
            tally[0] += len(v)
        return (a @ v.unsqueeze(-1)).squeeze(-1)

    def make(rows: Tensor | None) -> LinearOperator:
        a = matrix if rows is None else matrix[rows]
        null = fields.get("null")
        return LinearOperator(
            **{
                "product": lambda v: multiply(a, v),
                "transposed_product": lambda v: multiply(a.mT, v),
                "batch": len(a),
                "dim": a.shape[-1],
                "dtype": a.dtype,
                "device": a.device,
                "restrict": make if rows is None else None,
                **fields,
                "null": null if null is None or rows is None or len(null) == 1 else null[rows],
            }
        )

    return make(None)


def coupled_operator(matrix: Tensor, batch: int, promised: bool = False, **fields: Any) -> LinearOperator:
    """The operator of a matrix ``[batch * dim, batch * dim]`` over all rows of a batch, which depend on each other."""

    def multiply(a: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda v: (v.reshape(*v.shape[:-2], -1) @ a.mT).reshape(v.shape)

    return LinearOperator(
        product=multiply(matrix),
        transposed_product=multiply(matrix.mT),
        block_product=multiply(matrix),
        batch=batch,
        dim=len(matrix) // batch,
        dtype=matrix.dtype,
        device=matrix.device,
        coupling=Coupling(rows=batch, promised=promised),
        **fields,
    )


def residuals(matrix: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """``||b - A y||`` of each sample, ``[batch]``, in float64."""
    matrix, b, y = matrix.double(), b.double(), y.double()
    return torch.linalg.vector_norm(b - (matrix @ y.unsqueeze(-1)).squeeze(-1), dim=-1)


class LinearSolverSuite(ABC):
    """The conformance suite of linear solvers.

    Attributes:
        kind: the systems that the solver is for: ``"general"`` (regular), ``"symmetric"`` (indefinite), ``"definite"``
            (symmetric positive definite), ``"contraction"`` (I - J with a contraction J).
        iterative: whether it takes steps, from ``x0``, with ``max_steps``, ``preconditioner`` and ``check_every``.
        null: whether it takes an operator with a null vector.
        cycle: steps after which it starts again, if it does; that takes a few more looks and restrictions.
    """

    kind: ClassVar[Literal["general", "symmetric", "definite", "contraction"]] = "general"
    iterative: ClassVar[bool] = True
    null: ClassVar[bool] = True
    cycle: ClassVar[int | None] = None
    device: ClassVar[str] = "cpu"

    @abstractmethod
    def make(self, **options: Any) -> LinearSolver:
        """The solver, with the options given."""

    # -- systems -------------------------------------------------------------------------------------------------------

    def matrices(self, batch: int, dim: int, dtype: torch.dtype = torch.float64, spread: float = 0.8) -> Tensor:
        """``[batch, dim, dim]`` of the solver's kind; the larger ``spread`` below 1, the harder."""
        generator = torch.Generator().manual_seed(batch + 1000 * dim)
        noise = torch.randn(batch, dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
        turn = torch.linalg.qr(noise).Q
        ramp = torch.linspace(-spread, spread, dim, dtype=torch.float64)
        eye = torch.eye(dim, dtype=torch.float64)
        if self.kind == "definite":
            a = (turn * (1 + ramp)) @ turn.mT
        elif self.kind == "symmetric":
            sign = torch.where(torch.arange(dim) % 3 == 0, -1.0, 1.0).double()
            a = (turn * (sign * (1 + ramp))) @ turn.mT
        elif self.kind == "contraction":
            a = eye - spread * noise / torch.linalg.matrix_norm(noise, 2, keepdim=True)
        else:
            a = eye - spread * turn
        a = (a + a.mT) / 2 if self.symmetric else a
        return a.to(self.device, dtype)

    @property
    def symmetric(self) -> bool:
        """True if the systems are symmetric."""
        return self.kind in ("symmetric", "definite")

    def operator(self, matrix: Tensor, tally: list[int] | None = None, **fields: Any) -> LinearOperator:
        """The operator of such matrices."""
        return matrix_operator(matrix, tally, **{"symmetric": self.symmetric, **fields})

    def vectors(self, batch: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        """Right-hand sides, ``[batch, dim]``."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, dim, generator=generator, dtype=torch.float64).to(self.device, dtype)

    def solved(self, matrix: Tensor, b: Tensor, solution: LinearSolution, rtol: float, atol: float = 0.0) -> None:
        """Assert that all samples say that they converged, and did."""
        assert solution.report.converged.all(), solution.report.summary()
        bound = atol + rtol * torch.linalg.vector_norm(b.double(), dim=-1)
        assert (residuals(matrix, b, solution.value) <= 1.01 * bound).all()

    # -- accuracy ------------------------------------------------------------------------------------------------------

    def test_agrees_with_a_direct_solve(self) -> None:
        a, b = self.matrices(5, 24), self.vectors(5, 24)
        solution = self.make(rtol=1e-11).solve(self.operator(a), b)
        self.solved(a, b, solution, 1e-11)
        torch.testing.assert_close(solution.value, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_default_tolerance(self, dtype: torch.dtype) -> None:
        a, b = self.matrices(3, 20, dtype), self.vectors(3, 20, dtype)
        solution = self.make().solve(self.operator(a), b)
        assert solution.value.dtype == dtype
        self.solved(a, b, solution, torch.finfo(dtype).eps ** (2 / 3))

    def test_half_precision(self) -> None:
        a, b = self.matrices(3, 12, torch.bfloat16, spread=0.5), self.vectors(3, 12, torch.bfloat16)
        solution = self.make().solve(self.operator(a), b)
        assert solution.value.dtype == torch.bfloat16
        assert solution.report.residual.dtype == torch.bfloat16
        self.solved(a, b, solution, 2 * torch.finfo(torch.bfloat16).eps ** (2 / 3))

    def test_every_sample_meets_its_own_tolerance(self) -> None:
        a, b = self.matrices(6, 20), self.vectors(6, 20)
        b = b * torch.logspace(-6, 6, 6, dtype=b.dtype, device=b.device)[:, None]
        solution = self.make(rtol=1e-6, atol=1e-7).solve(self.operator(a), b)
        self.solved(a, b, solution, 1e-6, 1e-7)

    def test_one_dimension_and_one_sample(self) -> None:
        a, b = self.matrices(1, 1), self.vectors(1, 1)
        self.solved(a, b, self.make(rtol=1e-10).solve(self.operator(a), b), 1e-10)

    def test_empty_batch(self) -> None:
        a, b = self.matrices(1, 4)[:0], self.vectors(1, 4)[:0]
        solution = self.make().solve(self.operator(a), b)
        assert solution.value.shape == (0, 4)
        assert solution.report.status.shape == (0,)

    # -- report --------------------------------------------------------------------------------------------------------

    def test_report(self) -> None:
        a, b, tally = self.matrices(4, 16), self.vectors(4, 16), [0]
        report = (solution := self.make(rtol=1e-8).solve(self.operator(a, tally), b)).report
        assert report.status.dtype == report.steps.dtype == torch.int64
        assert report.status.shape == report.steps.shape == report.residual.shape == (4,)
        true = residuals(a, b, solution.value) / torch.linalg.vector_norm(b, dim=-1)
        torch.testing.assert_close(report.residual, true, rtol=0.05, atol=1e-13)
        assert report.evaluations == tally[0] / 4
        assert (report.steps > 0).all()

    def test_zero_right_hand_side(self) -> None:
        a, b, tally = self.matrices(4, 10), self.vectors(4, 10), [0]
        b[1] = 0
        solution = self.make(rtol=1e-9).solve(self.operator(a), b)
        self.solved(a, b, solution, 1e-9)
        assert not solution.value[1].any()
        solution = self.make(rtol=1e-9).solve(self.operator(a, tally), torch.zeros_like(b))
        assert solution.report.converged.all()
        assert not solution.value.any()
        assert solution.report.residual.eq(0).all()
        if self.iterative:
            assert tally[0] == 0 or self.kind == "general"
            assert solution.report.steps.eq(0).all()

    # -- isolation of the samples --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("where", ["b", "operator", "infinite"])
    @pytest.mark.parametrize("restricted", [False, True])
    def test_a_bad_sample_changes_no_other(self, where: str, restricted: bool) -> None:
        a, b = self.matrices(5, 16), self.vectors(5, 16)
        fields = {} if restricted else {"restrict": None}
        clean = self.make(rtol=1e-9).solve(self.operator(a, **fields), b)
        a, b = a.clone(), b.clone()
        if where == "b":
            b[2, 3] = torch.nan
        elif where == "operator":
            a[2, 4, 4] = torch.nan
        else:
            b[2, 3] = torch.inf
        solution = self.make(rtol=1e-9).solve(self.operator(a, **fields), b)
        others = [0, 1, 3, 4]
        torch.testing.assert_close(solution.value[others], clean.value[others], rtol=1e-12, atol=1e-12)
        assert solution.report.steps[others].equal(clean.report.steps[others])
        assert solution.report.converged[others].all()
        assert solution.report.status[2] == Status.NONFINITE
        # what is not finite goes in and comes out; a matrix that is not leaves the last good iterate
        assert solution.value[2].isnan().all() if where != "operator" else solution.value.isfinite().all()

    def test_samples_do_not_see_each_other(self) -> None:
        a, b = self.mixed(4, 16)
        together = self.make(rtol=1e-9).solve(self.operator(a, restrict=None), b)
        for i in range(4):
            alone = self.make(rtol=1e-9).solve(self.operator(a[i : i + 1]), b[i : i + 1])
            torch.testing.assert_close(together.value[i : i + 1], alone.value, rtol=1e-7, atol=1e-9)
            assert together.report.steps[i] == alone.report.steps[0]

    @pytest.mark.parametrize("where", ["all", "one"])
    def test_rows_that_depend_on_each_other(self, where: str) -> None:
        a, b = self.matrices(1, 24)[0], self.vectors(4, 6)
        if where == "one":
            b[1:] = 0
        for turn in range(2):  # the second time it is known
            operator = coupled_operator(a, 4, symmetric=self.symmetric)
            solution = solve_any(self.make(rtol=1e-9), operator, b)
            self.solved_as_one(a, b, solution)
            assert operator.coupling is not None
            operator.coupling.memory.found = turn == 1
        block = torch.stack((b, b.flip(0), 1e-3 * b))
        from_block = solve_any(self.make(rtol=1e-9), coupled_operator(a, 4, symmetric=self.symmetric), block)
        for one, value in zip(block, from_block.value, strict=True):
            self.solved_as_one(a, one, LinearSolution(value, from_block.report))

    def solved_as_one(self, matrix: Tensor, b: Tensor, solution: LinearSolution) -> None:
        """Assert that the rows, which depend on each other, say that they converged, and did."""
        assert solution.report.converged.all(), solution.report.summary()
        whole, each = torch.linalg.vector_norm(b), torch.linalg.vector_norm(b, dim=1)
        true = residuals(matrix[None], b.reshape(1, -1), solution.value.reshape(1, -1)) / whole
        assert true <= 2e-9
        residual = solution.report.residual  # of the whole, or of each row where the rows have got there by themselves
        assert (residual >= 0.5 * true).all() or torch.linalg.vector_norm(residual * each) >= 0.5 * true * whole

    def test_rows_that_were_promised_not_to_depend_on_each_other(self) -> None:
        if isinstance(self.make(), Neumann):
            pytest.skip("the series of coupled rows is right as it is")
        a, b = self.matrices(1, 24)[0], self.vectors(4, 6)
        with pytest.raises(ValueError, match="rowwise=True"):
            solve_any(self.make(rtol=1e-9), coupled_operator(a, 4, promised=True, symmetric=self.symmetric), b)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_right_hand_sides_of_every_size(self, dtype: torch.dtype) -> None:
        a, b = self.matrices(6, 8, dtype), self.vectors(6, 8, dtype)
        usual = self.make().solve(self.operator(a), b)
        sizes = torch.tensor([1e-37, 1e-30, 1e-23, 1.0, 1e20, 1e30], dtype=dtype)[:, None]
        solution = self.make().solve(self.operator(a), b * sizes)
        assert solution.report.converged.all()
        torch.testing.assert_close(solution.value / sizes, usual.value, rtol=1e-3, atol=1e-3)
        self.solved(
            a, b, LinearSolution(solution.value / sizes, solution.report), 4 * torch.finfo(dtype).eps ** (2 / 3)
        )

    def mixed(self, batch: int, dim: int) -> tuple[Tensor, Tensor]:
        """One hard system among easy ones."""
        a = self.matrices(batch, dim, spread=0.05)
        hard = self.matrices(batch, dim, spread=0.8)
        return torch.cat((a[: batch // 2], hard[:1], a[batch // 2 + 1 :])), self.vectors(batch, dim)

    def test_one_hard_sample_does_not_hold_the_rest(self) -> None:
        if not self.iterative:
            pytest.skip("a direct method takes no steps")
        (a, b), tally, ideal = self.mixed(64, 40), [0], [0]
        solution = self.make(rtol=1e-9).solve(self.operator(a, tally), b)
        self.solved(a, b, solution, 1e-9)
        for i in range(64):
            self.make(rtol=1e-9).solve(self.operator(a[i : i + 1], ideal), b[i : i + 1])
        assert tally[0] <= 1.3 * ideal[0]
        assert solution.report.evaluations == pytest.approx(tally[0] / 64)

    def test_costly_restriction(self) -> None:
        """Setting a restricted operator up is counted, and does not happen at every turn."""
        if not self.iterative:
            pytest.skip("a direct method takes no steps")
        a, b, tally, restrictions = self.matrices(16, 30), self.vectors(16, 30), [0], [0]
        spread = torch.linspace(0.02, 1.0, 16, dtype=a.dtype, device=a.device)[:, None, None]
        eye = torch.eye(30, dtype=a.dtype, device=a.device)
        a = eye + spread * (a - eye)

        def restrict(rows: Tensor) -> LinearOperator:
            tally[0] += len(rows)
            restrictions[0] += 1
            return self.operator(a[rows], tally, restrict=None, setup_rows=len(rows))

        solution = self.make(rtol=1e-10).solve(self.operator(a, tally, restrict=restrict), b)
        self.solved(a, b, solution, 1e-10)
        assert solution.report.evaluations == pytest.approx(tally[0] / 16)
        assert 1 <= restrictions[0] <= 8 + self.cycles(solution)

    # -- starting point and budget -------------------------------------------------------------------------------------

    def test_warm_start(self) -> None:
        a, b = self.matrices(4, 24), self.vectors(4, 24)
        exact = torch.linalg.solve(a, b)
        solver = self.make(rtol=1e-8)
        if not self.iterative:
            self.solved(a, b, solver.solve(self.operator(a), b, exact), 1e-8)
            return
        done = solver.solve(self.operator(a), b, exact)
        assert done.report.steps.eq(0).all()
        assert done.value.equal(exact)
        cold = solver.solve(self.operator(a), b)
        start = exact + 1e-6 * self.vectors(4, 24, seed=2)
        kept = start.clone()
        warm = solver.solve(self.operator(a), b, start)
        self.solved(a, b, warm, 1e-8)
        assert (warm.report.steps <= cold.report.steps).all()
        assert start.equal(kept)

    def test_a_bad_start_is_left_aside(self) -> None:
        a, b = self.matrices(3, 12), self.vectors(3, 12)
        start = torch.zeros_like(b)
        start[1, 0] = torch.nan
        self.solved(a, b, self.make(rtol=1e-8).solve(self.operator(a), b, start), 1e-8)

    def test_budget(self) -> None:
        if not self.iterative:
            pytest.skip("a direct method takes no steps")
        a, b = self.matrices(4, 30), self.vectors(4, 30)
        solution = self.make(rtol=1e-12, max_steps=3).solve(self.operator(a), b)
        assert solution.report.status.eq(Status.MAX_STEPS).all()
        assert solution.report.steps.eq(3).all()
        true = residuals(a, b, solution.value) / torch.linalg.vector_norm(b, dim=-1)
        torch.testing.assert_close(solution.report.residual, true, rtol=1e-6, atol=1e-12)
        assert (true < 1).all()

    @pytest.mark.parametrize("check_every", [2, 7])
    def test_looking_less_often(self, check_every: int) -> None:
        if not self.iterative:
            pytest.skip("a direct method takes no steps")
        a, b = self.mixed(8, 24)
        b[3] = 0
        b[5, 2] = torch.nan
        often = self.make(rtol=1e-9).solve(self.operator(a), b)
        solution = self.make(rtol=1e-9, check_every=check_every).solve(self.operator(a), b)
        keep = [0, 1, 2, 3, 4, 6, 7]
        bound = 1.01e-9 * torch.linalg.vector_norm(b, dim=-1)
        assert solution.report.converged[keep].all()
        assert (residuals(a, b, solution.value)[keep] <= bound[keep]).all()
        assert solution.report.status[5] == Status.NONFINITE
        assert solution.value[keep].isfinite().all()
        assert solution.value[5].isnan().all()
        assert (solution.report.steps - often.report.steps).max() < 2 * check_every

    def test_host_reads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The host reads from the device at most once per step, and a few times at start and end."""
        if not self.iterative:
            pytest.skip("a direct method takes no steps")
        reads = [0]
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__len__", "nonzero"):
            original = getattr(Tensor, name)

            def counted(tensor: Tensor, *args: Any, _original: Any = original, _name: str = name) -> Any:
                reads[0] += _name != "__len__"
                return _original(tensor, *args)

            monkeypatch.setattr(Tensor, name, counted)
        a, b = self.matrices(4, 30), self.vectors(4, 30)
        solution = self.make(rtol=1e-9).solve(self.operator(a, restrict=None), b)
        count = reads[0]
        assert count <= int(solution.report.steps.max()) + 8 + 4 * self.cycles(solution)

    def cycles(self, solution: LinearSolution) -> int:
        """How often the method started again."""
        return int(solution.report.steps.max()) // self.cycle if self.cycle else 0

    # -- singular systems ----------------------------------------------------------------------------------------------

    def test_null_vector(self) -> None:
        if not self.null:
            pytest.skip("not for singular systems")
        a, b = self.matrices(4, 20), self.vectors(4, 20)
        w = self.vectors(4, 20, seed=3)
        w = w / torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        p = torch.eye(20, dtype=a.dtype, device=a.device) - w[:, :, None] * w[:, None]
        singular = p @ a @ p
        solution = self.make(rtol=1e-9).solve(self.operator(singular, null=w), b)
        inside = (p @ b.unsqueeze(-1)).squeeze(-1)
        self.solved(singular, inside, solution, 1e-9)
        assert (solution.value * w).sum(-1).abs().max() < 1e-10
        along = self.make(rtol=1e-9).solve(self.operator(singular, null=w), 3 * w)
        assert along.report.converged.all()
        assert along.value.abs().max() < 1e-10

    @pytest.mark.parametrize("blockwise", [True, False])
    def test_a_block_is_solved_like_its_parts(self, blockwise: bool) -> None:
        """Several right-hand sides at once, where the solver takes them."""
        solver = self.make(rtol=1e-10)
        matrix, (batch, dim) = self.matrices(3, 12), (3, 12)
        operator = self.operator(matrix)
        if blockwise:
            operator = dataclasses.replace(
                operator, block_product=lambda vs: torch.stack([operator.product(v) for v in vs])
            )
        b = torch.stack([self.vectors(batch, dim, seed=seed) for seed in (1, 2, 3, 4)])
        b[1] = 0
        solution = solve_any(solver, operator, b)
        assert solution.report.status.shape == (batch,)
        assert solution.report.converged.all()
        for one, y in zip(b, solution.value, strict=True):
            torch.testing.assert_close(y, solver.solve(operator, one).value, rtol=1e-7, atol=1e-9)
        if not self.null:
            return
        null = torch.zeros(1, dim, dtype=matrix.dtype, device=matrix.device)
        null[0, 0] = 1
        singular = matrix.clone()
        singular[:, 0] = singular[:, :, 0] = 0
        operator = self.operator(singular, null=null)
        for one, y in zip(b, solve_any(solver, operator, b).value, strict=True):
            torch.testing.assert_close(y, solver.solve(operator, one).value, rtol=1e-7, atol=1e-9)

    def test_blocks_that_do_not_fit(self) -> None:
        """A block has three dimensions."""
        solver, operator = self.make(), self.operator(self.matrices(2, 5))
        if not isinstance(solver, BlockSolver):
            pytest.skip("takes one right-hand side at a time")
        for wrong in (self.vectors(2, 5), self.vectors(2, 4)[None], self.vectors(2, 5)[None][:0]):
            with pytest.raises(ValueError, match="shape"):
                solver.solve_block(operator, wrong)

    def test_singular_system_without_a_solution(self) -> None:
        a, b = self.matrices(3, 12), self.vectors(3, 12)
        a[1] = 0
        solution = self.make(rtol=1e-9).solve(self.operator(a), b)
        assert solution.report.status[1] in (Status.BREAKDOWN, Status.MAX_STEPS)
        assert solution.value.isfinite().all()
        assert solution.report.converged[[0, 2]].all()

    # -- preconditioners -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", ["diagonal", "each", "jacobi", "factorized", "factorized each", "function"])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_preconditioners(self, name: str, transposed: bool) -> None:
        if not self.iterative:
            pytest.skip("a direct method takes no preconditioner")
        a, b = self.mixed(8, 20)
        size = 1 + 0.2 * self.vectors(8, 20, seed=4).abs()
        if name in ("diagonal", "factorized"):
            size = size[:1].expand(8, -1)
        a = size[:, :, None] * a * size[:, None, :]
        preconditioner = {
            "diagonal": Diagonal(size[0] ** 2),
            "each": Diagonal(size**2),
            "jacobi": Jacobi(),
            "factorized": Factorized(torch.diag(size[0] ** 2)),
            "factorized each": Factorized(torch.diag_embed(size**2) + 0.01),
            "function": lambda v: v / size**2,
        }[name]
        system = a.mT if transposed else a
        solution = self.make(rtol=1e-9, preconditioner=preconditioner).solve(
            self.operator(system, transposed=transposed), b
        )
        self.solved(system, b, solution, 1e-9)

    def test_an_exact_preconditioner_takes_few_steps(self) -> None:
        """Also of the transposed system, where a non-symmetric preconditioner has to be transposed."""
        if not self.iterative:
            pytest.skip("a direct method takes no preconditioner")
        a, b = self.matrices(6, 16), self.vectors(6, 16)
        if self.kind == "symmetric":
            pytest.skip("the inverse of an indefinite matrix is not definite")
        inverse = torch.linalg.inv(a)
        for preconditioner in (
            lambda v: (inverse @ v.unsqueeze(-1)).squeeze(-1),
            Inverse(
                lambda v: (inverse @ v.unsqueeze(-1)).squeeze(-1), lambda v: (inverse.mT @ v.unsqueeze(-1)).squeeze(-1)
            ),
        ):
            solver = self.make(rtol=1e-9, preconditioner=preconditioner)
            for transposed in (False, True):
                system = a.mT if transposed else a
                solution = solver.solve(self.operator(system, transposed=transposed), b)
                self.solved(system, b, solution, 1e-9)
                assert (solution.report.steps <= 2).all()

    # -- autograd, and use ---------------------------------------------------------------------------------------------

    def test_records_no_gradient(self) -> None:
        a, b = self.matrices(2, 10), self.vectors(2, 10).requires_grad_()
        solution = self.make().solve(self.operator(a), b, torch.zeros_like(b))
        assert b.requires_grad
        assert not solution.value.requires_grad
        assert torch.is_grad_enabled()

    def test_leaves_its_arguments_alone(self) -> None:
        a, b = self.mixed(8, 16)
        b[2] = 0
        b[5, 1] = torch.nan
        start = self.vectors(8, 16, seed=5)
        kept = a.clone(), b.clone(), start.clone()
        for restrict in ({}, {"restrict": None}):
            self.make(rtol=1e-9).solve(self.operator(a, **restrict), b, start)
            for tensor, copy in zip((a, b, start), kept, strict=True):
                torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)

    def test_is_a_frozen_value(self) -> None:
        solver = self.make(rtol=1e-5)
        assert solver == self.make(rtol=1e-5)
        with pytest.raises(dataclasses.FrozenInstanceError):
            solver.rtol = 1.0  # type: ignore[attr-defined]

    def test_bad_options_fail_when_made(self) -> None:
        for error, options in self.bad_options():
            with pytest.raises(error):
                self.make(**options)

    def bad_options(self) -> Iterator[tuple[type[Exception], dict[str, Any]]]:
        """Options that must be refused, each with the error."""
        yield ValueError, {"rtol": -1e-3}
        yield ValueError, {"rtol": float("nan")}
        yield TypeError, {"rtol": "1e-3"}
        yield ValueError, {"atol": -1.0}
        yield TypeError, {"tolerance": 1e-3}
        if self.iterative:
            yield ValueError, {"max_steps": 0}
            yield TypeError, {"max_steps": 2.5}
            yield TypeError, {"max_steps": True}
            yield ValueError, {"check_every": 0}
            yield TypeError, {"preconditioner": "jacobi"}

    def test_vectors_that_do_not_fit(self) -> None:
        a, b = self.matrices(3, 8), self.vectors(3, 8)
        solver, operator = self.make(), self.operator(a)
        for wrong in (b[:2], b[:, :5], b[0], b.float()):
            with pytest.raises(ValueError, match="b "):
                solver.solve(operator, wrong)
        with pytest.raises(ValueError, match="x0 "):
            solver.solve(operator, b, b[:1])

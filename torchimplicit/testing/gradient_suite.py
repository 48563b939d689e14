"""The contract of gradient estimators, as a suite of tests that a new one inherits.

Write a ``TestMyGradient(GradientSuite)`` in your tests, say in ``make`` how the estimator is made, describe it by the
class attributes, and run pytest: the inherited tests hold it to the contract of
:class:`~torchimplicit.gradients.Gradient`. Whatever is declared unsupported must raise
:class:`~torchimplicit.errors.UnsupportedDerivativeError`: nothing is silently wrong.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torchimplicit._solve import solve
from torchimplicit.errors import ConvergenceWarning, UnsupportedDerivativeError
from torchimplicit.gradients import Gradient, Implicit
from torchimplicit.linear import GMRES
from torchimplicit.problems import FixedPoint, Minimum, Problem, Root
from torchimplicit.solution import Solution
from torchimplicit.solvers import LBFGS, Anderson, NewtonKrylov, Solver

Kind = Literal["fixed_point", "root", "minimum"]

BATCH, DIM = 3, 3


def contraction(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """A smooth map of ``z`` (``[..., dim]``) that mixes it with ``x`` (the same shape) nonlinearly."""
    return torch.tanh(z @ w.mT * (1 + 0.2 * torch.sin(x)) + 0.1 * z * x + x)


def convex_energy(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Strictly convex energies ``[...]`` of ``z`` (``[..., dim]``), not quadratic."""
    stretched = z @ w.mT + 0.2 * x
    return (0.5 * z.square() + 0.25 * stretched.pow(4) - z * torch.sin(x) + 0.1 * z.square() * x.square()).sum(-1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||`` over all entries."""
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


@dataclass(frozen=True)
class SuiteCase:
    """A problem with its data: ``function(z, x, w)``, sought from ``z0``.

    Attributes:
        problem: makes the problem of a function (of a state ``[batch, dim]``).
        function: with all it depends on as arguments.
        z0, x: ``[batch, dim]``; ``w``: ``[dim, dim]``.
    """

    problem: Callable[..., Problem]
    function: Callable[..., Tensor]
    solver: Solver
    z0: Tensor
    x: Tensor
    w: Tensor


class GradientSuite(ABC):
    """The conformance suite of gradient estimators.

    Attributes:
        kinds: the problems that the estimator is for.
        bound: the largest relative error of its gradient on the suite's well-conditioned problems.
        second_order: whether derivatives of the gradient are given (within ``10 * bound``); if not, they must raise.
        forward_mode: whether tangents are given.
        consistency: how far the gradient of a sample may depend on the batch that it is in.
        vmap: whether it may be solved under ``torch.func.vmap``.
        vectorized_backward: whether the backward pass alone may be vectorized, as ``jacrev`` does.
        of_z0: whether the solution has a derivative in the initial state.
        compile: whether the solves are compiled (``compile=True``).
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("fixed_point", "root", "minimum")
    bound: ClassVar[float] = 1e-7
    consistency: ClassVar[float] = 1e-7
    second_order: ClassVar[bool] = True
    forward_mode: ClassVar[bool] = True
    vmap: ClassVar[bool] = True
    vectorized_backward: ClassVar[bool] = True
    of_z0: ClassVar[bool] = False
    compile: ClassVar[bool] = False
    device: ClassVar[str] = "cpu"

    @abstractmethod
    def make(self) -> Gradient:
        """The estimator."""

    def solver(self, kind: Kind) -> Solver:
        """The solver of the suite's problems."""
        if kind == "fixed_point":
            return Anderson(rtol=1e-13)
        return NewtonKrylov(rtol=0.0, atol=1e-13) if kind == "root" else LBFGS(rtol=0.0, atol=1e-12)

    # -- problems ------------------------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _quiet(self) -> Iterator[None]:
        """The tolerances are at the end of the dtype: stopping one digit short is no matter here."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            yield

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every test of a case runs on each kind of problem that the estimator is for."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.kinds, indirect=True)

    @pytest.fixture
    def case(self, request: pytest.FixtureRequest) -> SuiteCase:
        """The suite's problem of the kind asked for."""
        return self.of_kind(request.param)

    def of_kind(self, kind: Kind) -> SuiteCase:
        """The suite's problem of this kind."""
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.randn(n, DIM, dtype=torch.float64, generator=generator) for n in (BATCH, DIM))
        w = 0.5 * w / torch.linalg.matrix_norm(w, 2)
        problem: Callable[..., Problem] = FixedPoint
        function = contraction
        if kind == "root":
            problem, function = Root, lambda z, x, w: z - contraction(z, x, w)
        elif kind == "minimum":
            problem, function = Minimum, convex_energy
        z0, x, w = (t.to(self.device) for t in (torch.zeros_like(x), x, w))
        return SuiteCase(problem, function, self.solver(kind), z0, x, w)

    def solved(
        self, case: SuiteCase, x: Tensor, w: Tensor, gradient: Gradient | None = None, captured: bool = False
    ) -> Solution:
        """The case's solution at ``x`` (``[batch, dim]``) and ``w``, given as arguments or captured."""
        gradient = gradient or self.make()
        z0 = case.z0[: len(x)]
        if captured:
            problem = case.problem(lambda z: case.function(z, x, w))
            return solve(problem, z0, solver=case.solver, gradient=gradient, compile=self.compile)
        return solve(case.problem(case.function), z0, x, w, solver=case.solver, gradient=gradient, compile=self.compile)

    def loss(self, case: SuiteCase, x: Tensor, w: Tensor, gradient: Gradient | None = None) -> Tensor:
        """A scalar of the solution whose cotangent is not constant."""
        value: Tensor = self.solved(case, x, w, gradient).value
        return (value.sin() * torch.arange(1, DIM + 1, device=value.device)).sum()

    def gradients(self, case: SuiteCase, captured: bool = False) -> list[Tensor]:
        """Gradients of a loss in ``x`` and ``w``."""
        x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
        value = self.solved(case, x, w, captured=captured).value
        return list(torch.autograd.grad(value.sin().sum(), (x, w)))

    @property
    def exact(self) -> Implicit:
        """The gradient with which the estimate is compared."""
        return Implicit(linear_solver=GMRES(rtol=1e-14))

    # -- first order ---------------------------------------------------------------------------------------------------

    def test_the_solution_is_that_of_a_plain_solve(self, case: SuiteCase) -> None:
        with torch.no_grad():
            plain = self.solved(case, case.x, case.w).value
        assert not plain.requires_grad
        value = self.solved(case, case.x.clone().requires_grad_(), case.w).value
        assert value.requires_grad
        torch.testing.assert_close(value.detach(), plain, rtol=1e-9, atol=1e-9)

    def test_the_gradient_is_within_its_bound(self, case: SuiteCase) -> None:
        for argument in (0, 1):
            inputs = [case.x.clone(), case.w.clone()]
            inputs[argument].requires_grad_()
            x, w = inputs
            (got,) = torch.autograd.grad(self.loss(case, x, w), inputs[argument])
            (expected,) = torch.autograd.grad(self.loss(case, x, w, self.exact), inputs[argument])
            assert got.shape == inputs[argument].shape
            assert relative_error(got, expected) <= self.bound

    def pulled(self, case: SuiteCase, u: Tensor) -> list[Tensor]:
        """The gradients in ``x`` and ``w`` for the cotangent ``u`` ``[batch, dim]``."""
        torch.manual_seed(0)  # an estimator may draw at random
        x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
        return list(torch.autograd.grad(self.solved(case, x, w).value, (x, w), u))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_a_cotangent_that_is_not_finite_comes_out(self, case: SuiteCase, bad: float) -> None:
        """For its sample, and for what all samples share; the other samples' gradients stay what they were."""
        u = torch.linspace(0.5, 1, case.x.numel(), dtype=case.x.dtype, device=case.x.device).reshape(case.x.shape)
        clean, _ = self.pulled(case, u)
        u[1, 0] = bad
        of_x, of_w = self.pulled(case, u)
        assert not of_x[1].isfinite().all()
        assert not of_w.isfinite().all()
        others = [i for i in range(BATCH) if i != 1]
        torch.testing.assert_close(of_x[others], clean[others], rtol=1e-9, atol=1e-12)

    def test_the_gradient_scales_with_the_cotangent(self, case: SuiteCase) -> None:
        """Sample by sample, whatever their sizes."""
        u = torch.linspace(0.5, 1, case.x.numel(), dtype=case.x.dtype, device=case.x.device).reshape(case.x.shape)
        sizes = torch.tensor([1e-180, 1.0, 1e180], dtype=u.dtype, device=u.device)[:, None]
        usual, scaled = self.pulled(case, u)[0], self.pulled(case, u * sizes)[0]
        torch.testing.assert_close(scaled / sizes, usual, rtol=max(10 * self.bound, 1e-6), atol=0.0)

    def test_captured_tensors_are_differentiated_like_arguments(self, case: SuiteCase) -> None:
        for got, expected in zip(self.gradients(case, captured=True), self.gradients(case), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)

    def test_a_captured_tensor_that_was_computed(self, case: SuiteCase) -> None:
        theta = (2 * case.w).requires_grad_()
        value = self.solved(case, case.x, 0.5 * theta, captured=True).value
        (got,) = torch.autograd.grad(value.sin().sum(), theta)
        torch.testing.assert_close(got, 0.5 * self.gradients(case)[1], rtol=1e-9, atol=1e-10)

    def test_module_parameters_are_differentiated(self, case: SuiteCase) -> None:
        module = nn.Linear(DIM, DIM, bias=False, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            module.weight.copy_(case.w)
        problem = case.problem(lambda z, x: case.function(z, x, module.weight))
        solve(
            problem, case.z0, case.x, solver=case.solver, gradient=self.make(), compile=self.compile
        ).value.sin().sum().backward()
        assert module.weight.grad is not None
        torch.testing.assert_close(module.weight.grad, self.gradients(case)[1], rtol=1e-9, atol=1e-10)

    def test_only_what_requires_grad_gets_one(self, case: SuiteCase) -> None:
        x, w = case.x.clone(), case.w.clone().requires_grad_()
        shift = torch.ones(DIM, dtype=torch.int64, device=self.device)

        def function(z: Tensor, x: Tensor, w: Tensor, shift: Tensor, options: dict[str, Any]) -> Tensor:
            return case.function(z, x * options["scale"] + 0 * shift, w)

        problem = case.problem(function)
        options = {"scale": 1.0, "unused": None}
        value = solve(
            problem, case.z0, x, w, shift, options, solver=case.solver, gradient=self.make(), compile=self.compile
        ).value
        value.sin().sum().backward()
        assert x.grad is None
        torch.testing.assert_close(w.grad, self.gradients(case)[1], rtol=1e-9, atol=1e-10)

    def test_a_batch_has_the_gradients_of_its_samples(self, case: SuiteCase) -> None:
        batch = self.gradients(case)[0]
        for i in range(BATCH):
            x = case.x[i : i + 1].clone().requires_grad_()
            (alone,) = torch.autograd.grad(self.solved(case, x, case.w).value.sin().sum(), x)
            torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=self.consistency)

    def test_no_graph_without_grad_mode(self, case: SuiteCase) -> None:
        with torch.no_grad():
            assert not self.solved(case, case.x.clone().requires_grad_(), case.w).value.requires_grad
        assert not self.solved(case, case.x, case.w).value.requires_grad

    def test_the_initial_state_has_a_gradient_only_if_declared(self, case: SuiteCase) -> None:
        z0, x = case.z0.clone().requires_grad_(), case.x.clone().requires_grad_()
        problem = case.problem(case.function)
        value = solve(problem, z0, x, case.w, solver=case.solver, gradient=self.make(), compile=self.compile).value
        grads: Sequence[Tensor | None] = torch.autograd.grad(value.sin().sum(), (x, z0), allow_unused=True)
        assert grads[0] is not None
        assert (grads[1] is not None) == self.of_z0

    def test_the_adjoint_record_belongs_to_the_backward_pass(self, case: SuiteCase) -> None:
        solutions = [self.solved(case, case.x.clone().requires_grad_(), case.w) for _ in range(2)]
        solutions[0].value.sum().backward()
        ran, waiting = (solution.adjoint for solution in solutions)
        assert waiting is None
        assert ran is not None, "an estimator says what its backward pass cost"
        assert ran.status.shape == ran.residual.shape == ran.steps.shape == (BATCH,)
        assert ran.evaluations >= 0

    # -- higher order and other modes ----------------------------------------------------------------------------------

    def agrees(self, supported: bool, compute: Callable[[Gradient], Tensor], bound: float) -> None:
        """``compute`` gives what the exact estimator does, or raises where it is not supported."""
        if supported:
            assert relative_error(compute(self.make()), compute(self.exact)) <= bound
        else:
            with pytest.raises(UnsupportedDerivativeError):
                compute(self.make())

    def test_second_derivatives_by_create_graph(self, case: SuiteCase) -> None:
        def compute(gradient: Gradient) -> Tensor:
            x, w = case.x.clone().requires_grad_(), case.w.clone().requires_grad_()
            first = torch.autograd.grad(self.loss(case, x, w, gradient), (x, w), create_graph=True)
            second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), (x, w))
            return torch.cat([g.flatten() for g in second])

        self.agrees(self.second_order, compute, 10 * self.bound)

    def test_hessian_of_torch_func(self, case: SuiteCase) -> None:
        def compute(gradient: Gradient) -> Tensor:
            return torch.func.hessian(lambda w: self.loss(case, case.x[:1], w, gradient))(case.w)

        self.agrees(self.second_order and self.forward_mode, compute, 10 * self.bound)

    def test_nested_jvp(self, case: SuiteCase) -> None:
        def compute(gradient: Gradient) -> Tensor:
            def along(w: Tensor) -> Tensor:
                return torch.func.jvp(lambda w: self.solved(case, case.x, w, gradient).value, (w,), (case.w,))[1]

            return torch.func.jvp(along, (case.w,), (torch.ones_like(case.w),))[1]

        self.agrees(self.second_order and self.forward_mode, compute, 10 * self.bound)

    def test_dual_tensors(self, case: SuiteCase) -> None:
        def compute(gradient: Gradient) -> Tensor:
            with forward_ad.dual_level():
                w = forward_ad.make_dual(case.w, torch.ones_like(case.w))
                tangent = forward_ad.unpack_dual(self.solved(case, case.x, w, gradient).value).tangent
                assert tangent is not None
                return tangent

        self.agrees(self.forward_mode, compute, self.bound)

    def test_forward_and_reverse_mode_are_transposed(self, case: SuiteCase) -> None:
        if not self.forward_mode:
            return
        u, v = torch.ones_like(case.x), torch.ones_like(case.w)
        forward = torch.func.jvp(lambda w: self.solved(case, case.x, w).value, (case.w,), (v,))[1]
        pull = torch.func.vjp(lambda w: self.solved(case, case.x, w).value, case.w)[1]
        torch.testing.assert_close((forward * u).sum(), (pull(u)[0] * v).sum(), rtol=1e-8, atol=1e-10)

    def test_functional_gradient(self, case: SuiteCase) -> None:
        got = torch.func.grad(lambda w: self.solved(case, case.x, w).value.sin().sum())(case.w)
        torch.testing.assert_close(got, self.gradients(case)[1], rtol=1e-9, atol=1e-10)

    def test_jacrev(self, case: SuiteCase) -> None:
        def compute(gradient: Gradient) -> Tensor:
            return torch.func.jacrev(lambda w: self.solved(case, case.x, w, gradient).value)(case.w)

        self.agrees(self.vectorized_backward, compute, self.bound)

    def test_vmap(self, case: SuiteCase) -> None:
        ws = torch.stack([case.w, 0.5 * case.w.T], dim=1)

        def compute(gradient: Gradient) -> Tensor:
            return torch.func.vmap(lambda w: self.solved(case, case.x, w, gradient).value, in_dims=1)(ws)

        self.agrees(self.vmap, compute, 1e-8)

    @pytest.mark.parametrize("captured", [False, True])
    def test_vmap_of_grad(self, case: SuiteCase, captured: bool) -> None:
        ws = torch.stack([case.w, 0.5 * case.w.T], dim=1)

        def compute(gradient: Gradient) -> Tensor:
            def loss(w: Tensor) -> Tensor:
                return self.solved(case, case.x, w, gradient, captured).value.sin().sum()

            return torch.func.vmap(torch.func.grad(loss), in_dims=1)(ws)

        self.agrees(self.vmap, compute, self.bound)

    # -- the class -----------------------------------------------------------------------------------------------------

    def test_is_a_frozen_keyword_only_dataclass(self) -> None:
        gradient = self.make()
        assert gradient == self.make()
        names: Sequence[Any] = fields(gradient)  # type: ignore[arg-type]
        assert all(field.kw_only for field in names)
        for field in names:
            with pytest.raises(FrozenInstanceError):
                setattr(gradient, field.name, None)

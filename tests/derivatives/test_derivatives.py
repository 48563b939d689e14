"""Direct routines: right to all digits, with the linear solves that they claim, and differentiable in turn."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import torchimplicit as ti
from torchimplicit.derivatives import Derivatives

DIM, INPUTS, BATCH = 5, 3, 4


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_default_dtype(before)


class Net(nn.Module):
    """``tanh(Wz + sin(Ux) + b)`` with a contraction W."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(DIM, DIM)
        self.outer = nn.Linear(INPUTS, DIM, bias=False)
        with torch.no_grad():
            self.inner.weight.mul_(0.6 / torch.linalg.matrix_norm(self.inner.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + torch.sin(self.outer(x)))


def unrolled(net: Net, x: Tensor, steps: int = 120) -> Tensor:
    z = x.new_zeros(*x.shape[:-1], DIM)
    for _ in range(steps):
        z = net(z, x)
    return z


def solved(net: Net, x: Tensor) -> ti.Solution:
    return ti.solve(ti.FixedPoint(net), x.new_zeros(len(x), DIM), x, solver=ti.Anderson(rtol=1e-14, max_steps=100))


SOLVERS = [None, ti.GMRES(rtol=1e-13), ti.Dense(rtol=1e-12)]


@pytest.fixture(params=SOLVERS, ids=["default", "gmres", "dense"])
def case(request):
    net, x = Net(), torch.randn(BATCH, INPUTS)
    return net, x, Derivatives(solved(net, x), linear_solver=request.param)


def close(a, b, tolerance: float = 1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def loss(z: Tensor, x: Tensor) -> Tensor:
    return (z**3).sum() + (z.sum(1) * x.square().sum(1)).sum()


class TestValues:
    def test_tangent(self, case):
        net, x, at = case
        d = torch.randn_like(x)
        close(at.tangent((d,)), torch.func.jvp(lambda x: unrolled(net, x), (x,), (d,))[1])
        assert at.solves == {"plain": 1, "transposed": 0}

    def test_tangents(self, case):
        net, x, at = case
        d = torch.randn(7, *x.shape)
        expected = torch.stack([torch.func.jvp(lambda x: unrolled(net, x), (x,), (one,))[1] for one in d])
        close(at.tangents((d,)), expected)
        assert at.solves == {"plain": 7, "transposed": 0}

    def test_along(self, case):
        net, x, at = case
        d = torch.randn_like(x)
        expected = []
        fn = lambda e: unrolled(net, x + e * d)  # noqa: E731
        for _ in range(3):
            fn = lambda e, fn=fn: torch.func.jvp(fn, (e,), (torch.ones(()),))[1]  # noqa: E731
            expected.append(fn(torch.zeros(())))
        for one, other in zip(at.along((d,), order=3), expected, strict=True):
            close(one, other, 1e-8)
        assert at.solves == {"plain": 3, "transposed": 0}

    def test_second(self, case):
        net, x, at = case
        d, e = torch.randn_like(x), torch.randn_like(x)

        def slope(x: Tensor) -> Tensor:
            return torch.func.jvp(lambda x: unrolled(net, x), (x,), (d,))[1]

        close(at.second((d,), (e,)), torch.func.jvp(slope, (x,), (e,))[1])
        assert at.solves == {"plain": 3, "transposed": 0}
        same = (d,)
        close(at.second(same, same), torch.func.jvp(slope, (x,), (d,))[1])
        assert at.solves["plain"] == 5

    def test_jacobian(self, case):
        net, x, at = case
        expected = torch.func.vmap(torch.func.jacrev(lambda x: unrolled(net, x)))(x)
        close(at.jacobian(), expected)
        assert at.solves == {"plain": INPUTS, "transposed": 0}

    def test_gradient(self, case):
        net, x, at = case
        close(at.gradient(loss), torch.func.grad(lambda x: loss(unrolled(net, x), x))(x))
        assert at.solves == {"plain": 0, "transposed": 1}

    def test_hessian_vector(self, case):
        net, x, at = case
        v = torch.randn_like(x)
        gradient = torch.func.grad(lambda x: loss(unrolled(net, x), x))
        first, second = at.hessian_vector(loss, v)
        expected = torch.func.jvp(gradient, (x,), (v,))
        close(first, expected[0])
        close(second, expected[1])
        assert at.solves == {"plain": 1, "transposed": 2}, "two beyond the gradient's one"

    def test_hessian(self, case):
        net, x, at = case
        expected = torch.func.vmap(torch.func.hessian(lambda x: loss(unrolled(net, x)[None], x[None])))(x)
        close(at.hessian(loss), expected)
        assert at.solves == {"plain": INPUTS, "transposed": 1}

    def test_second_derivatives(self, case):
        net, x, at = case
        expected = torch.func.vmap(torch.func.hessian(lambda x: unrolled(net, x)))(x)
        close(at.second_derivatives(), expected)
        # 6 pairs against 5 components of the state
        assert at.solves == {"plain": INPUTS, "transposed": DIM}

    def test_second_derivatives_by_pairs(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)
        problem = ti.FixedPoint(lambda z, t: net(z, t * x))
        t = torch.rand(BATCH)
        at = Derivatives(ti.solve(problem, torch.zeros(BATCH, DIM), t[:, None], solver=ti.Anderson(rtol=1e-14)))
        expected = torch.func.vmap(torch.func.hessian(lambda t, x: unrolled(net, t * x)))(t, x)
        close(at.second_derivatives().reshape(BATCH, DIM), expected)
        assert at.solves == {"plain": 2, "transposed": 0}

    def test_an_argument_that_all_samples_share(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)
        shift = torch.randn(2)

        def moved(z: Tensor, shift: Tensor) -> Tensor:
            return net(z, x + shift[0] * torch.arange(INPUTS) + shift[1] ** 2)

        at = Derivatives(ti.solve(ti.FixedPoint(moved), torch.zeros(BATCH, DIM), shift, solver=ti.Anderson(rtol=1e-14)))

        def value(shift: Tensor) -> Tensor:
            return unrolled(net, x + shift[0] * torch.arange(INPUTS) + shift[1] ** 2)

        close(at.jacobian(), torch.func.jacrev(value)(shift))
        close(at.second_derivatives(), torch.func.hessian(value)(shift))
        cube = lambda z, shift: (z**3).sum() * shift.sum()  # noqa: E731
        close(at.hessian(cube), torch.func.hessian(lambda s: cube(value(s), s))(shift))
        close(at.gradient(cube), torch.func.grad(lambda s: cube(value(s), s))(shift))


class TestProblems:
    def test_root(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)
        root = ti.Root(lambda z, x: 3 * (net(z, x) - z))
        at = Derivatives(ti.solve(root, torch.zeros(BATCH, DIM), x, solver=ti.NewtonKrylov(rtol=1e-14)))
        d = torch.randn_like(x)
        reference = Derivatives(solved(net, x))
        close(at.tangent((d,)), reference.tangent((d,)))
        close(at.second((d,), (d,)), reference.second((d,), (d,)))

    def test_minimum_under_a_constraint(self):
        target = torch.randn(BATCH, DIM)
        weight = torch.rand(DIM) + 0.5

        def energy(p: Tensor, a: Tensor) -> Tensor:
            return ((p - a.sin() * target) ** 2).sum(1) + 0.1 * (p**4).sum(1)

        problem = ti.Minimum(energy, constraint=ti.LinearEquality(weight, torch.tensor(1.0)))
        a = torch.rand(BATCH, 1)

        def value(a: Tensor) -> Tensor:
            return ti.solve(problem, torch.ones(BATCH, DIM), a, solver=ti.LBFGS(rtol=1e-13, max_steps=500)).value

        at = Derivatives(ti.solve(problem, torch.ones(BATCH, DIM), a, solver=ti.LBFGS(rtol=1e-13, max_steps=500)))
        d, h = torch.ones_like(a), 1e-5
        (first, second) = at.along((d,), order=2)
        close(first, (value(a + h * d) - value(a - h * d)) / (2 * h), 1e-6)
        close((first * weight).sum(1), torch.zeros(BATCH))
        h = 1e-3
        close(second, (value(a + h * d) - 2 * at.value.detach() + value(a - h * d)) / h**2, 1e-4)
        cube = lambda z, a: (z**3).sum()  # noqa: E731
        numeric = (cube(value(a + h * d), a) - 2 * cube(at.value, a) + cube(value(a - h * d), a)) / h**2
        close(at.hessian(cube).sum(), numeric.detach(), 1e-4)

    def test_one_system(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)
        whole = ti.FixedPoint(net, batched=False)
        at = Derivatives(ti.solve(whole, torch.zeros(BATCH, DIM), x, solver=ti.Anderson(rtol=1e-14)))
        close(at.jacobian(), torch.func.jacrev(lambda x: unrolled(net, x))(x))
        close(at.hessian(loss), torch.func.hessian(lambda x: loss(unrolled(net, x), x))(x))

    def test_a_state_of_several_tensors(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)

        def pair(z, x):
            both = net(torch.cat([z["a"], z["b"]], 1), x)
            return {"a": both[:, :2], "b": both[:, 2:]}

        z0 = {"a": torch.zeros(BATCH, 2), "b": torch.zeros(BATCH, DIM - 2)}
        at = Derivatives(ti.solve(ti.FixedPoint(pair), z0, x, solver=ti.Anderson(rtol=1e-14)))
        reference = Derivatives(solved(net, x))
        close(at.jacobian()["b"], reference.jacobian()[:, 2:])
        close(at.tangents((torch.ones(2, *x.shape),))["a"], reference.tangents((torch.ones(2, *x.shape),))[..., :2])


class TestGradients:
    """What is returned can be differentiated further."""

    def physics(self, z: Tensor, first: Tensor, second: Tensor | None = None) -> Tensor:
        out = (first * z).sum() + first.square().sum()
        return out if second is None else out + (second * first).sum()

    def expected(self, net: Net, x: Tensor, d: Tensor, order: int) -> tuple[Tensor, ...]:
        def value(e: Tensor) -> Tensor:
            return unrolled(net, x + e * d)

        def first(e: Tensor) -> Tensor:
            return torch.func.jvp(value, (e,), (torch.ones(()),))[1]

        zero = torch.zeros(())
        second = torch.func.jvp(first, (zero,), (torch.ones(()),))[1] if order == 2 else None
        return torch.autograd.grad(self.physics(value(zero), first(zero), second), tuple(net.parameters()))

    def test_a_loss_on_a_tangent_takes_three_solves(self, case):
        net, x, at = case
        d = torch.randn_like(x)
        (first,) = at.along((d,))
        grads = torch.autograd.grad(self.physics(at.value, first), tuple(net.parameters()))
        assert at.solves == {"plain": 1, "transposed": 2}
        for one, other in zip(grads, self.expected(net, x, d, 1), strict=True):
            close(one, other, 1e-8)

    def test_a_loss_on_a_second_derivative_takes_five(self, case):
        net, x, at = case
        d = torch.randn_like(x)
        first, second = at.along((d,), order=2)
        grads = torch.autograd.grad(self.physics(at.value, first, second), tuple(net.parameters()))
        assert at.solves == {"plain": 2, "transposed": 3}
        for one, other in zip(grads, self.expected(net, x, d, 2), strict=True):
            close(one, other, 1e-8)

    def test_a_block_of_tangents(self, case):
        net, x, at = case
        d = torch.randn(2, *x.shape)
        block = at.tangents((d,))
        total = block.pow(2).sum() + at.value.sum()
        grads = torch.autograd.grad(total, tuple(net.parameters()), retain_graph=True)
        assert at.solves == {"plain": 2, "transposed": 3}
        separate = sum(at.tangent((one,)).pow(2).sum() for one in d) + at.value.sum()
        for one, other in zip(grads, torch.autograd.grad(separate, tuple(net.parameters())), strict=True):
            close(one, other)

    def test_twice(self, case):
        net, x, at = case
        d = torch.randn_like(x)
        weight = net.inner.weight
        (first,) = at.along((d,))
        (gradient,) = torch.autograd.grad(first.pow(2).sum(), weight, create_graph=True)
        (again,) = torch.autograd.grad(gradient.pow(2).sum(), weight)
        slope = torch.func.jvp(lambda x: unrolled(net, x), (x,), (d,))[1]
        (gradient,) = torch.autograd.grad(slope.pow(2).sum(), weight, create_graph=True)
        (expected,) = torch.autograd.grad(gradient.pow(2).sum(), weight)
        close(again, expected, 1e-7)

    def test_twice_through_a_second_derivative(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)
        d = torch.randn_like(x).requires_grad_()
        ends = (net.inner.weight, d)
        zero, one = torch.zeros(()), torch.ones(())

        def slope(e: Tensor) -> Tensor:
            return torch.func.jvp(lambda e: unrolled(net, x + e * d), (e,), (one,))[1]

        def again(second: Tensor) -> tuple[Tensor, ...]:
            first = torch.autograd.grad(second.pow(2).sum(), ends, create_graph=True)
            return first + torch.autograd.grad(sum(g.pow(2).sum() for g in first), ends)

        found = again(Derivatives(solved(net, x)).along((d,), order=2)[1])
        for one_found, other in zip(found, again(torch.func.jvp(slope, (zero,), (one,))[1]), strict=True):
            close(one_found, other, 1e-7)

    def test_the_direction_has_a_gradient_too(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)
        d = torch.randn_like(x).requires_grad_()
        third = Derivatives(solved(net, x)).along((d,), order=3)[-1]
        (got,) = torch.autograd.grad(third.sum(), d)
        # of degree 3 in the direction
        close((got * d).sum(), 3 * third.sum(), 1e-7)

    def test_directions_under_vmap(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)
        at, d = Derivatives(solved(net, x)), torch.randn(3, *x.shape)
        close(torch.func.vmap(lambda one: at.tangent((one,)))(d), at.tangents((d,)))

    def test_an_estimate_that_solved_it_does_not_matter(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)
        layer = ti.nn.Equilibrium(net, solver=ti.Anderson(rtol=1e-14), gradient=ti.OneStep())
        at = Derivatives(layer.solve(x, z0=torch.zeros(BATCH, DIM)))
        grads = torch.autograd.grad(at.value.pow(2).sum(), tuple(net.parameters()))
        expected = torch.autograd.grad(unrolled(net, x).pow(2).sum(), tuple(net.parameters()))
        for one, other in zip(grads, expected, strict=True):
            close(one, other)


class TestSharing:
    def test_the_function_is_linearized_once(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)
        solution = solved(net, x)
        calls = []
        handle = net.register_forward_hook(lambda *_: calls.append(1))
        at = Derivatives(solution)
        made = len(calls)
        at._solved(torch.ones(BATCH, DIM))
        at._solved(torch.ones(3, BATCH, DIM), transposed=True)
        handle.remove()
        assert made == 2, "one call to find what is captured, one for the tape"
        assert len(calls) == made

    def test_derivatives_along_a_direction_share_one_evaluation(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)
        at = Derivatives(solved(net, x))
        calls = []
        handle = net.register_forward_hook(lambda *_: calls.append(1))
        first, second = at.along((torch.ones_like(x),), order=2)
        torch.autograd.grad((first * second).sum() + at.value.sum(), tuple(net.parameters()))
        handle.remove()
        assert len(calls) == 1

    def test_weights_that_changed_in_between_are_noticed(self):
        net, x = Net(), torch.randn(BATCH, INPUTS)
        at = Derivatives(solved(net, x))
        (first,) = at.along((torch.ones_like(x),))
        with torch.no_grad():
            net.inner.weight.mul_(0.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            first.sum().backward()


class TestFaults:
    def test_a_kept_solution_holds_no_problem(self):
        layer = ti.nn.Equilibrium(Net())
        layer(torch.randn(2, INPUTS), z0=torch.zeros(2, DIM))
        with pytest.raises(ValueError, match=r"layer\.solve\(x\)"):
            Derivatives(layer.solution)

    def test_a_map_that_is_linear_in_pieces(self):
        weight = 0.1 * torch.randn(DIM, DIM)
        problem = ti.FixedPoint(lambda z, x: torch.relu(z @ weight + x))
        at = Derivatives(ti.solve(problem, torch.zeros(BATCH, DIM), torch.rand(BATCH, DIM)))
        d = torch.ones(BATCH, DIM)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            at.tangent((d,))
        with pytest.warns(ti.SmoothnessWarning, match=r"uses relu, which is piecewise linear.*tanh"):
            at.along((d,), order=2)

    @pytest.mark.parametrize(
        "solver", [None, ti.Dense(), ti.GMRES(), ti.LSMR()], ids=["default", "dense", "gmres", "lsmr"]
    )
    def test_a_singular_jacobian_has_a_named_status(self, solver):
        def shifted(z: Tensor, x: Tensor) -> Tensor:  # every first component is a solution, where x has none
            return z * torch.tensor([1.0, 0.5]) + torch.cat([x - x.detach(), x], 1)

        x = torch.rand(3, 1).requires_grad_()
        implicit = ti.Implicit(linear_solver=solver)
        solution = ti.solve(ti.FixedPoint(shifted), torch.zeros(3, 2), x, gradient=implicit)
        at = Derivatives(solution, linear_solver=solver)
        with pytest.warns(ti.ConvergenceWarning, match="BREAKDOWN"):
            slope = at.tangent((torch.ones_like(x),))
        assert at.report is not None
        assert (at.report.status == ti.Status.BREAKDOWN).all(), "the tangent's solve"
        total = slope.sum() + at.value.sum()
        at._record.report = None
        with pytest.warns(ti.ConvergenceWarning, match="BREAKDOWN"):
            (gradient,) = torch.autograd.grad(total, x)
        assert (at.report.status == ti.Status.BREAKDOWN).all(), "the adjoint solve"
        with pytest.warns(ti.ConvergenceWarning, match="BREAKDOWN"):
            (composed,) = torch.autograd.grad(solution.value.sum(), x)
        assert solution.adjoint is not None
        assert (solution.adjoint.status == ti.Status.BREAKDOWN).all(), "the adjoint solve of the layer"
        assert all(t.isfinite().all() for t in (slope, gradient, composed))

    @pytest.mark.parametrize(
        ("direction", "complaint"),
        [
            ((), "one entry for each of the problem's 1 arguments"),
            ((None,), "no argument moves"),
            ((torch.ones(2),), r"entry 0 is torch.float\d+ of shape \[2\]"),
            (([torch.ones(BATCH, INPUTS)],), "has the structure"),
        ],
    )
    def test_directions_that_do_not_fit(self, direction, complaint):
        at = Derivatives(solved(Net(), torch.randn(BATCH, INPUTS)))
        with pytest.raises(ValueError, match=complaint):
            at.tangent(direction)

    def test_other_arguments_that_make_no_sense(self):
        at = Derivatives(solved(Net(), torch.randn(BATCH, INPUTS)))
        with pytest.raises(ValueError, match="at least 1"):
            at.along((torch.ones(BATCH, INPUTS),), order=0)
        with pytest.raises(ValueError, match="arguments 0 to 0"):
            at.jacobian(argument=1)
        with pytest.raises(ValueError, match="must return a scalar"):
            at.gradient(lambda z, x: z)
        with pytest.raises(ValueError, match="vector has shape"):
            at.hessian_vector(loss, torch.ones(2))

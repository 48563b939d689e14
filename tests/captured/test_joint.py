"""Joint inference as compiled code, against the eager loop."""

from __future__ import annotations

import warnings

import pytest
import torch

import torchimplicit as ti
from torchimplicit import Anderson, FixedPointIteration, JointInference
from torchimplicit.captured import compilations
from torchimplicit.errors import CaptureWarning, ConvergenceWarning

DIM, INPUTS, SEEN = 4, 3, 4

pytestmark = pytest.mark.usefixtures("interpreted")


def tensors(batch):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w, u, head, wanted = (
        0.5 * torch.linalg.qr(drawn(DIM, DIM)).Q,
        drawn(DIM, INPUTS),
        drawn(SEEN, DIM),
        drawn(batch, SEEN),
    )
    return w.requires_grad_(), u.requires_grad_(), head, wanted.requires_grad_()


def both(solver, gradient=None, batch=5, wanted_too=(), **options):
    w, u, head, wanted = tensors(batch)

    def loss(z, x, wanted):
        return (z @ head.T - wanted).square().sum(1) + 0.1 * x.square().sum(1)

    start = torch.zeros(batch, DIM, dtype=torch.float64), torch.zeros(batch, INPUTS, dtype=torch.float64)
    problem = JointInference(lambda z, x, _: torch.tanh(z @ w.T + x @ u.T), loss, **{"step_size": 0.03, **options})
    found = []
    for compile in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error", CaptureWarning)
            warnings.simplefilter("ignore", ConvergenceWarning)
            solution = ti.solve(problem, start, wanted, solver=solver, gradient=gradient, compile=compile)
            z, mu, x = solution.value
            total = x.sin().sum() + z.sum() + mu.square().sum() if gradient is None else loss(z, x, wanted).sum()
            found.append((solution, torch.autograd.grad(total, (w, u, wanted, *wanted_too))))
    return found


def near(one, two, tolerance):
    for a, b in zip(two[0].value, one[0].value, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(two[1], one[1], strict=True):
        torch.testing.assert_close(a, b, rtol=100 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize(
    "solver",
    [Anderson(memory=2, max_steps=12), pytest.param(FixedPointIteration(max_steps=25), marks=pytest.mark.long)],
)
def test_the_steps_and_the_best_iterate_are_those_of_the_eager_loop(solver):
    one, two = both(solver, damping=(0.8, 0.6, 1.0))
    near(one, two, 1e-9)
    assert torch.equal(two[0].steps, one[0].steps)
    assert torch.equal(two[0].status, one[0].status)
    torch.testing.assert_close(two[0].residual, one[0].residual, rtol=1e-6, atol=1e-12)


def test_the_solution_in_a_box_and_its_derivative_in_the_bound():
    high = torch.full((5, INPUTS), 0.2, dtype=torch.float64).requires_grad_()
    one, two = both(
        Anderson(memory=3, rtol=1e-10, max_steps=500), wanted_too=(high,), constraint=ti.Box(low=-0.1, high=high)
    )
    assert two[0].converged.all()
    near(one, two, 1e-7)
    assert two[1][-1].abs().max() > 0
    assert ((two[0].value.x <= 0.2 + 1e-12) & (two[0].value.x >= -0.1 - 1e-12)).all()


@pytest.mark.long
def test_a_ball_a_step_for_each_sample_and_the_envelope():
    size = torch.tensor([0.03, 0.02, 0.04, 0.03, 0.03], dtype=torch.float64)
    solver = Anderson(memory=3, rtol=1e-10, max_steps=500)
    near(*both(solver, gradient=ti.Envelope(), constraint=ti.L2Ball(0.3), step_size=size), 1e-7)


@pytest.mark.long
def test_other_batches_are_served_by_the_same_code():
    before = compilations()
    for batch in (4, 5):
        near(*both(FixedPointIteration(max_steps=9), batch=batch), 1e-9)
    assert compilations() == before + 1


def test_a_schedule_of_steps_is_left_to_the_eager_loop():
    with pytest.raises(CaptureWarning, match="schedule"):
        both(FixedPointIteration(max_steps=3), step_size=lambda step: 0.01)


@pytest.mark.parametrize("constraint", [None, "box"])
def test_broyden_takes_the_steps_of_the_eager_loop_in_any_unit(constraint):
    weight = 0.5 * torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    target = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.6]], dtype=torch.float64)

    def f(z, x, shift, unit):
        return unit[0] * torch.tanh(z / unit[0] @ weight + x / unit[1] + shift)

    def loss(z, x, shift, unit):
        return unit[2] * ((z / unit[0] - target).square().sum(1) + 0.1 * (x / unit[1]).square().sum(1))

    def found(compile, *units):
        unit = torch.tensor(units, dtype=torch.float64)
        shift = torch.full((2, 3), 0.2, dtype=torch.float64, requires_grad=True)
        start = torch.full((2, 3), 0.1, dtype=torch.float64)
        size = 0.1 * unit[1] ** 2 / unit[2]
        box = None if constraint is None else ti.Box(-0.2 * unit[1], 0.2 * unit[1])
        with warnings.catch_warnings():
            warnings.simplefilter("error", CaptureWarning)
            problem = JointInference(f, loss, size, constraint=box)
            solver = ti.Broyden(max_steps=300, atol=1e-300)
            given = start * unit[0], start * unit[1]
            solution = ti.solve(problem, given, shift, unit, solver=solver, compile=compile)
            assert solution.converged.all(), solution.summary()
            (slope,) = torch.autograd.grad((solution.value.x / unit[1]).sum(), shift)
        return solution, solution.value.x.detach() / unit[1], slope

    before, (one, x, slope) = compilations(), found(False, 1.0, 1.0, 1.0)
    for units in ((1.0, 1.0, 1.0), (1e-30, 1.0, 1.0), (1e30, 1.0, 1.0), (1.0, 1e-30, 1.0), (1.0, 1.0, 1e30)):
        two, *compiled = found(True, *units)
        assert torch.equal(two.steps, one.steps)
        assert two.evaluations == one.evaluations - 1  # by which the eager loop looks at samples beside each other
        torch.testing.assert_close(two.residual, one.residual, rtol=1e-2, atol=1e-14)
        torch.testing.assert_close(compiled, [x, slope], rtol=1e-9, atol=1e-10)
    assert compilations() == before + 1

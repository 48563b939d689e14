"""What each estimator claims of itself, against its own formula."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import torchimplicit as ti
from tests.truth import cores, modes
from tests.truth.case import Case
from tests.truth.data import Data
from tests.truth.reference import Reference

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients_of(case: Case, gradient: ti.gradients.Gradient, **solver: float) -> tuple[list[torch.Tensor], Reference]:
    """Of a minimum, in every tensor, and the reference at the solution."""
    data, reference = Data(case), Reference(case, Data(case))
    leaves = modes.leaves_of(data.tensors)
    names = [name for name in leaves if name not in ("w", "N")]
    constraint = ti.LinearEquality(leaves["w"], leaves["N"]) if case.constraint else None
    solution = ti.solve(
        ti.Minimum(lambda z, t: cores.energy(z, t, case.activation, "", None), constraint),
        data.start,
        {name: leaves[name] for name in names},
        solver=ti.LBFGS(rtol=0.0, atol=1e-13),
        gradient=gradient,
        throw=False,
    )
    found = torch.autograd.grad(modes.loss_of(solution.value, data), [leaves[name] for name in names])
    assert reference.find(solution.value.detach(), data.tensors)
    return list(found), reference


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
@pytest.mark.parametrize("constraint", ["", "shared", "own"])
@pytest.mark.parametrize("number", range(3))
def test_the_error_of_equilibrium_propagation_is_of_second_order(number, constraint):
    case = Case(number=number, kind="minimum", constraint=constraint)
    errors = []
    for nudge in (2e-2, 1e-2):
        got, reference = gradients_of(case, ti.EquilibriumPropagation(nudge=nudge))
        data = reference.data
        expected = modes.differentiated("backward", reference.exact, data.tensors, data)
        errors.append(max(float((g - e).norm() / (e.norm() + 1e-3)) for g, e in zip(got, expected)))
    assert errors[1] < 1e-3
    assert 3.0 < errors[0] / errors[1] < 5.0, errors


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
@pytest.mark.parametrize("number", range(3))
def test_one_sided_it_is_of_first_order(number):
    errors = []
    for nudge in (2e-3, 1e-3):
        gradient = ti.EquilibriumPropagation(nudge=nudge, symmetric=False)
        got, reference = gradients_of(Case(number=number, kind="minimum"), gradient)
        expected = modes.differentiated("backward", reference.exact, reference.data.tensors, reference.data)
        errors.append(max(float((g - e).norm() / (e.norm() + 1e-3)) for g, e in zip(got, expected)))
    assert 1.7 < errors[0] / errors[1] < 2.3, errors


@pytest.mark.parametrize("options", [{"survival": 0.6}, {"power": 2.5}])
def test_the_number_of_terms_is_drawn_as_it_is_weighted(options):
    # given the number of terms the estimate is a fixed sum, which the random cases check: what is left is its law
    estimator = ti.UnbiasedNeumann(steps=2, generator=torch.Generator().manual_seed(0), **options)
    draws = torch.tensor([estimator.draw() for _ in range(20_000)])
    for term in range(12):
        chance = estimator.reached(term)
        assert float((draws > term).double().mean()) == pytest.approx(chance, abs=5 * math.sqrt(0.25 / len(draws)))


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_unrolling_is_the_hand_written_loop_sample_by_sample(number, damping):
    case = Case(number=number, gain=0.7)
    data = Data(case)
    data.start.normal_(generator=torch.Generator().manual_seed(number))

    def loss(z):
        return modes.loss_of(z, data)

    leaves = modes.leaves_of(data.tensors)
    solution = ti.solve(
        ti.FixedPoint(lambda z, t: cores.image(z, t, case.activation, "", None)),
        data.start,
        leaves,
        solver=ti.FixedPointIteration(rtol=1e-6, damping=damping),
        gradient=ti.Unrolled(),
    )
    got = torch.autograd.grad(loss(solution.value), list(leaves.values()))
    z = data.start
    for step in range(int(solution.steps.max())):
        moved = z + damping * (cores.image(z, leaves, case.activation, "", None) - z)
        z = torch.where((step < solution.steps)[:, None], moved, z)
    expected = torch.autograd.grad(loss(z), list(leaves.values()))
    torch.testing.assert_close(solution.value, z)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("constraint", ["", "box", "ball"])
@pytest.mark.parametrize("number", range(3))
def test_the_envelope_is_exact_for_the_inner_loss(number, constraint):
    case = Case(number=number, kind="joint", dim=3, constraint=constraint, gain=0.3)
    grads = [_joint(case, gradient) for gradient in (ti.Envelope(), ti.Implicit(linear_solver=ti.Dense()))]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


def test_the_envelope_refuses_another_loss():
    case = Case(number=0, kind="joint", dim=3, gain=0.3)
    with pytest.raises(ValueError, match="outer loss"):
        _joint(case, ti.Envelope(), outer=lambda state: state.z.sum())


@pytest.mark.parametrize("number", range(3))
def test_the_fixed_input_is_the_equilibrium_alone(number):
    case = Case(number=number, kind="joint", dim=3, gain=0.3)
    got = _joint(case, ti.FixedInput(linear_solver=ti.Dense()), outer=lambda state: state.z.pow(2).sum())
    data = Data(case)
    solved = _solved(case, data.tensors, ti.Implicit()).value
    leaves = modes.leaves_of(data.tensors)
    z = solved.z
    for _ in range(200):
        z = cores.joint(z, solved.x, leaves, case.activation)[0]
    expected = torch.autograd.grad(z.pow(2).sum(), list(leaves.values()), allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if e is None else e, rtol=1e-6, atol=1e-8)


def _joint(case, gradient, outer=None):
    data = Data(case)
    leaves = modes.leaves_of(data.tensors)
    solution = _solved(case, leaves, gradient)
    if outer is None:
        # through the solution alone: that the inner loss depends on b by itself is not the estimator's matter
        held = {name: t.detach() for name, t in leaves.items()}
        loss = cores.joint(solution.value.z, solution.value.x, held, case.activation)[1].sum()
    else:
        loss = outer(solution.value)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves.values(), strict=True)]


def _solved(case, tensors, gradient):
    low, high = torch.full((case.dim,), -0.1).double(), torch.full((case.dim,), 0.15).double()
    constraint = {"box": ti.Box(low, high), "ball": ti.L2Ball(0.2)}.get(case.constraint)
    zeros = torch.zeros(case.batch, case.dim, dtype=torch.float64)
    return ti.solve(
        ti.JointInference(
            lambda z, y, t: cores.joint(z, y, t, case.activation)[0],
            lambda z, y, t: cores.joint(z, y, t, case.activation)[1],
            0.5,
            constraint,
        ),
        (zeros, zeros),
        tensors,
        solver=ti.Anderson(rtol=1e-11, max_steps=500),
        gradient=gradient,
    )


@pytest.mark.parametrize("refine", [0, 3])
def test_the_shared_inverse_is_never_worse_than_one_step(refine):
    for number in range(5):
        case = Case(number=number, gain=0.9, estimator="shared-inverse", solver="broyden")
        data = Data(case)
        leaves = modes.leaves_of(data.tensors)
        solution = ti.solve(
            ti.FixedPoint(lambda z, t, case=case: cores.image(z, t, case.activation, "", None)),
            data.start,
            leaves,
            solver=ti.Broyden(rtol=1e-12),
            gradient=ti.SharedInverse(refine=refine),
        )
        (g,) = torch.autograd.grad(modes.loss_of(solution.value, data), [leaves["p"]])
        reference = Reference(replace(case, estimator="implicit"), data)
        assert reference.find(solution.value.detach(), data.tensors)
        cotangent = data.cotangent + reference.state
        off, one = (
            (reference.matrix.mT @ v.flatten() - cotangent.flatten()).reshape(cotangent.shape).norm(dim=1)
            for v in (g, cotangent)
        )
        assert (off <= one * (1 + 1e-9)).all()
        torch.testing.assert_close(solution.adjoint.residual, off / cotangent.norm(dim=1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("damping", [0.5, 0.8])
@pytest.mark.parametrize("number", range(5))
def test_inverse_steps_lead_to_the_exact_derivative(number, damping):
    case = Case(number=number, gain=0.6)
    data = Data(case)
    leaves = modes.leaves_of(data.tensors)
    solution = ti.solve(
        ti.FixedPoint(lambda z, t, case=case: cores.image(z, t, case.activation, "", None)),
        data.start,
        leaves,
        solver=ti.ReversibleIteration(damping=damping, rtol=1e-14, max_steps=500),
        gradient=ti.Reversible(),
    )
    got = torch.autograd.grad(modes.loss_of(solution.value, data), list(leaves.values()))
    reference = Reference(case, data)
    assert reference.find(solution.value.detach(), data.tensors)
    expected = modes.differentiated("backward", reference.exact, data.tensors, data)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-9)

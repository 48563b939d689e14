"""The best of several starts."""

from __future__ import annotations

import pytest
import torch

import torchimplicit as ti
from torchimplicit.nn import Vote, best_of, least_residual

torch.manual_seed(0)
X = torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64)


def wells(z, x):
    """Three fixed points in every row: two attract, near -1 and 1, and x shifts them."""
    return torch.tanh(3 * z + 0.1 * x)


def solved(z0, x=X, **options):
    options = {"solver": ti.FixedPointIteration(rtol=1e-12), **options}
    return ti.solve(ti.FixedPoint(wells, rowwise=True), z0, x, **options)


def starts(*values):
    return [torch.full_like(X, value) for value in values]


def most_negative(solutions):
    return torch.stack([solution.value[:, 0] for solution in solutions]).argmin(dim=0)


def test_every_sample_keeps_its_own_best_start():
    mixed = torch.tensor([[-1.0], [1.0], [-1.0]], dtype=torch.float64)
    with torch.no_grad():
        best = best_of(solved, [mixed, -mixed], choose=most_negative)
    assert best.index.tolist() == [0, 1, 0]
    assert (best.value < 0).all()
    assert best.converged.all()
    assert best.evaluations == sum(solved(z0).evaluations for z0 in (mixed, -mixed))


@pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")
def test_the_least_residual_is_the_default_and_what_failed_comes_last():
    short = ti.FixedPointIteration(steps=3)
    near = solved(starts(1.0)[0]).value
    with torch.no_grad():
        best = best_of(lambda z0: solved(z0, solver=short, throw=False), [*starts(0.1), near, *starts(torch.nan)])
    assert best.index.tolist() == [1, 1, 1]
    assert best.residual.max() < 1e-10


@pytest.mark.parametrize("gradient", [ti.Implicit(), ti.Unrolled(), ti.UnrolledPhantom(steps=2, damping=1.0)])
def test_the_gradient_is_that_of_the_chosen_solutions(gradient):
    x = X.clone().requires_grad_()
    best = best_of(lambda z0: solved(z0, x, gradient=gradient), starts(0.5, -0.5), choose=most_negative)
    (found,) = torch.autograd.grad(best.value.sum(), x)
    (alone,) = torch.autograd.grad(solved(starts(-0.5)[0], x, gradient=gradient).value.sum(), x)
    torch.testing.assert_close(found, alone)


def test_a_vote_is_won_by_the_answer_that_most_agree_on():
    vote = Vote(decode=lambda z: (z > 0).long())
    with torch.no_grad():
        best = best_of(solved, starts(-1.0, 0.4, 2.0), choose=vote)
    assert (best.value > 0).all()
    solutions = [solved(z0) for z0 in starts(-1.0, 1.0)]
    assert torch.equal(vote(solutions), least_residual(solutions)), "of a tie"


def test_trees_and_whole_systems():
    def both(z, x):
        return {"a": wells(z["a"], x), "b": 0.5 * z["b"]}

    def solve(z0):
        return ti.solve(ti.FixedPoint(both), z0, X)

    with torch.no_grad():
        best = best_of(
            solve,
            [{"a": one, "b": one} for one in starts(1.0, -1.0)],
            choose=lambda all_of: torch.stack([s.value["a"][:, 0] for s in all_of]).argmin(dim=0),
        )
    assert best.index.tolist() == [1, 1, 1]
    assert (best.value["a"] < 0).all()
    whole = best_of(lambda z0: ti.solve(ti.FixedPoint(wells, batched=False), z0, X), starts(1.0, -1.0))
    assert whole.index.shape == whole.residual.shape == ()


def test_what_is_refused():
    with pytest.raises(ValueError, match="at least one start"):
        best_of(solved, [])
    with pytest.raises(ValueError, match=r"an index of shape \(3,\)"):
        best_of(solved, starts(1.0), choose=lambda solutions: torch.tensor(0))


def test_places_as_samples_have_a_tolerance_each():
    # a batch whose rows see each other: every row is solved to its own tolerance, and the whole is right
    weight = 0.5 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    x = torch.randn(6, 4, dtype=torch.float64)
    x[0] *= 0  # of its own it is solved at once

    def mixing(z, x):
        score = torch.softmax(z @ z.T, dim=1)
        return torch.tanh(z @ weight + x) + 0.1 * (score @ z - z) * (x.abs().sum(dim=1, keepdim=True) > 0)

    solution = ti.solve(ti.FixedPoint(mixing), torch.zeros_like(x), x, solver=ti.FixedPointIteration(rtol=1e-9))
    assert solution.converged.all()
    assert solution.steps[0] < solution.steps.max()
    torch.testing.assert_close(mixing(solution.value, x), solution.value, rtol=1e-7, atol=1e-8)

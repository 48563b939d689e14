"""The phantom gradient that chooses its steps and damping."""

from __future__ import annotations

import warnings

import pytest
import torch
from maps import EXACT, data, fixed_point, tanh_map
from torch import Tensor

import torchimplicit as ti
from torchimplicit.gradients import PhantomReport
from torchimplicit.testing import GradientSuite

F64 = torch.float64


class TestAdaptivePhantom(GradientSuite):
    second_order = False

    def make(self) -> ti.AdaptivePhantom:
        return ti.AdaptivePhantom(tolerance=1e-12, max_steps=500)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def adjoint(gradient: ti.AdaptivePhantom, j: Tensor, u: Tensor, quiet: bool = False) -> tuple[Tensor, PhantomReport]:
    """What the estimator makes of the cotangents u ``[batch, dim]`` for the map z -> j z + s, and its report."""
    s = torch.zeros_like(u, requires_grad=True)
    solution = ti.solve(
        ti.FixedPoint(lambda z, s: z @ j.mT + s),
        torch.zeros_like(u),
        s,
        solver=ti.FixedPointIteration(),
        gradient=gradient,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if quiet else "error", ti.ConvergenceWarning)
        (g,) = torch.autograd.grad(solution.value, s, u)
    assert isinstance(solution.adjoint, PhantomReport)
    return g, solution.adjoint


def matrices() -> dict[str, Tensor]:
    """Jacobians of many kinds, of size 60."""
    w = normal(60, 60)
    skew = w - w.mT
    return {
        "contraction": 0.9 * w / torch.linalg.matrix_norm(w, 2),
        "orthogonal": 0.9 * torch.linalg.qr(w).Q,
        "gaussian": 0.9 * w / torch.linalg.eigvals(w).abs().max(),
        "symmetric": 0.95 * (w + w.mT) / torch.linalg.matrix_norm(w + w.mT, 2),
        "not normal": torch.triu(w, 1) / 4 + 0.5 * torch.eye(60, dtype=F64),
        "expanding": 1.2 * skew / torch.linalg.matrix_norm(skew, 2),
        "far from the disc": -3 * torch.eye(60, dtype=F64) + 0.9 * w / 60**0.5,
    }


@pytest.mark.parametrize("tolerance", [0.3, 0.01, 1e-6])
@pytest.mark.parametrize("kind", matrices())
def test_the_residual_is_what_was_asked_for(kind, tolerance):
    j, u = matrices()[kind], normal(4, 60, seed=1)
    u[2] *= 1e-3
    g, report = adjoint(ti.AdaptivePhantom(tolerance=tolerance, max_steps=400), j, u)
    true = (u - g + g @ j).norm(dim=1) / u.norm(dim=1)
    assert report.converged.all()
    assert (true <= 1.001 * tolerance).all()
    torch.testing.assert_close(report.residual, true, rtol=1e-6, atol=1e-12)
    assert report.evaluations == report.steps.max() + 1  # the last one confirms the residual
    assert (report.damping > 0).all()


@pytest.mark.parametrize("kind", matrices())
def test_no_constant_damping_is_much_better(kind):
    """The bound of the docstring holds per step; over the whole series a few products may be lost."""
    j, u = matrices()[kind], normal(1, 60, seed=1)
    own = adjoint(ti.AdaptivePhantom(tolerance=0.01, max_steps=400), j, u)[1].steps
    fixed = []
    for damping in (0.2, 0.35, 0.5, 0.65, 0.8, 1.0):
        report = adjoint(ti.AdaptivePhantom(tolerance=0.01, max_steps=400, damping=damping), j, u, quiet=True)[1]
        fixed.append(int(report.steps) if report.converged.all() else 400)
    assert int(own) <= 1.15 * min(fixed) + 1


def test_a_constant_damping_is_the_neumann_phantom():
    j, u = matrices()["orthogonal"], normal(2, 60, seed=1)
    g, report = adjoint(ti.AdaptivePhantom(tolerance=1e-9, max_steps=7, damping=0.6), j, u, quiet=True)
    series = ti.NeumannPhantom(steps=7, damping=0.6)
    s = torch.zeros_like(u, requires_grad=True)
    value = ti.solve(ti.FixedPoint(lambda z, s: z @ j.mT + s), torch.zeros_like(u), s, gradient=series).value
    torch.testing.assert_close(g, torch.autograd.grad(value, s, u)[0])
    torch.testing.assert_close(report.damping, torch.full((2,), 0.6, dtype=F64))


def test_samples_stop_on_their_own():
    x, w = data(batch=3)
    scale = torch.tensor([0.1, 1.0, 2.0], dtype=F64)[:, None]

    def f(z, x, w):
        return tanh_map(z, x, w * 1.0) * scale

    solution = ti.solve(
        ti.FixedPoint(f), torch.zeros_like(x), x, w.requires_grad_(), gradient=ti.AdaptivePhantom(tolerance=1e-4)
    )
    u = torch.ones_like(x)
    u[1] = 0
    solution.value.backward(u)
    report = solution.adjoint
    assert report.converged.all()
    assert report.steps[1] == 0
    assert report.steps[0] < report.steps[2]


def test_the_budget_is_kept_and_told():
    j, u = matrices()["orthogonal"], normal(3, 60)
    solution_gradient = ti.AdaptivePhantom(tolerance=1e-8, max_steps=4)
    _, report = adjoint(solution_gradient, j, u, quiet=True)
    assert report.steps.tolist() == [4] * 3
    assert report.status.tolist() == [ti.Status.MAX_STEPS] * 3
    with pytest.raises(ti.ConvergenceWarning, match="AdaptivePhantom ended above its tolerance 1e-08"):
        adjoint(solution_gradient, j, u)


def test_a_cotangent_that_is_not_finite_touches_no_other_sample():
    j, u = matrices()["contraction"], normal(3, 60)
    clean, _ = adjoint(ti.AdaptivePhantom(), j, u)
    u[1, 3] = torch.nan
    g, report = adjoint(ti.AdaptivePhantom(), j, u, quiet=True)
    assert report.status.tolist() == [ti.Status.CONVERGED, ti.Status.NONFINITE, ti.Status.CONVERGED]
    torch.testing.assert_close(g[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("contraction", [0.3, 0.7])
def test_with_a_contraction_the_error_is_what_was_asked_for(contraction):
    w, u = normal(20, 20), normal(5, 20, seed=1)
    j = contraction * w / torch.linalg.matrix_norm(w, 2)
    g, _ = adjoint(ti.AdaptivePhantom(tolerance=0.05, contraction=contraction), j, u)
    exact = torch.linalg.solve((torch.eye(20, dtype=F64) - j).mT, u.mT).mT
    assert ((g - exact).norm(dim=1) <= 0.05 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("seed", range(5))
def test_with_a_condition_number_it_is_an_ascent_direction(seed):
    """Against the dense singular values of f_theta, here a map of as many parameters as states."""
    w, d, u = normal(12, 12, seed=seed), normal(12, 12, seed=seed + 50), normal(1, 12, seed=seed + 90)
    j = 0.8 * w / torch.linalg.matrix_norm(w, 2)
    values = torch.linalg.svdvals(d)
    kappa = float(values[0] / values[-1])
    gradient = ti.AdaptivePhantom(condition=kappa, contraction=0.8, max_steps=200)
    theta = torch.zeros(12, dtype=F64, requires_grad=True)

    def of(gradient):
        solution = ti.solve(
            ti.FixedPoint(lambda z, t: z @ j.mT + (d @ t)[None]), torch.zeros_like(u), theta, gradient=gradient
        )
        return torch.autograd.grad(solution.value, theta, u)[0]

    exact = torch.linalg.solve((torch.eye(12, dtype=F64) - j).mT, u[0]) @ d
    found = of(gradient)
    assert float(found @ exact) > 0
    assert float((found - exact).norm()) < float(exact.norm()), "the proof's own inequality"


def test_half_precision_and_autocast():
    x = normal(3, 8).float()
    layer = torch.nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.mul_(0.5 / torch.linalg.matrix_norm(layer.weight, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = fixed_point(lambda z, x: torch.tanh(layer(z) + x), torch.zeros_like(x), x,
                            solver=ti.Anderson(), gradient=ti.AdaptivePhantom())  # fmt: skip
    value.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_steps": 0}, "max_steps"),
        ({"damping": 1.5}, "damping"),
        ({"contraction": 1.0}, "contraction"),
        ({"condition": 3.0}, "needs contraction"),
        ({"condition": 0.5, "contraction": 0.5}, "at least 1"),
        ({"condition": 3.0, "contraction": 0.5, "tolerance": 0.1}, "not both"),
    ],
)
def test_bad_settings(bad, match):
    with pytest.raises(ValueError, match=match):
        ti.AdaptivePhantom(**bad)


def test_it_tends_to_the_exact_gradient():
    x, w = data(batch=2)
    w = w.requires_grad_()
    exact, rough, fine = (
        torch.autograd.grad(fixed_point(tanh_map, torch.zeros_like(x), x, w, gradient=g).sin().sum(), w)[0]
        for g in (EXACT, ti.AdaptivePhantom(tolerance=0.3), ti.AdaptivePhantom(tolerance=1e-6))
    )
    assert 1e-4 < float((rough - exact).norm() / exact.norm()) < 0.5
    assert float((fine - exact).norm() / exact.norm()) < 1e-5

"""The series cut off at random: its mean, its variance, and its seeds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.testing import GradientSuite

F64 = torch.float64
DIM = 4


class TestUnbiasedNeumann(GradientSuite):
    bound = 1e-6
    second_order = False

    def make(self) -> ti.UnbiasedNeumann:
        return ti.UnbiasedNeumann(steps=90, survival=0.5, damping=0.9)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def jacobian(radius: float = 0.6) -> Tensor:
    w = normal(DIM, DIM)
    return radius * w / torch.linalg.eigvals(w).abs().max()


class Linear:
    """The map z -> j z + s, solved once; every call draws another estimate for its cotangents."""

    def __init__(self, gradient: ti.UnbiasedNeumann, j: Tensor, u: Tensor):
        self.u, self.s = u, torch.zeros_like(u, requires_grad=True)
        problem = ti.FixedPoint(lambda z, s: z @ j.mT + s)
        self.solution = ti.solve(problem, torch.zeros_like(u), self.s, gradient=gradient)

    def __call__(self) -> Tensor:
        return torch.autograd.grad(self.solution.value, self.s, self.u, retain_graph=True)[0]


def terms(gradient: ti.UnbiasedNeumann, j: Tensor, u: Tensor, count: int = 400) -> Tensor:
    b = gradient.damping * j + (1 - gradient.damping) * torch.eye(DIM, dtype=F64)
    found = [gradient.damping * u]
    for _ in range(count - 1):
        found.append(found[-1] @ b)
    return torch.stack(found)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LAWS = [
    {"steps": 1, "survival": 0.7},
    {"steps": 3, "survival": 0.5, "damping": 0.8},
    {"steps": 2, "power": 2.5},
]


@pytest.mark.parametrize("law", LAWS)
def test_the_mean_is_exact(law):
    j, u = jacobian(), normal(1, DIM, seed=1)
    draw = Linear(ti.UnbiasedNeumann(**law, generator=generator()), j, u)
    samples = torch.cat([draw() for _ in range(1500)])
    exact = torch.linalg.solve((torch.eye(DIM, dtype=F64) - j).mT, u[0])
    error = (samples.mean(dim=0) - exact).abs()
    assert (error < 4 * samples.std(dim=0) / len(samples) ** 0.5).all()
    truncated = terms(ti.UnbiasedNeumann(**law), j, u)[: law["steps"]].sum(dim=0)[0]
    assert (error < 0.3 * (truncated - exact).abs().max()).all(), "the test could tell the bias"


@pytest.mark.parametrize("law", LAWS)
def test_the_variance_is_the_closed_form(law):
    """Over the laws of N, with nothing drawn: E|g|^2 - |E g|^2 from the outcomes and their probabilities; and drawn."""
    j, u = jacobian(), normal(1, DIM, seed=1)
    gradient = ti.UnbiasedNeumann(**law, generator=generator())
    t = terms(gradient, j, u)[:, 0]
    s = torch.tensor([gradient.reached(i) for i in range(len(t))], dtype=F64)
    first = torch.minimum(torch.arange(len(t))[:, None], torch.arange(len(t)))
    formula = float(((t @ t.T) * (1 / s[first] - 1)).sum())
    outcomes = (t / s[:, None]).cumsum(dim=0)
    chance = s - torch.cat([s[1:], s.new_zeros(1)])
    mean = (chance[:, None] * outcomes).sum(dim=0)
    by_law = float((chance * (outcomes - mean).square().sum(dim=1)).sum())
    assert formula == pytest.approx(by_law, rel=1e-6)
    draw = Linear(gradient, j, u)
    samples = torch.cat([draw() for _ in range(1500)])
    assert float(samples.var(dim=0).sum()) == pytest.approx(formula, rel=0.25)


def test_the_variance_is_finite_only_below_the_stated_radius():
    j, u = jacobian(0.9), normal(1, DIM, seed=1)

    def partial(survival: float, count: int) -> float:
        gradient = ti.UnbiasedNeumann(steps=1, survival=survival)
        t = terms(gradient, j, u, count)[:, 0]
        s = torch.tensor([gradient.reached(i) for i in range(count)], dtype=F64)
        first = torch.minimum(torch.arange(count)[:, None], torch.arange(count))
        return float(((t @ t.T) * (1 / s[first] - 1)).sum())

    assert partial(0.9, 400) == pytest.approx(partial(0.9, 800), rel=1e-3)  # 0.81 < 0.9
    assert partial(0.7, 800) > 1e3 * partial(0.7, 400)  # 0.81 > 0.7


def test_the_number_of_terms_follows_its_law():
    for law in LAWS:
        gradient = ti.UnbiasedNeumann(**law, generator=generator(3))
        drawn = torch.tensor([gradient.draw() for _ in range(4000)])
        assert int(drawn.min()) == gradient.steps
        for term in (gradient.steps, gradient.steps + 1, gradient.steps + 4):
            p = gradient.reached(term)
            assert float((drawn > term).double().mean()) == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** 0.5)


def test_seeds():
    j, u = jacobian(), normal(2, DIM, seed=1)
    # a generator of its own
    first, second = (Linear(ti.UnbiasedNeumann(generator=generator(5)), j, u) for _ in range(2))
    a = [first() for _ in range(6)]
    assert all(torch.equal(x, second()) for x in a)
    assert not all(torch.equal(x, a[0]) for x in a)
    # the global one
    draw = Linear(ti.UnbiasedNeumann(), j, u)
    torch.manual_seed(0)
    b = [draw() for _ in range(6)]
    state = torch.get_rng_state()
    c = draw()
    torch.manual_seed(0)
    assert all(torch.equal(x, draw()) for x in b)
    torch.set_rng_state(state)
    assert torch.equal(c, draw())


def test_one_draw_serves_the_whole_batch():
    j, u = jacobian(), normal(1, DIM, seed=1)
    draw = Linear(ti.UnbiasedNeumann(steps=1, generator=generator()), j, u.expand(5, -1).contiguous())
    for _ in range(5):
        g = draw()
        torch.testing.assert_close(g, g[:1].expand(5, -1))
        report = draw.solution.adjoint
        assert len(set(report.steps.tolist())) == 1
        assert report.evaluations == int(report.steps[0]) - 1


def test_a_long_draw_ends_where_its_terms_are_rounding():
    gradient = ti.UnbiasedNeumann(survival=1 - 1e-6, generator=generator())
    draw = Linear(gradient, jacobian(0.3), normal(1, DIM, seed=1))
    g = draw()
    exact = torch.linalg.solve((torch.eye(DIM, dtype=F64) - jacobian(0.3)).mT, draw.u[0])
    torch.testing.assert_close(g[0], exact, rtol=1e-4, atol=1e-6)
    assert draw.solution.adjoint.evaluations < 100


def test_a_copy_of_a_layer_goes_on_alike():
    layer = ti.nn.Equilibrium(torch.nn.Identity(), gradient=ti.UnbiasedNeumann(generator=generator(1)))
    other = copy.deepcopy(layer)
    assert other.gradient.draw() == layer.gradient.draw()


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"survival": 1.0}, "survival"),
        ({"power": 1.0}, "power"),
        ({"damping": 0.0}, "damping"),
    ],
)
def test_bad_settings(bad, match):
    with pytest.raises(ValueError, match=match):
        ti.UnbiasedNeumann(**bad)
    with pytest.raises(TypeError, match="generator"):
        ti.UnbiasedNeumann(generator=3)

"""K-FAC against the Hessians that it is exact for, and as a preconditioner of a network's Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

import torchimplicit as ti
from torchimplicit.linear import CG, KFAC
from torchimplicit.testing.linear_suite import matrix_operator

DAMPING = 0.3


@pytest.fixture(autouse=True)
def _seeded(one_thread):
    torch.manual_seed(0)


def flat(state):
    return torch.cat([p.flatten() for p in state.values()])


def hessian(model, state, x, loss):
    """The dense Hessian of the mean loss in the flattened state, plus the damping."""
    sizes = [p.numel() for p in state.values()]

    def energy(z):
        parts = zip(state.items(), z.split(sizes), strict=True)
        return loss(functional_call(model, {name: part.view(p.shape) for (name, p), part in parts}, (x,)))

    h = torch.func.hessian(energy)(flat(state))
    return h + DAMPING * torch.eye(len(h), dtype=h.dtype)


def assert_inverse(kfac, matrix, rtol=1e-9):
    v = torch.randn(2, len(matrix), dtype=matrix.dtype)
    found = kfac.prepare(matrix_operator(matrix.expand(2, -1, -1), symmetric=True)).inverse(v)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, v.T).T, rtol=rtol, atol=1e-10)


def squares(out):
    return 0.5 * out.square().flatten(1).sum(dim=1).mean()


def parameters(model, order=1):
    return dict(list(model.named_parameters())[::order])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_it_is_the_hessian_of_a_linear_regression(bias, order):
    model, x = nn.Linear(5, 3, bias=bias).double(), torch.randn(20, 5).double()
    state = parameters(model, order)
    assert_inverse(KFAC.at(model, state, x, "gaussian", damping=DAMPING), hessian(model, state, x, squares))


def test_it_is_the_hessian_of_a_convolution_of_the_whole_image():
    model, x = nn.Conv2d(2, 3, 4, dilation=1).double(), torch.randn(20, 2, 4, 4).double()
    state = parameters(model)
    assert_inverse(KFAC.at(model, state, x, "gaussian", damping=DAMPING), hessian(model, state, x, squares))


def test_it_is_the_hessian_of_the_last_layer_for_one_image_and_its_class():
    model, x = nn.Linear(4, 3).double(), torch.randn(1, 4).double()
    state, label = parameters(model), torch.tensor([1])
    expected = hessian(model, state, x, lambda out: nn.functional.cross_entropy(out, label))
    assert_inverse(KFAC.at(model, state, x, damping=DAMPING), expected)


def test_a_part_of_the_parameters():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double(), torch.randn(30, 4).double()
    state = {"1.weight": model[1].weight}
    assert_inverse(KFAC.at(model, state, x, "gaussian", damping=DAMPING), hessian(model, state, x, squares))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_draws_approach_the_expectation(likelihood):
    model, x = nn.Linear(4, 3).double(), torch.randn(40, 4).double()
    state, v = parameters(model), torch.randn(1, 15).double()
    exact, drawn = (
        KFAC.at(model, state, x, likelihood, damping=DAMPING, samples=samples, generator=generator)
        .prepare(matrix_operator(torch.eye(15).double()[None]))
        .inverse(v)
        for samples, generator in ((None, None), (2000, torch.Generator().manual_seed(0)))
    )
    torch.testing.assert_close(drawn, exact, rtol=0.1, atol=0.02)


def test_tokens_normalization_and_repeated_layers_are_served():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.LayerNorm(6), nn.Tanh(), shared, nn.Flatten(), nn.Linear(18, 4)).double()
    state = parameters(model)
    kfac = KFAC.at(model, state, torch.randn(10, 3, 6).double(), damping=DAMPING)
    assert len(kfac.factors) == 2
    assert len(kfac.rest) == 2
    dim = len(flat(state))
    inverse = kfac.prepare(matrix_operator(torch.eye(dim).double()[None])).inverse(torch.eye(dim).double())
    torch.testing.assert_close(inverse, inverse.T)
    assert torch.linalg.eigvalsh(inverse)[0] > 0


def test_a_networks_hypergradient_takes_fewer_products_and_is_that_of_finite_differences():
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    x, labels = torch.randn(120, 6).double() * torch.logspace(0, -1.5, 6), torch.randint(3, (120,))
    labels[:60] = (x[:60, 0] > 0).long()
    fit, held = (x[:80], labels[:80]), (x[80:], labels[80:])
    names = list(parameters(model))

    def loss(z, part):
        return nn.functional.cross_entropy(functional_call(model, z, (part[0],)), part[1])

    def energy(z, log_decay):
        decay = sum(0.5 * log_decay[i // 2].exp() * z[name].square().sum() for i, name in enumerate(names))
        return loss(z, fit) + decay

    problem = ti.Minimum(energy, batched=False)
    solver = ti.NewtonCG(rtol=0.0, atol=1e-10)
    log_decay = torch.tensor([-6.0, -5.0], dtype=torch.float64)
    start = {name: p.detach() for name, p in parameters(model).items()}
    z = ti.solve(problem, start, log_decay, solver=solver).value
    damping = {name: float(log_decay[i // 2].exp()) for i, name in enumerate(names)}
    kfac = KFAC.at(model, z, fit[0], damping=damping)

    def hypergradient(rtol, preconditioner):
        gradient = ti.Implicit(linear_solver=CG(rtol=rtol, max_steps=2000, preconditioner=preconditioner))
        theta = log_decay.clone().requires_grad_()
        solution = ti.solve(problem, z, theta, solver=solver, gradient=gradient)
        return torch.autograd.grad(loss(solution.value, held), theta)[0], int(solution.adjoint.steps)

    (_, plain), (_, with_kfac) = (hypergradient(1e-3, preconditioner) for preconditioner in (None, kfac))
    assert with_kfac < 0.7 * plain
    exact, _ = hypergradient(1e-10, kfac)
    for index in range(2):
        shift = torch.zeros(2, dtype=torch.float64)
        shift[index] = 1e-4
        at = [loss(ti.solve(problem, z, log_decay + s * shift, solver=solver).value, held) for s in (1, -1)]
        torch.testing.assert_close(exact[index], (at[0] - at[1]) / 2e-4, rtol=1e-4, atol=1e-7)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"state": {"other": torch.ones(3)}}, "no Linear or Conv2d"),
            ({"damping": 0.0}, "must be positive"),
            ({"damping": {"weight": 1.0}}, "must be positive"),
            ({"samples": 0}, "samples"),
            ({"likelihood": "poisson"}, "must be"),
            ({"inputs": torch.ones(2, 3, 4)}, r"needs \[n, classes\]"),
        ],
    )
    def test_is_refused(self, change, message):
        model = nn.Linear(4, 3)
        given = {"model": model, "state": parameters(model), "inputs": torch.ones(5, 4)} | change
        with pytest.raises(ValueError, match=message):
            KFAC.at(given.pop("model"), given.pop("state"), given.pop("inputs"), **given)

    def test_another_state_is_refused(self):
        model = nn.Linear(4, 3)
        kfac = KFAC.at(model, parameters(model), torch.ones(5, 4))
        with pytest.raises(ValueError, match="15 numbers, and the system has 7"):
            kfac.prepare(matrix_operator(torch.eye(7)[None]))

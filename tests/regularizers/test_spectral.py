from __future__ import annotations

import pytest
import torch

import torchimplicit as ti
from torchimplicit.regularizers import spectral_penalty

D = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def f(z, w):
    return torch.tanh(z @ w.mT)


def radius(z, w):
    """By a dense eigenvalue decomposition, which autograd differentiates."""
    jacobians = torch.func.vmap(torch.func.jacrev(f), (0, None))(z, w)
    return torch.linalg.eigvals(jacobians).abs().amax(1)


def agree(got, expected, bound):
    for g, e in zip(got, expected, strict=True):
        assert torch.linalg.vector_norm(g - e) <= bound * torch.linalg.vector_norm(e)


@pytest.mark.parametrize("limit", [0.0, 0.7])
@pytest.mark.parametrize("seed", range(6))
def test_small_states_are_exact(seed, limit):
    """Of real dominant eigenvalues and of complex pairs."""
    z, w = 0.3 * normal(4, 6, seed=seed), normal(6, 6, seed=seed + 10) * 6**-0.5
    z.requires_grad_(), w.requires_grad_()
    got = spectral_penalty(ti.FixedPoint(f), z, w, limit=limit)
    expected = (radius(z, w) - limit).clamp_min(0).square().mean()
    torch.testing.assert_close(got, expected)
    agree(torch.autograd.grad(got, (z, w)), torch.autograd.grad(expected, (z, w)), 1e-9)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_iteration(kind):
    """Where the dominant eigenvalues stand apart, thirty products are exact to many digits."""
    dim = 60
    basis = torch.eye(dim, dtype=D) + 0.2 * normal(dim, dim) * dim**-0.5
    inner = 0.5 * torch.diag(torch.linspace(-1, 1, dim, dtype=D))
    inner[0, 0] = inner[1, 1] = 0.8
    inner[0, 1], inner[1, 0] = (0.4, -0.4) if kind == "complex" else (0.4, 0.0)
    if kind == "real":
        inner[1, 1] = 0.3
    w = (basis @ inner @ torch.linalg.inv(basis)).requires_grad_()
    z = (0.05 * normal(3, dim, seed=1)).requires_grad_()
    got = spectral_penalty(ti.FixedPoint(f), z, w, limit=0.3, subspace=30)
    expected = (radius(z, w) - 0.3).square().mean()
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)
    agree(torch.autograd.grad(got, (z, w)), torch.autograd.grad(expected, (z, w)), 1e-6)


def test_one_step_is_exact_for_symmetric_maps_and_not_for_others():
    z = torch.zeros(1, 12, dtype=D)
    errors = []
    for symmetric in (True, False):
        w = normal(12, 12) * 0.2
        w = ((w + w.mT) if symmetric else w + torch.diag(torch.linspace(0, 1.2, 12, dtype=D))).requires_grad_()
        got = spectral_penalty(ti.FixedPoint(f), z, w, limit=0.0, exact=False)
        expected = radius(z, w).square().mean()
        torch.testing.assert_close(got, expected)
        g, e = (torch.autograd.grad(value, w)[0] for value in (got, expected))
        errors.append(float((g - e).norm() / e.norm()))
    assert errors[0] < 1e-9
    assert errors[1] > 0.01


def test_training_brings_the_radius_below_the_limit():
    w = (1.5 * normal(40, 40) * 40**-0.5).requires_grad_()
    z = torch.zeros(1, 40, dtype=D)
    optimizer = torch.optim.Adam([w], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    assert ti.spectral_radius(ti.FixedPoint(f), z, w) > 1.2
    for _ in range(100):
        optimizer.zero_grad()
        spectral_penalty(ti.FixedPoint(f), z, w, limit=0.8, generator=generator).backward()
        optimizer.step()
    assert ti.spectral_radius(ti.FixedPoint(f), z, w) < 0.9


def test_a_root_is_that_of_its_plain_step():
    z, w = 0.3 * normal(4, 6), normal(6, 6, seed=1) * 6**-0.5
    root = ti.Root(lambda z, w: z - f(z, w))
    torch.testing.assert_close(
        spectral_penalty(root, z, w, limit=0.1), spectral_penalty(ti.FixedPoint(f), z, w, limit=0.1)
    )


def test_a_state_that_is_a_tree_and_one_system():
    w = normal(6, 6, seed=1) * 6**-0.5
    z = 0.3 * normal(6)

    def tree(state, w):
        out = f(torch.cat((state["a"], state["b"])), w)
        return {"a": out[:2], "b": out[2:]}

    got = spectral_penalty(ti.FixedPoint(tree, batched=False), {"a": z[:2], "b": z[2:]}, w, limit=0.1)
    torch.testing.assert_close(got, spectral_penalty(ti.FixedPoint(f), z[None], w, limit=0.1))


def test_samples_that_depend_on_each_other():
    w = normal(5, 5, seed=1) * 5**-0.5
    w.requires_grad_()
    z = 0.3 * normal(3, 5)

    def coupled(z, w):
        return f(z + z.mean(0, keepdim=True), w)

    got = spectral_penalty(ti.FixedPoint(coupled), z, w, limit=0.0)
    whole = torch.func.jacrev(coupled)(z, w).reshape(15, 15)
    expected = torch.linalg.eigvals(whole).abs().amax().square()
    torch.testing.assert_close(got, expected)
    agree(torch.autograd.grad(got, w), torch.autograd.grad(expected, w), 1e-9)


def test_refusals():
    z, w = normal(2, 3), normal(3, 3).requires_grad_()
    value = spectral_penalty(ti.FixedPoint(f), z, w, limit=0.0)
    with pytest.raises(ti.UnsupportedDerivativeError, match="first derivative only"):
        torch.autograd.grad(value, w, create_graph=True)
    with pytest.raises(ti.UnsupportedDerivativeError, match=r"torch\.func"):
        torch.func.grad(lambda w: spectral_penalty(ti.FixedPoint(f), z, w))(w)
    with pytest.raises(TypeError, match="Minimum"):
        spectral_penalty(ti.Minimum(lambda z: z.square().sum(1)), z)
    with pytest.raises(ValueError, match="subspace is 1"):
        spectral_penalty(ti.FixedPoint(f), z, w, subspace=1)

from __future__ import annotations

import pytest
import torch

from torchimplicit import FixedPoint, Minimum, Root
from torchimplicit.regularizers import jacobian_frobenius

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def f(z, w):
    return torch.tanh(z @ w.T)


def exact(z, w):
    """The mean over the batch of the squared Frobenius norm over the dimension."""
    jacobians = torch.func.vmap(torch.func.jacrev(f), (0, None))(z, w)
    return jacobians.square().sum() / z.numel()


@pytest.mark.parametrize("kind", [FixedPoint, Root])
def test_its_mean_is_the_squared_norm_over_the_dimension(kind):
    z, w = normal(3, 5), normal(5, 5, seed=1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([jacobian_frobenius(kind(f), z, w, generator=generator) for _ in range(800)])
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - exact(z, w)) <= 4 * error
    assert error <= 0.05 * exact(z, w)


def test_more_samples_are_an_average():
    z, w = normal(3, 5), normal(5, 5, seed=1)
    many = jacobian_frobenius(FixedPoint(f), z, w, samples=2000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(many, exact(z, w), rtol=0.1, atol=0.0)


def test_its_derivatives():
    z, w = normal(2, 3).requires_grad_(), normal(3, 3, seed=1).requires_grad_()

    def value(z, w):
        return jacobian_frobenius(FixedPoint(f), z, w, samples=2, generator=torch.Generator().manual_seed(3))

    assert torch.autograd.gradcheck(value, (z, w))
    assert torch.autograd.gradgradcheck(value, (z, w))


def test_captured_parameters_get_a_gradient():
    layer = torch.nn.Linear(4, 4).double()
    jacobian_frobenius(FixedPoint(lambda z: torch.tanh(layer(z))), normal(2, 4)).backward()
    assert layer.weight.grad.abs().sum() > 0


def test_states_that_are_trees_or_one_system():
    z = {"a": normal(2, 3), "b": normal(2, 1)}
    slope = FixedPoint(lambda z: {"a": 2 * z["a"], "b": 2 * z["b"]})
    one = jacobian_frobenius(slope, z, samples=400, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one, torch.tensor(4.0, dtype=F64), rtol=0.1, atol=0.0)
    assert jacobian_frobenius(FixedPoint(torch.cos, batched=False), normal(4)).shape == ()


def test_refuses():
    z = normal(2, 3)
    with pytest.raises(TypeError, match="needs a map, but a minimum has an energy: give FixedPoint or Root"):
        jacobian_frobenius(Minimum(lambda z: z.sum(1)), z)
    with pytest.raises(ValueError, match="jacobian_frobenius: samples is 0, and must be at least 1"):
        jacobian_frobenius(FixedPoint(torch.cos), z, samples=0)
    with pytest.raises(TypeError, match="samples must be an integer"):
        jacobian_frobenius(FixedPoint(torch.cos), z, samples=1.5)
    with pytest.raises(ValueError, match="keep the shape"):
        jacobian_frobenius(FixedPoint(lambda z: z[:, :2]), z)

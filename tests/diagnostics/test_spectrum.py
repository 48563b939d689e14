from __future__ import annotations

import math

import pytest
import torch

from torchimplicit import FixedPoint, Minimum, Root, spectral_radius

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def linear(w):
    """The map with the Jacobian ``w`` (``[batch, dim, dim]`` or shared)."""
    return FixedPoint(lambda z: (w @ z[:, :, None])[:, :, 0])


def radius(w):
    return torch.linalg.eigvals(w).abs().amax(-1)


@pytest.mark.parametrize("dim", [1, 5, 40])
def test_small_states_are_exact(dim):
    w = normal(4, dim, dim)
    torch.testing.assert_close(spectral_radius(linear(w), torch.zeros(4, dim, dtype=F64)), radius(w))


@pytest.mark.parametrize("dim", [2, 90])
def test_a_scaled_rotation(dim):
    # power iteration on the norm's direction finds nothing here; the peers return 0
    turn = torch.tensor([[math.cos(1), -math.sin(1)], [math.sin(1), math.cos(1)]], dtype=F64)
    blocks = [0.9 * turn] + [0.5 * turn] * (dim // 2 - 1)
    w = torch.block_diag(*blocks)
    found = spectral_radius(linear(w), torch.zeros(3, dim, dtype=F64))
    torch.testing.assert_close(found, torch.full((3,), 0.9, dtype=F64), rtol=1e-6, atol=0.0)


def test_a_map_that_is_far_from_normal():
    w = torch.triu(normal(30, 30), 1) + torch.diag(torch.linspace(-0.8, 0.7, 30, dtype=F64))
    assert torch.linalg.matrix_norm(w, 2) > 5
    found = spectral_radius(linear(w), torch.zeros(1, 30, dtype=F64))
    torch.testing.assert_close(found, torch.tensor([0.8], dtype=F64), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("kind", "error"), [("gaussian", 1e-3), ("symmetric", 1e-3), ("orthogonal", 2e-2)])
def test_large_states_by_arnoldi(kind, error):
    w = normal(3, 300, 300) / 300**0.5
    w = w + w.mT if kind == "symmetric" else torch.linalg.qr(w).Q * 0.95 if kind == "orthogonal" else w
    found = spectral_radius(linear(w), torch.zeros(3, 300, dtype=F64))
    torch.testing.assert_close(found, radius(w), rtol=error, atol=0.0)


def test_is_taken_at_the_state():
    z = torch.tensor([[0.0], [1.0], [2.0]], dtype=F64)
    torch.testing.assert_close(spectral_radius(FixedPoint(torch.cos), z), z.sin().abs()[:, 0])


def test_a_root_and_a_minimum_mean_their_plain_step():
    z, w = torch.zeros(1, 3, dtype=F64), torch.diag(torch.tensor([0.5, 1.0, 3.0], dtype=F64))
    expected = torch.tensor([2.0], dtype=F64)  # |1 - 3|
    torch.testing.assert_close(spectral_radius(Root(lambda z: z @ w), z), expected)
    torch.testing.assert_close(spectral_radius(Minimum(lambda z: 0.5 * ((z @ w) * z).sum(1)), z), expected)


def test_one_system():
    w = normal(6, 6)
    found = spectral_radius(FixedPoint(lambda z: (w @ z.flatten()).reshape(2, 3), batched=False), normal(2, 3))
    torch.testing.assert_close(found, radius(w))


def test_a_tree_and_arguments():
    z, scale = {"a": normal(2, 3), "b": normal(2, 2, 2)}, torch.tensor([0.5, 2.0], dtype=F64)

    def f(z, scale):
        return {"a": scale[:, None] * z["a"], "b": 0.1 * z["b"]}

    torch.testing.assert_close(spectral_radius(FixedPoint(f), z, scale), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype(dtype):
    found = spectral_radius(FixedPoint(lambda z: 0.5 * z.roll(1, 1)), torch.zeros(2, 80, dtype=dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.full((2,), 0.5, dtype=dtype), rtol=1e-2, atol=0.0)


def test_a_map_that_forgets_its_state():
    assert torch.equal(spectral_radius(FixedPoint(lambda z: 0 * z + 1), torch.ones(2, 80)), torch.zeros(2))


def test_refuses():
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="subspace is 1, and must be at least 2"):
        spectral_radius(FixedPoint(torch.cos), z, subspace=1)
    with pytest.raises(ValueError, match="restarts is 0, and must be at least 1"):
        spectral_radius(FixedPoint(torch.cos), z, restarts=0)
    with pytest.raises(ValueError, match="dim 0 is the batch"):
        spectral_radius(FixedPoint(torch.cos), z[0])

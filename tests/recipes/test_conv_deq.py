"""The small convolutional equilibrium classifier."""

from __future__ import annotations

import pytest
import torch

from torchimplicit.diagnostics import spectral_radius
from torchimplicit.models import ConvDEQClassifier
from torchimplicit.problems import FixedPoint
from torchimplicit.solvers import Anderson


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ConvDEQClassifier(channels=8, solver=Anderson(rtol=1e-5))


def test_it_contracts_at_the_default_initialization(model):
    images = torch.rand(6, 1, 8, 8)
    assert model(images).shape == (6, 10)
    solution = model.equilibrium.solution
    assert bool(solution.converged.all())
    x = model.stem(images).detach()
    assert float(spectral_radius(FixedPoint(model.equilibrium.cell), solution.value, x).max()) < 0.95


def test_every_image_is_treated_on_its_own(model):
    images = torch.rand(5, 1, 8, 8)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-3, atol=1e-3)


def test_every_parameter_gets_a_gradient(model):
    model(torch.rand(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_groups_must_divide_channels():
    with pytest.raises(ValueError, match="multiple of 4"):
        ConvDEQClassifier(channels=10)

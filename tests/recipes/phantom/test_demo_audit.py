"""The comparison with the exact gradient."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning")

from torchimplicit.gradients import Implicit, OneStep, UnrolledPhantom
from torchimplicit.recipes.phantom import demo_task as build
from torchimplicit.recipes.phantom import demo_task as data
from torchimplicit.recipes.phantom.demo import DigitsConfig
from torchimplicit.recipes.phantom.demo_task import EXACT_GRADIENT, EXACT_SOLVER, audit, probe


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def case():
    training, _ = data.load(0)
    model = build.classifier(DigitsConfig(channels=4), "implicit")
    return model, training.images[:16], training.labels[:16]


def test_the_exact_gradient_is_exact(case):
    found = audit(*case, EXACT_SOLVER, EXACT_GRADIENT, step=3)
    assert found.step == 3
    assert found.cosine == pytest.approx(1, abs=1e-6)
    assert found.norm_ratio == pytest.approx(1, abs=1e-4)
    assert found.adjoint_residual < 1e-5
    assert found.exact_residual < 1e-5
    assert 0 < found.spectral_radius <= found.spectral_radius_max < 1


def test_the_phantom_gradient_tends_to_the_exact_one(case):
    cosines, residuals = [], []
    for steps in (1, 5, 80):
        found = audit(*case, EXACT_SOLVER, UnrolledPhantom(steps=steps, damping=1.0), step=0)
        cosines.append(found.cosine)
        residuals.append(found.adjoint_residual)
    assert cosines == sorted(cosines)
    assert cosines[-1] > 0.9999
    assert residuals == sorted(residuals, reverse=True)


def test_the_adjoint_residual_of_one_step_is_that_of_the_identity(case):
    model, images, labels = case
    one, x, z = probe(model, images, labels, EXACT_SOLVER, OneStep())
    z = z.clone().requires_grad_()
    scores = model.head(z)
    (u,) = torch.autograd.grad(torch.nn.functional.cross_entropy(scores, labels), z)
    (transposed,) = torch.autograd.grad(model.equilibrium.cell(z, x), z, u)
    assert one.total_residual == pytest.approx(float(transposed.norm() / u.norm()), rel=1e-3)


def test_the_gradient_is_that_of_the_training_step(case):
    model, images, labels = case
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    trained = torch.cat([p.grad.flatten() for part in (model.stem, model.equilibrium) for p in part.parameters()])
    found, _, _ = probe(model, images, labels, build.solver(DigitsConfig()), Implicit())
    probed = torch.cat([g.flatten() for g in found.gradients])
    assert float(torch.nn.functional.cosine_similarity(trained, probed, dim=0)) > 0.999
    model.zero_grad()


def test_an_audit_leaves_no_trace(case):
    model = case[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audit(*case, EXACT_SOLVER, OneStep(), step=0)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

"""Inverse problems by joint inference: the recipe and the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from running import QUIET, descent, run_jobs
from scipy.io import savemat

import torchimplicit as ti
from torchimplicit.recipes.joint.decoder import Images, Joint
from torchimplicit.recipes.joint.inverse import (
    RUNNER,
    TABLE,
    InverseConfig,
    JiioInverseConfig,
    Restoration,
    inverse_digits,
    jobs,
)
from torchimplicit.recipes.phantom.image_files import FACES, olivetti
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Machine, Optimization
from torchimplicit.recipes.runtime.table import Plan

pytestmark = pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")


def few(**changes: Any) -> InverseConfig:
    """A few images and steps."""
    return replace(
        inverse_digits(),
        images=Images(validation_images=20, train_images=40, test_images=20),
        joint=Joint(joint_steps=8, test_steps=10),
        optimization=Optimization(steps=2, batch_size=8, validate_every=2),
        machine=Machine(device="cpu", tensorboard=False),
        **changes,
    )


def test_missing_squares_and_noise() -> None:
    torch.manual_seed(0)
    task = Restoration(few(corruption="inpainting", missing=0.5))
    images = 0.1 + task.data.test.images
    shown, seen = task.corrupted(images)
    assert (seen == 0).sum(dim=(1, 2, 3)).tolist() == [16] * len(images)
    assert torch.equal(shown, images * seen)
    noisy = Restoration(few(noise=0.2))
    shown, seen = noisy.corrupted(images)
    assert float((shown - images).std()) == pytest.approx(0.2, rel=0.1)
    assert bool((seen == 1).all())
    again = Restoration(few(noise=0.2))
    assert torch.equal(again.held_out["test"][0], noisy.held_out["test"][0])


@pytest.mark.parametrize("corruption", ["denoising", "inpainting"])
def test_the_exact_gradient_is_that_of_the_outer_loss(corruption: Any) -> None:
    """To finite differences along a direction; the first-order one is another."""
    torch.manual_seed(0)
    task = Restoration(few(corruption=corruption)).double().eval()
    with torch.no_grad():
        task.prior_shift.fill_(0.1)
    images = task.data.training.images[:3].double()
    shown = tuple(part.double() for part in task.corrupted(images))
    parameters = [p for p in task.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in parameters]
    solver = ti.Anderson(memory=30, rtol=1e-10, max_steps=4000)

    def outer(gradient: Any = None) -> torch.Tensor:
        prior = task.prior
        value = ti.solve(task.problem(), task.decoder.start(3), *shown, prior, solver=solver, gradient=gradient).value
        return (task.decoder.head(value.z) - images).square().mean()

    def along(gradient: Any) -> float:
        slopes = torch.autograd.grad(outer(gradient), parameters, allow_unused=True)
        return float(sum((s * d).sum() for s, d in zip(slopes, direction, strict=True) if s is not None))

    step = 1e-5
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
            ends.append(float(outer()))
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=sign * step)
    expected = (ends[0] - ends[1]) / (2 * step)
    assert along(ti.Implicit(linear_solver=ti.linear.GMRES(rtol=1e-9, max_steps=500))) == pytest.approx(
        expected, rel=1e-3
    )
    assert along(ti.FixedInput()) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("through", ["exact", "first-order", "generative"])
def test_training_lowers_the_error(through: Any) -> None:
    torch.manual_seed(0)
    task = Restoration(few(through=through))
    batch = (task.data.training.images[:16],)

    def batches() -> Iterator[Any]:
        for _ in range(10):
            torch.manual_seed(1)  # the same noise
            yield batch

    found = descent(task, batches())
    assert found[-1] < 0.9 * found[0]
    assert (task.prior_shift.grad is not None) == (through == "exact")


def test_olivetti_from_its_file(tmp_path: Any) -> None:
    faces = np.random.default_rng(0).integers(0, 256, (4096, 400), dtype=np.uint8)
    savemat(tmp_path / FACES, {"faces": faces})
    train, test = olivetti(tmp_path)
    assert train.images.shape == (320, 1, 32, 32)
    assert torch.bincount(test.labels).tolist() == [2] * 40
    first = torch.as_tensor(faces[:, 0].astype(np.float32)).view(64, 64).T
    block = first[:2, :2].mean().round()
    assert any(int(image[0, 0, 0]) == int(block) for image in (*train.images, *test.images))
    savemat(tmp_path / FACES, {"other": faces[:10]})
    with pytest.raises(UserError, match="no matrix 'faces'"):
        olivetti(tmp_path)
    (tmp_path / FACES).write_bytes(b"something else")
    with pytest.raises(UserError, match="no readable MATLAB file"):
        olivetti(tmp_path)
    with pytest.raises(UserError, match="--data-dir must be the folder"):
        olivetti(tmp_path / "elsewhere")


def test_the_table_with_some_runs_and_with_none(tmp_path: Any) -> None:
    config = JiioInverseConfig()
    asked = jobs(config)[:2]
    runs = run_jobs(asked, tmp_path, lambda one: few(corruption=one.corruption, through=one.through))
    summary = TABLE.summarize(config, runs)
    assert summary.claims[0].statement.startswith("The exact gradient as in training")
    assert [claim.statement.split(":")[0] for claim in summary.claims[1:]] == ["Denoising"]
    assert [line[0] for line in summary.sheets[-1].table.rows] == ["denoising: exact", "denoising: first-order"]
    assert [d.name for d in summary.drawings] == ["denoising"]
    last = asked[-1]
    RUNNER.evaluate(few(corruption=last.config.corruption, through=last.config.through), runs[last.name], QUIET)
    assert not TABLE.summarize(config, {}).claims


def test_published_settings_are_kept_or_refused() -> None:
    from torchimplicit.recipes.joint.adversarial import AdversarialTableConfig, attacked
    from torchimplicit.recipes.joint.generation import JiioGenerationConfig
    from torchimplicit.recipes.joint.meta import MetaTableConfig

    paper = Plan(scale="paper")
    for make in (JiioInverseConfig, JiioGenerationConfig, MetaTableConfig, AdversarialTableConfig):
        with pytest.raises(UserError, match="--scale paper would be"):
            make(plan=paper)
    training = attacked(AdversarialTableConfig(plan=paper, data="mnist"), "jiio", 0).training
    assert (training.train_images, training.attack_steps) == (None, 80)

"""Generative decoders by joint inference: the recipe, its measurements, and the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from running import QUIET, descent, logged, run_jobs

import torchimplicit as ti
from torchimplicit.models import mlp_decoder
from torchimplicit.recipes.joint import decoder, generation
from torchimplicit.recipes.joint.decoder import Images, Joint, Kind, joint_solver, mosaic, reconstruction
from torchimplicit.recipes.joint.generation import (
    JOINT,
    RUNNER,
    TABLE,
    Generation,
    GenerationConfig,
    JiioGenerationConfig,
)
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, from_plain, to_plain

pytestmark = pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")


def few(**changes: Any) -> GenerationConfig:
    """A few images and steps."""
    return replace(
        generation.generation_digits(),
        images=Images(validation_images=20, train_images=40, test_images=20),
        joint=Joint(joint_steps=8, test_steps=10),
        components=2,
        samples=30,
        curve_images=4,
        curve_repeats=1,
        optimization=Optimization(steps=2, batch_size=8, validate_every=2),
        machine=Machine(device="cpu", tensorboard=False),
        **changes,
    )


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "STEPS", 3)
    monkeypatch.setattr(generation, "JOINT_STEPS", (10, 20, 40))
    monkeypatch.setattr(generation, "NESTED_STEPS", (10, 20, 40))
    monkeypatch.setattr(generation, "RATES", dict.fromkeys(generation.METHODS, (0.1,)))
    monkeypatch.setattr(generation, "STEP_SIZES", (10.0,))
    monkeypatch.setattr(generation, "TOLERANCES", (1e-1, 1e-2))
    decoder.features.cache_clear()


def test_distance_of_two_gaussians() -> None:
    one = torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0]).double())
    other = torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 1.0]).double())
    assert decoder.between(one, other) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2)
    assert decoder.between(one, one) == pytest.approx(0.0, abs=1e-9)
    turned = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).double()).Q
    moved = [(turned @ m, turned @ c @ turned.mT) for m, c in (one, other)]
    assert decoder.between(moved[0], moved[1]) == pytest.approx(decoder.between(one, other))


def test_all_methods_find_the_same_latents() -> None:
    torch.manual_seed(0)
    model = mlp_decoder((1, 3, 4), latent=3, width=8).double().eval().requires_grad_(False)
    wanted = model(torch.randn(5, 3, dtype=torch.float64))
    problem = reconstruction(model, 0.01, 2.0, 12)
    solver = ti.Anderson(memory=20, rtol=1e-9, max_steps=3000)
    expected = decoder.found(model, problem, solver, wanted).value.x

    def loss(made: torch.Tensor, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (made - target).square().flatten(1).mean(dim=1) + 0.01 * x.square().mean(dim=1)

    for method, rate, steps in (("gradient-descent", 4.0, 150), ("adam", 0.1, 100), ("adam-published", 0.1, 100)):
        x = generation.nested(model, loss, wanted, method, steps=steps, rate=rate, tolerance=1e-6)  # type: ignore[arg-type]
        assert float((x - expected).norm() / expected.norm()) < 0.05
    rough = generation.nested(model, loss, wanted, "adam-one-step", steps=100, rate=0.1, tolerance=1e-3)
    assert float(loss(model(rough), rough, wanted).mean()) < 0.3 * float(wanted.square().mean())


@pytest.mark.parametrize("kind", ["mlp", "conv", "mdeq"])
def test_training_lowers_the_loss(kind: str) -> None:
    config = few(equilibria=Equilibria(jacobian_weight=0.1))
    config = replace(config, decoder=replace(config.decoder, kind=kind, width=24, channels=4))
    torch.manual_seed(0)
    task = Generation(config)
    batch = (task.data.training.images[:20], None)
    found = descent(task, [batch] * 12)
    assert found[-1] < 0.8 * found[0]
    sums = task.score(batch)
    figures = task.figures(sums.tolist())
    assert 0 < figures["mse"] <= figures["loss"]


@pytest.mark.parametrize("model", ["vae", "rae"])
def test_latents_of_an_autoencoder_by_joint_inference(model: Any) -> None:
    torch.manual_seed(0)
    task = Generation(few(model=model))
    batch = (task.data.training.images[:20], None)
    found = descent(task, [batch] * 25)
    assert found[-1] < found[0]
    images = batch[0]
    assert task.latents(images).shape == task.joint_latents(images).shape == (20, task.config.decoder.latent)
    errors = [
        float((task.images(x) - images).square().mean()) for x in (task.latents(images), task.joint_latents(images))
    ]
    assert errors[1] < errors[0], "of the same decoder, the encoder is no better than the least error"


def test_the_gradient_is_that_of_a_longer_solve() -> None:
    torch.manual_seed(0)
    task = Generation(few()).double().eval()
    images = task.data.training.images[:6].double()
    slopes = []
    for steps in (400, 800):
        problem = reconstruction(task.decoder, 1e-2, 10.0, 64)
        solver = replace(joint_solver(task.config.joint, steps), rtol=1e-10)
        value = decoder.found(task.decoder, problem, solver, images, gradient=ti.Envelope()).value
        slopes.append(
            torch.autograd.grad(problem.loss(value.z, value.x, images).mean(), list(task.decoder.parameters()))
        )
    for one, other in zip(*slopes, strict=True):
        assert torch.allclose(one, other, atol=1e-7)


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="--curves measures joint inference"):
        GenerationConfig(model="vae", curves=True)
    with pytest.raises(UserError, match="--step-size must be positive"):
        Joint(step_size=0.0)
    with pytest.raises(UserError, match="omit --data-dir"):
        Images(data="digits", data_dir=".")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--components 50 is more than there are training images"):
        RUNNER.check(replace(few(), components=50))


def test_mosaic() -> None:
    picture = mosaic([torch.zeros(3, 1, 4, 5), torch.ones(3, 2, 4, 5)])
    assert picture.shape == (2 * 6, 3 * 7)
    assert float(picture[2, 2]) == 0
    assert float(picture[0, 0]) == float(picture[8, 2]) == 1


def test_the_cheapest_joint_solve_that_is_as_good() -> None:
    measured = [(JOINT, 10, 1.0, 0.5), (JOINT, 20, 2.0, 0.3), (JOINT, 30, 3.0, 0.2), ("adam", 40, 10.0, 0.3),
                ("adam", 10, 3.0, 0.1)]  # fmt: skip
    one = {"points": [dict(zip(("method", "steps", "seconds", "loss"), point, strict=True)) for point in measured]}
    better = generation.overtaking(one, "adam", 40)
    assert better is not None
    assert (better.steps, better.ratio) == (20, 5.0)
    assert generation.overtaking(one, "adam", 10) is None


@pytest.mark.parametrize("kind", [None, "mdeq"])
def test_jobs_survive_their_description(kind: Kind | None) -> None:
    config = JiioGenerationConfig(kind=kind)
    for job in generation.jobs(config):
        assert from_plain(type(job.config), to_plain(job.config)) == job.config
        assert job.config.decoder.kind == (kind or "mlp")
    TABLE.check(config)


def test_the_table_with_one_seed_and_with_none(tmp_path: Any) -> None:
    config = JiioGenerationConfig()
    runs = run_jobs(generation.jobs(config)[:2], tmp_path, lambda one: few(model=one.model, curves=one.curves))
    for run in runs.values():
        assert min(evaluations for _, evaluations in logged(run)) > 1, "those of joint solves count as the layer's do"
    summary = TABLE.summarize(config, runs)
    assert len(summary.claims) == 7
    assert {d.name for d in summary.drawings} == {"curves-jiio", "images-jiio", "images-vae"}
    assert "wide-0, rae-0, long-0, jiio-1" in summary.notes[-1]
    RUNNER.evaluate(few(model="vae"), run, QUIET)
    nothing = TABLE.summarize(config, {})
    assert not nothing.claims
    assert not nothing.drawings

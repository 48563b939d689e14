"""Adversarial training by joint inference, on models of a few neurons."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")
pytest.importorskip("sklearn")

from made_up_images import write_mnist
from running import assert_resumes, trained
from torch.nn import functional

import torchimplicit as ti
from torchimplicit.models import EquilibriumClassifier, EquilibriumClassifierConfig
from torchimplicit.recipes.joint import adversarial as table
from torchimplicit.recipes.joint.adversarial import RUNNER as TRAINER
from torchimplicit.recipes.joint.adversarial import (
    AdversarialConfig,
    AdversarialTableConfig,
    AdversarialTraining,
    AttacksConfig,
    adversarial_mdeq,
    jointly,
)
from torchimplicit.recipes.joint.adversarial import adversarial_digits as digits
from torchimplicit.recipes.joint.adversarial import adversarial_mnist as mnist
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Machine, from_plain, to_plain
from torchimplicit.recipes.runtime.table import Plan
from torchimplicit.recipes.runtime.task import Shard
from torchimplicit.recipes.runtime.trainer import Results

pytestmark = pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")


@pytest.fixture
def trained_like() -> tuple[EquilibriumClassifier, torch.Tensor, torch.Tensor]:
    """A random classifier whose scores matter, in float64, and images."""
    torch.manual_seed(0)
    tight = ti.Anderson(rtol=1e-10, max_steps=200)
    model = EquilibriumClassifier(EquilibriumClassifierConfig(channels=12, bound=0.5), solver=tight).double().eval()
    with torch.no_grad():
        model.readout.weight.mul_(4)
    return model, torch.rand(6, 1, 8, 8).double(), torch.arange(6)


def small(**changes) -> AdversarialConfig:
    base = digits()
    return replace(
        base,
        channels=8,
        attack_steps=3,
        validation_images=20,
        train_images=30,
        test_images=20,
        optimization=replace(base.optimization, steps=2, batch_size=8, validate_every=1),
        machine=Machine(device="cpu", tensorboard=False),
        **changes,
    )


def test_the_envelope_gradient_is_the_exact_one(trained_like) -> None:
    model, images, labels = trained_like
    parameters = list(model.parameters())
    found = jointly(model, images, labels, 0.3, steps=400, step_size=0.2, tolerance=1e-10)
    by_envelope = torch.autograd.grad(functional.cross_entropy(model.read(found.value.z), labels), parameters)
    at = functional.cross_entropy(model(images + found.value.x.detach(), model.start(images)), labels)
    for got, right in zip(by_envelope, torch.autograd.grad(at, parameters), strict=True):
        assert torch.linalg.vector_norm(got - right) <= 1e-5 * torch.linalg.vector_norm(right)


@pytest.mark.parametrize(
    "changes",
    [
        {"adversary": "none"},
        {"adversary": "pgd"},
        {"adversary": "jiio"},
        {"adversary": "jiio", "attack_gradient": "envelope"},
        {"adversary": "jiio", "model": "mdeq", "norm": "linf"},
    ],
    ids=lambda c: "-".join(c.values()),
)
def test_training(changes, tmp_path) -> None:
    results = Results.of(trained("jiio-adversarial-digits", small(**changes), tmp_path / "run"))
    assert results.state == "complete"
    assert set(results.test.figures) == {"accuracy", "loss", "attacked", "attacked_loss"}
    # the map of an untrained multiscale model does not contract, and joint inference finds nothing there
    assert "model" in changes or results.test.figures["attacked_loss"] > results.test.figures["loss"]


@pytest.mark.parametrize(
    "changes",
    [{"adversary": "pgd"}, {"adversary": "jiio"}, {"adversary": "jiio", "attack_gradient": "envelope"}],
    ids=lambda c: "-".join(c.values()),
)
def test_a_resumed_run_is_the_undisturbed_one(changes, tmp_path) -> None:
    steps = assert_resumes("jiio-adversarial-digits", small(**changes), tmp_path)
    assert min(evaluations for _, evaluations in steps) >= small().attack_steps, "the attack's count"


def test_the_jacobian_penalty_counts_under_the_envelope() -> None:
    plain, penalized = (
        small(attack_gradient="envelope", equilibria=replace(digits().equilibria, jacobian_weight=weight))
        for weight in (0.0, 10.0)
    )
    torch.manual_seed(0)
    task = AdversarialTraining(plain)
    batch = next(iter(task.training_batches(range(1), Shard())))
    without = task.loss(batch)
    task.config = penalized
    assert task.loss(batch).item() > without.item()


def test_mnist_by_convolution(tmp_path) -> None:
    config = replace(
        mnist(),
        data_dir=write_mnist(tmp_path / "data"),
        validation_images=10,
        test_images=10,
        channels=4,
        attack_steps=2,
        machine=Machine(device="cpu", tensorboard=False),
    )
    TRAINER.check(config)
    task = TRAINER.module(config).task
    images, labels = next(iter(task.held_out_batches("test", Shard())))
    assert torch.isfinite(task.loss((images, labels)))


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(UserError, match="--attack-gradient envelope needs"):
        AdversarialConfig(data="digits", adversary="pgd", attack_gradient="envelope")
    with pytest.raises(UserError, match="--model tanh and --norm l2 alone"):
        AdversarialConfig(data="digits", adversary="jiio", attack_gradient="envelope", norm="linf")
    with pytest.raises(UserError, match="--radius must be positive"):
        AdversarialConfig(data="digits", radius=0)
    with pytest.raises(UserError, match="--pgd-steps must be"):
        AttacksConfig(pgd_steps=())


def test_the_table_on_a_multiscale_model() -> None:
    config = AdversarialTableConfig(plan=Plan(seeds=1), model="mdeq", norm="linf")
    jobs = table.jobs(config)
    assert [job.name for job in jobs] == ["clean-seed0", "pgd-seed0", "jiio-seed0"]
    training = jobs[0].config.training
    assert (training.model, training.norm, training.radius) == ("mdeq", "linf", 0.1)
    assert training.equilibria == adversarial_mdeq().equilibria


def test_the_table(tmp_path) -> None:
    config = AdversarialTableConfig(plan=Plan(seeds=1))
    jobs = table.jobs(config)
    assert [job.name for job in jobs] == ["clean-seed0", "pgd-seed0", "jiio-seed0", "envelope-seed0"]
    runs = {}
    for job in jobs[1:3]:
        assert from_plain(AttacksConfig, to_plain(job.config)) == job.config
        training = small(adversary=job.config.training.adversary)
        attacks = replace(
            job.config, training=training, pgd_steps=(1, 2), jiio_steps=(2, 4), step_sizes=(1.0,), tolerances=(0.1,)
        )
        attacks = replace(attacks, tuning_images=10, attacked_images=10, repeats=1)
        run = trained(job.recipe, attacks, tmp_path / job.name)
        attacked = {"clean", "PGD-1", "PGD-2", table.AS_PUBLISHED, "JIIO-2", "JIIO-4", "JIIO-4, Anderson"}
        assert set(run.read_json("attacks.json")) == attacked
        runs[job.name] = run
    full = AttacksConfig(pgd_steps=(1, 2), jiio_steps=(2, 4))
    kept = table.attacked
    try:
        table.attacked = lambda *_: full
        summary = table.TABLE.summarize(config, runs)
        assert table.TABLE.summarize(config, {}).runs == {}
    finally:
        table.attacked = kept
    assert summary.sheets[0].table.rows[1][1] != "–"
    assert len(summary.claims) >= 3
    assert any("PGD-20, as published" in claim.statement for claim in summary.claims)
    assert {drawing.name for drawing in summary.drawings} == {"strength", "pictures"}

"""Contexts by joint inference, on models of a few neurons and made-up meta."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")

from PIL import Image
from running import assert_resumes, trained

import torchimplicit as ti
from torchimplicit.models import ContextEquilibrium, ContextEquilibriumConfig
from torchimplicit.recipes.joint import meta
from torchimplicit.recipes.joint.meta import RUNNER as TRAINER
from torchimplicit.recipes.joint.meta import (
    AdaptationsConfig,
    Descent,
    Joint,
    MetaConfig,
    MetaTableConfig,
    errors,
    exact,
    omniglot,
    sinusoid,
)
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Machine, from_plain, to_plain
from torchimplicit.recipes.runtime.table import Plan
from torchimplicit.recipes.runtime.task import Shard
from torchimplicit.recipes.runtime.trainer import Results

pytestmark = pytest.mark.filterwarnings("ignore::torchimplicit.ConvergenceWarning")


@pytest.fixture(autouse=True)
def _forget():
    yield
    meta._characters.cache_clear()


def small(config: MetaConfig, **changes) -> MetaConfig:
    return replace(
        config,
        state_size=8,
        context_size=3,
        adaptation_steps=3,
        queries=2,
        held_out_tasks=4,
        optimization=replace(config.optimization, steps=2, batch_size=3, validate_every=1),
        machine=Machine(device="cpu", tensorboard=False),
        **changes,
    )


def write_omniglot(folder, count=75, drawings=20):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / meta.FILE.name, "w") as archive:
        for character in range(count):
            for drawing in range(drawings):
                buffer = io.BytesIO()
                Image.fromarray(np.full((105, 105), character + drawing, np.uint8)).save(buffer, "png")
                archive.writestr(f"images/Made_up/character{character:02}/{drawing:02}.png", buffer.getvalue())
    return folder


@pytest.fixture
def model() -> ContextEquilibrium:
    torch.manual_seed(0)
    tight = ti.Anderson(rtol=1e-11, max_steps=200)
    return ContextEquilibrium(
        torch.nn.Linear(1, 6), ContextEquilibriumConfig(state=6, context=2, bound=0.5), solver=tight
    ).double()


@pytest.fixture
def waves():
    return type(drawn := meta.draw_waves(3, 4, 5, torch.Generator().manual_seed(0)))(*(part.double() for part in drawn))


def test_both_adaptations_find_the_same_context(model, waves) -> None:
    features = model.encode(waves.support).detach()
    joint = Joint(steps=1500, step_size=0.3, penalty=0.3, tolerance=1e-7)(model, features, waves.support_targets)
    descent = Descent(steps=150, step_size=0.3, penalty=0.3)(model, features, waves.support_targets)
    assert joint.context.shape == (3, 2)
    assert torch.allclose(joint.context, descent.context, atol=2e-3)
    assert not joint.context.requires_grad
    assert not descent.context.requires_grad


def test_contexts_of_sine_waves_are_found_by_default() -> None:
    task = TRAINER.module(sinusoid()).task
    tasks = task.held_out("validation", 16)
    features = task.model.encode(tasks.support).detach()
    told: list[ti.Solution] = []
    replace(task.adapt(learning=False), seen=told.append)(task.model, features, tasks.support_targets)
    assert told[0].converged.double().mean() > 0.9


def test_the_exact_gradient_is_that_through_many_steps_of_descent(model, waves) -> None:
    parameters = list(model.modulation.parameters())

    def gradient(adapt) -> torch.Tensor:
        context = adapt(model, model.encode(waves.support), waves.support_targets).context
        loss = errors(model(model.encode(waves.query), context), waves.query_targets).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    shared = {"step_size": 0.3, "penalty": 0.3}
    through = gradient(Descent(steps=60, **shared, differentiable=True))
    by_adjoint = gradient(Joint(steps=1500, **shared, tolerance=1e-7, gradient=exact(200, 1e-8)))
    first_order = gradient(Joint(steps=1500, **shared, tolerance=1e-7))
    assert torch.linalg.vector_norm(by_adjoint - through) < 0.02 * torch.linalg.vector_norm(through)
    assert torch.linalg.vector_norm(first_order - through) > 0.1 * torch.linalg.vector_norm(through)


@pytest.mark.parametrize("adaptation", ["jiio", "jiio-first-order", "jiio-unrolled", "descent"])
@pytest.mark.parametrize("data", ["sinusoid", "omniglot"])
def test_training(data, adaptation, tmp_path) -> None:
    base = sinusoid() if data == "sinusoid" else replace(omniglot(), data_dir=write_omniglot(tmp_path / "data"))
    results = Results.of(trained(f"jiio-meta-{data}", small(base, adaptation=adaptation), tmp_path / "run"))
    assert results.state == "complete"
    assert results.steps == 2
    assert ("accuracy" in results.test.figures) == (data == "omniglot")


@pytest.mark.parametrize("adaptation", ["jiio", "jiio-unrolled", "descent"])
def test_a_resumed_run_is_the_undisturbed_one(adaptation, tmp_path) -> None:
    config = small(sinusoid(), adaptation=adaptation)
    steps = assert_resumes("jiio-meta-sinusoid", config, tmp_path)
    assert min(evaluations for _, evaluations in steps) >= config.adaptation_steps, "those of the support count"


def test_tasks_depend_on_seed_and_step_alone() -> None:
    task = TRAINER.module(small(sinusoid())).task
    first, second = list(task.training_batches(range(2), Shard()))
    (again,) = list(task.training_batches(range(1, 2), Shard()))
    assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
    assert not torch.equal(first[0], second[0])
    shares = [next(iter(task.training_batches(range(1), Shard(rank, 2))))[0] for rank in range(2)]
    assert [len(share) for share in shares] == [2, 1]


def test_characters_are_split_and_support_and_query_do_not_overlap(tmp_path) -> None:
    found = meta.load(write_omniglot(tmp_path))
    assert {name: len(part) for name, part in found.items()} == {"validation": 24, "test": 24, "training": 27}
    seen = [set(part[:, 0, 0, 0, 0].tolist()) for part in found.values()]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert len(meta.turned(found["training"])) == 108
    drawn = meta.draw_characters(found["test"], 6, 5, 1, 3, torch.Generator().manual_seed(0))
    assert drawn.support.shape == (6, 5, 1, 28, 28)
    assert drawn.query.shape == (6, 15, 1, 28, 28)
    assert drawn.query_targets[0].tolist() == [label for label in range(5) for _ in range(3)]
    for images, query in zip(drawn.support, drawn.query, strict=True):
        for label in range(5):
            assert float(images[label].mean()) not in query[3 * label : 3 * label + 3].mean((1, 2, 3)).tolist()


def test_bad_input(tmp_path) -> None:
    with pytest.raises(UserError, match=r"has no images_background_small1\.zip"):
        meta.load(tmp_path)
    (tmp_path / meta.FILE.name).write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot be read"):
        meta.load(tmp_path)
    with pytest.raises(UserError, match="has not 20 drawings"):
        meta.load(write_omniglot(tmp_path / "few", count=2, drawings=3))
    with pytest.raises(UserError, match="20 drawings of each"):
        replace(omniglot(), shots=10, queries=11)
    with pytest.raises(UserError, match="omit --data-dir"):
        replace(sinusoid(), data_dir=tmp_path)
    with pytest.raises(UserError, match="--jiio-steps must be"):
        AdaptationsConfig(jiio_steps=())


def test_the_table(tmp_path) -> None:
    config = MetaTableConfig(plan=Plan(seeds=1))
    jobs = meta.jobs(config)
    assert len(jobs) == 10
    runs, names = {}, {*(f"JIIO-{n}" for n in (2, 5, 25, 100)), "descent-1", "descent-5"}
    for job in jobs[:5]:
        assert from_plain(AdaptationsConfig, to_plain(job.config)) == job.config
        training = small(sinusoid(), adaptation=job.config.training.adaptation)
        few = replace(
            job.config,
            training=training,
            adapted_tasks=4,
            repeats=1,
            step_sizes=(1.0,),
            jiio_steps=(2, 5, 25, 100),
            descent_steps=(1, 5),
        )
        run = trained(job.recipe, few, tmp_path / job.name)
        assert set(run.read_json("adaptations.json")) == names
        runs[job.name] = run
    summary = meta.TABLE.summarize(config, runs)
    assert len(summary.sheets) == 6
    assert len(summary.claims) == 8
    some = meta.TABLE.summarize(config, {jobs[0].name: runs[jobs[0].name]})
    assert len(some.sheets) == 2
    assert meta.TABLE.summarize(config, {}).sheets == []

"""The image recipes, on made-up data of the real shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("tyro")

from made_up_images import write_cifar, write_imagenet, write_mnist
from rich.console import Console

from torchimplicit import cli
from torchimplicit.models import mdeq_imagenet, mdeq_large, mdeq_tiny
from torchimplicit.recipes import registry
from torchimplicit.recipes.phantom import image_data as data
from torchimplicit.recipes.phantom import images as tasks
from torchimplicit.recipes.phantom.image_data import augmented
from torchimplicit.recipes.phantom.images import ImageConfig, cifar10, cifar10_large, digits, imagenet, mnist
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import RunOptions, create
from torchimplicit.recipes.runtime.settings import Machine
from torchimplicit.recipes.runtime.task import Shard
from torchimplicit.recipes.runtime.trainer import Results

MADE_UP = {
    "images-digits": (lambda folder: None, {"validation_images": 60, "train_images": 40, "test_images": 40}),
    "images-mnist": (write_mnist, {"validation_images": 10}),
    "images-cifar10": (write_cifar, {"validation_images": 10, "model": "small", "downsamplings": 2}),
    "images-cifar10-large": (write_cifar, {"validation_images": 10, "model": "small", "downsamplings": 2}),
    "images-imagenet": (
        write_imagenet,
        {"validation_images": 2, "model": "small", "downsamplings": 2, "classes": 2, "image_size": 32},
    ),
}


@pytest.fixture(autouse=True)
def _forget():
    yield
    data._kept.cache_clear()


def shortened(name, folder):
    """A recipe's own settings, but for two steps of a small model on made-up data."""
    config = registry.settings(name)
    write, changes = MADE_UP[name]
    return replace(
        config,
        **changes,
        data_dir=write(folder),
        optimization=replace(config.optimization, steps=2, batch_size=4, validate_every=2),
        equilibria=replace(config.equilibria, solver_steps=4, backward_steps=4),
        machine=Machine(device="cpu", tensorboard=False),
    )


def trained(config, path):
    runner = registry.runner("images-digits")
    runner.check(config)
    run = create("images-digits", RunOptions(output=path))
    run.describe("images-digits", config)
    assert runner.train(config, run, Console(quiet=True))
    return Results.of(run)


@pytest.mark.parametrize("name", MADE_UP)
def test_two_steps_of_every_recipe(name, tmp_path):
    results = trained(shortened(name, tmp_path / "data"), tmp_path / "run")
    assert results.steps == 2
    assert results.test is not None
    assert 0 <= results.test.figures["accuracy"] <= 1
    assert results.costs is not None
    assert results.costs.backward == 4, "the products of the phantom gradient"


@pytest.mark.parametrize("gradient", ["implicit", "neumann-phantom"])
def test_the_estimator_and_pretraining(gradient, tmp_path):
    config = shortened("images-digits", tmp_path)
    config = replace(
        config,
        dropout=0.2,
        equilibria=replace(config.equilibria, gradient=gradient, pretrain_steps=1, pretrain_depth=2),
    )
    assert trained(config, tmp_path / "run").test is not None


def test_the_published_models():
    assert tasks.sizes(cifar10()) == mdeq_tiny()
    assert tasks.sizes(cifar10_large()) == mdeq_large()
    assert tasks.sizes(imagenet()) == mdeq_imagenet()
    assert tasks.sizes(mnist()).image_channels == 1


def test_a_pass_of_the_published_steps_is_an_epoch():
    assert cifar10().optimization.validate_every == 45_000 // 128
    assert imagenet().optimization.steps == 100 * ((1_281_167 - 10_000) // 128)


def test_batches_depend_on_the_step_alone(tmp_path):
    for name in ("images-cifar10-large", "images-imagenet"):
        task = tasks.Classification(shortened(name, tmp_path / name))
        whole = [images for images, _ in task.training_batches(range(4), Shard())]
        later = [images for images, _ in task.training_batches(range(2, 4), Shard())]
        assert all(torch.equal(a, b) for a, b in zip(whole[2:], later, strict=True))
        assert not torch.equal(whole[0], whole[-1])


def test_images_are_shifted_and_mirrored():
    image = torch.arange(1, 1 + 6 * 6, dtype=torch.uint8).reshape(1, 1, 6, 6).expand(200, 2, 6, 6)
    out = augmented(image, torch.Generator().manual_seed(0))
    assert out.shape == image.shape
    assert torch.equal(out[:, 0], out[:, 1])
    right, left = out[:, 0, 2, 1:] - out[:, 0, 2, :-1], (out[:, 0, 2, 1:] > 0) & (out[:, 0, 2, :-1] > 0)
    mirrored = ((right.to(torch.int16) == 255) & left).any(dim=1)
    assert 60 < int(mirrored.sum()) < 140
    assert (out == 0).any()
    assert len({row.numpy().tobytes() for row in out}) > 100


def test_settings_that_make_no_sense():
    for changes, words in (
        ({"dropout": 1.0}, "--dropout"),
        ({"validation_images": 0}, "--validation-images"),
        ({"data": "imagenet", "augment": True}, "--augment"),
    ):
        with pytest.raises(UserError, match=words):
            ImageConfig(**{"data": "digits", **changes})


def test_bad_data_is_found_before_a_run_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data")
    (tmp_path / "data" / "train-labels-idx1-ubyte.gz").write_bytes(b"")
    assert cli.main(["train", "images-mnist", "--data-dir", "data"]) == 2
    assert "train-labels-idx1-ubyte.gz" in capsys.readouterr().err
    assert cli.main(["train", "images-imagenet", "--data-dir", "data"]) == 2
    assert cli.main(["train", "images-imagenet"]) == 2
    assert not (tmp_path / "runs").exists()


def test_the_digits_are_learned():
    assert digits().data_dir is None

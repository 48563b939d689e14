"""Training a generative model, and what it can do afterwards: reconstruct, interpolate, make new images."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from rich.console import Console
from sklearn.exceptions import ConvergenceWarning as MixtureWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.recipes.jiio.config import GenerationConfig
from torchimplicit.recipes.jiio.curves import Curves, curves
from torchimplicit.recipes.jiio.data import read as read_images
from torchimplicit.recipes.jiio.frechet import distance, features
from torchimplicit.recipes.jiio.generation import Generation, ready
from torchimplicit.recipes.jiio.pictures import grid
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.fitting import load_weights
from torchimplicit.recipes.runtime.page import FIGURE, save_figure
from torchimplicit.recipes.runtime.run import Run, threads
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.recipes.runtime.trainer import Trainer

TRAINER = Trainer(Generation, ready)

SHOWN = 12
"""Images in a row of a picture."""

PICTURES = "pictures.pt"


@dataclass(frozen=True)
class Generated:
    """What a trained model makes, in Fréchet distances to the test images (see :mod:`.frechet`).

    Attributes:
        floor: of the training images, which no model can be expected to beat by much.
        reconstructions: of the test images made anew.
        mixture, gaussian: of new images, from a Gaussian mixture and one Gaussian fitted on the training latents.
        prior: of new images from the autoencoder's own prior; ``None`` without one.
        accuracy: of the classifier in whose features this is, on the test images.
        mse: of the reconstructions, the mean over pixels.
    """

    floor: float
    reconstructions: float
    mixture: float
    gaussian: float
    prior: float | None
    accuracy: float
    mse: float


class GenerationRunner:
    """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""

    def check(self, config: GenerationConfig) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        TRAINER.check(config)
        count = len(read_images(config.images).training.labels)
        if config.components > count:
            raise UserError(f"--components {config.components} is more than there are training images ({count})")

    def train(self, config: GenerationConfig, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        if not TRAINER.train(config, run, console):
            return False
        self._show(config, run, console, "generation.json")
        return True

    def evaluate(self, config: GenerationConfig, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        TRAINER.evaluate(config, run, console)
        self._show(config, run, console, "generation.json")

    def _show(self, config: GenerationConfig, run: Run, console: Console, name: str) -> None:
        module = TRAINER.module(config)
        load_weights(module, run.best)
        task = module.task.cpu().eval()
        assert isinstance(task, Generation)
        with threads(config.machine.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.simplefilter("ignore", MixtureWarning)
            with console.status("Making images"):
                found, pictures = made(config, task)
            run.write_json(name, found)
            files.save({key: [row.half() for row in rows] for key, rows in pictures.items()}, run.path / PICTURES)
            with matplotlib.rc_context(FIGURE):
                save_figure(grid(pictures), run.product("pictures.png"), 150)
            console.print(
                f"Fréchet distance to the test images, in a small classifier's features: new {found.mixture:.3f}, "
                f"reconstructions {found.reconstructions:.3f}, training images {found.floor:.3f}. Pictures: "
                f"{run}/pictures.png",
                highlight=False,
            )
            if config.curves:
                with console.status("Measuring loss against time"):
                    tuned, tested = (p.images[: config.curve_images] for p in (task.data.validation, task.data.test))
                    measured = curves(task.decoder, config.joint, tuned, tested, config.curve_repeats)
                run.write_json("curves.json", measured)


RUNNER = GenerationRunner()


def made(config: GenerationConfig, task: Generation) -> tuple[Generated, dict[str, list[Tensor]]]:
    """The figures, and rows of images by what they show."""
    data = task.data
    network, accuracy = features(config.images)
    known, found = (task.latents(part) for part in (data.training.images[: config.density_images], data.test.images))
    again = task.images(found)
    seed = config.optimization.seed
    chosen = {"mixture": config.components, "gaussian": 1}
    drawn = {name: _drawn(known, components, config.samples, seed) for name, components in chosen.items()}
    if config.model == "vae":
        drawn["prior"] = torch.randn(config.samples, known.shape[1], generator=torch.Generator().manual_seed(seed))
    new = {name: task.images(x) for name, x in drawn.items()}
    distances = {name: distance(network, images, data.test.images) for name, images in new.items()}
    figures = Generated(
        floor=distance(network, data.training.images, data.test.images),
        reconstructions=distance(network, again, data.test.images),
        mixture=distances["mixture"],
        gaussian=distances["gaussian"],
        prior=distances.get("prior"),
        accuracy=accuracy,
        mse=float((again - data.test.images).square().mean()),
    )
    return figures, {
        "test images, and their reconstructions": [data.test.images[:SHOWN], again[:SHOWN]],
        "from one test image to another, along a line between their latents": [
            task.images(found[i].lerp(found[i + 1], torch.linspace(0, 1, SHOWN)[:, None])) for i in (0, 2, 4)
        ],
        "new images, from a Gaussian mixture of the training images' latents": [
            new["mixture"][i * SHOWN : (i + 1) * SHOWN] for i in range(3)
        ],
    }


def _drawn(latents: Tensor, components: int, count: int, seed: int) -> Tensor:
    """Latents from a Gaussian mixture fitted on others, in random order."""
    count_of = min(components, len(latents))
    density = GaussianMixture(count_of, reg_covar=1e-4, random_state=seed).fit(latents.double().numpy())
    drawn = torch.as_tensor(density.sample(count)[0], dtype=latents.dtype)
    return drawn[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]


def read(run: Run) -> Generated | None:
    """What a run has made, if it got so far."""
    return from_plain(Generated, run.read_json("generation.json")) if (run.path / "generation.json").is_file() else None


def read_curves(run: Run) -> Curves | None:
    """What it measured."""
    return from_plain(Curves, run.read_json("curves.json")) if (run.path / "curves.json").is_file() else None


def read_pictures(run: Run) -> dict[str, list[Tensor]] | None:
    """Its pictures' rows."""
    path = run.path / PICTURES
    if not path.is_file():
        return None
    stored: Any = files.load(path)
    return {key: [row.float() for row in rows] for key, rows in stored.items()}

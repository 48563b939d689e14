"""Inverse problems by joint inference: the recipe."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.gradients import Envelope, FixedInput, Gradient, Implicit
from torchimplicit.linear import GMRES
from torchimplicit.problems import JointInference
from torchimplicit.recipes.joint.decoder import found, grid, joint_solver, make_decoder, read, squared_error
from torchimplicit.recipes.joint.generation import PICTURES, SHOWN, ready
from torchimplicit.recipes.joint.settings import InverseConfig
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.fitting import load_weights
from torchimplicit.recipes.runtime.page import save_figure, styled
from torchimplicit.recipes.runtime.run import Run, threads
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.recipes.runtime.task import (
    InOrder,
    Metric,
    Rows,
    Shard,
    ShuffledSteps,
    Split,
    Task,
    generator,
    loader,
)
from torchimplicit.recipes.runtime.trainer import Trainer
from torchimplicit.resolve import resolve
from torchimplicit.solvers import Anderson

# -- Inverse problems, for the framework that trains: images from corrupted ones ---------------------------------------


HELD_OUT_BATCH = 200


class Restoration(Task):
    """A decoder that is fitted to corrupted images, and trained to give the clean ones.

    Attributes:
        prior_shift: what the logarithm of the weight of the latent's prior has moved, over ``config.prior_rate``. The
            exact gradient learns it; to the first-order one it does nothing, since the latent is taken as given.
    """

    metric = Metric("mse", "", "min")

    def __init__(self, config: InverseConfig):
        super().__init__()
        self.config = config
        self.data = read(config.images)
        self.decoder = make_decoder(config.decoder, self.data.pixels, config.equilibria)
        self.prior_shift = nn.Parameter(torch.tensor(0.0), requires_grad=config.through == "exact")
        self.held_out: dict[Split, tuple[Tensor, Tensor]] = {
            "validation": self.corrupted(self.data.validation.images, generator(0, 0)),
            "test": self.corrupted(self.data.test.images, generator(0, 1)),
        }

    @property
    def prior(self) -> Tensor:
        """The weight of the latent's prior."""
        return self.config.joint.prior * (self.config.prior_rate * self.prior_shift).exp()

    def corrupted(self, images: Tensor, source: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """What is seen of images, and where it counts: ones, or zeros where it is missing; ``[n, 1, height, width]``.

        Args:
            images: clean, ``[n, channels, height, width]``.
            source: of the noise or the places; ``None``: the global generator.
        """
        count, _, height, width = images.shape
        if self.config.corruption == "denoising":
            noise = torch.randn(images.shape, generator=source).to(images)
            return images + self.config.noise * noise, torch.ones_like(images[:, :1])
        side = max(1, round(self.config.missing * height))
        top, left = (
            torch.randint(0, size - side + 1, (count, 1), generator=source).to(images.device)
            for size in (height, width)
        )
        down, across = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        rows, columns = (down >= top) & (down < top + side), (across >= left) & (across < left + side)
        seen = (~(rows[:, :, None] & columns[:, None, :]))[:, None].to(images.dtype)
        return images * seen, seen

    def problem(self) -> JointInference:
        """The latent whose image is nearest to what is seen."""
        pixels = math.prod(self.data.pixels)

        # a sum over pixels: see reconstruction
        def loss(made: Tensor, x: Tensor, wanted: Tensor, seen: Tensor, prior: Tensor) -> Tensor:
            misfit = ((made - wanted).square() * seen).flatten(1).sum(dim=1)
            return misfit + pixels * prior * x.square().mean(dim=1)

        return self.decoder.inference(loss, self.config.joint.step_size / pixels)

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`."""
        chosen, data = self.config.optimization, Rows(self.data.training.images)
        return loader(data, ShuffledSteps(len(data), chosen.batch_size, chosen.seed, steps, shard))

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`."""
        data = Rows(self.data.split(split).images, *self.held_out[split])
        return loader(data, InOrder(len(data), HELD_OUT_BATCH, shard))

    def loss(self, batch: Any) -> Tensor:
        """The squared error of what is made of corrupted images to the clean ones."""
        (images,) = batch
        joint, problem = self.config.joint, self.problem()
        solver = joint_solver(joint, joint.joint_steps)
        prior = self.prior
        if self.config.through == "generative":
            whole = torch.ones_like(images[:, :1])
            solution = found(self.decoder, problem, solver, images, whole, prior.detach(), gradient=Envelope())
            self.solved(solution)
            pixels = math.prod(self.data.pixels)
            return problem.loss(solution.value.z, solution.value.x, images, whole, prior.detach()).mean() / pixels
        solution = found(self.decoder, problem, solver, *self.corrupted(images), prior, gradient=self.estimator())
        self.solved(solution)
        return squared_error(self.decoder.head(solution.value.z), images).mean()

    def estimator(self, through: str | None = None) -> Gradient:
        """Of the outer loss; by default the recipe's own."""
        chosen = self.config.equilibria
        linear_solver = GMRES(rtol=chosen.backward_tolerance, max_steps=chosen.backward_steps)
        estimators: dict[str, Any] = {"exact": Implicit, "first-order": FixedInput}
        return estimators[through or self.config.through](linear_solver=linear_solver)

    def slopes(self, images: Tensor, gradient: Gradient, solver: Anderson, seed: int = 0) -> Tensor:
        """The outer loss's gradient in the decoder's weights, flat, for images corrupted with a seed."""
        shown = self.corrupted(images, generator(seed, 2))
        weights = [p for p in self.decoder.parameters() if p.requires_grad]
        prior = self.prior.detach()
        with torch.enable_grad():
            solution = found(self.decoder, self.problem(), solver, *shown, prior, gradient=gradient)
            loss = squared_error(self.decoder.head(solution.value.z), images).mean()
        return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, weights)])

    @torch.no_grad()
    def restored(self, wanted: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The images made of corrupted ones, each at its exact equilibrium; and whether the joint solve converged."""
        joint, problem = self.config.joint, self.problem()
        prior = self.prior
        solution = found(self.decoder, problem, joint_solver(joint, joint.test_steps), wanted, seen, prior)
        self.solved(solution)
        exact = resolve(
            problem, solution.value, wanted, seen, prior, solver=self.decoder.equilibrium.solver, throw=False
        )
        return self.decoder.head(exact.solution.value), solution.converged

    def score(self, batch: Any) -> Tensor:
        """Sums over images of the squared error, of that before restoration, of those whose joint solve stopped at its
        budget; and their number."""
        images, wanted, seen = batch
        made, converged = self.restored(wanted, seen)
        parts = (
            squared_error(made, images).sum(),
            squared_error(wanted, images).sum(),
            (~converged).sum(),
            torch.tensor(len(images), device=images.device),
        )
        return torch.stack([part.double() for part in parts])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Means."""
        errors, before, stopped, count = sums
        mse = errors / count
        return {
            "mse": mse,
            "loss": mse,
            "psnr": -10 * math.log10(mse) if mse > 0 else math.inf,
            "mse_before": before / count,
            "unconverged_latents": stopped / count,
            "prior": float(self.prior.detach()),
        }

    def describe(self) -> str:
        """The data and the model."""
        counts = ", ".join(f"{len(part.labels)} {name}" for name, part in self.data._asdict().items())
        chosen = self.config
        return f"{chosen.images.data}: {counts} images; {chosen.corruption}, trained {chosen.through}."


TRAINER = Trainer(Restoration, ready)


# -- Training on an inverse problem, and pictures of what it restores --------------------------------------------------


class InverseRunner:
    """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""

    def check(self, config: InverseConfig) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        TRAINER.check(config)

    def train(self, config: InverseConfig, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        if not TRAINER.train(config, run, console):
            return False
        self._show(config, run)
        return True

    def evaluate(self, config: InverseConfig, run: Run, console: Console) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        TRAINER.evaluate(config, run, console)
        self._show(config, run)

    def _show(self, config: InverseConfig, run: Run) -> None:
        module = TRAINER.module(config)
        load_weights(module, run.best)
        task = module.task.cpu().eval()
        assert isinstance(task, Restoration)
        with threads(config.machine.threads), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            rows = restored(task)
            run.write_json("gradients.json", compared(task))
        files.save({name: [row.half() for row in shown] for name, shown in rows.items()}, run.path / PICTURES)
        with styled():
            save_figure(grid(rows), run.product("pictures.png"), 150)


RUNNER = InverseRunner()

COMPARED = 16
"""Validation images on which gradients are compared."""

TIGHT = Anderson(memory=30, rtol=1e-5, max_steps=300)
ADJOINT = GMRES(rtol=1e-4, max_steps=200)


@dataclass(frozen=True)
class Gradients:
    """Gradients of the outer loss at the trained weights, beside the exact one of joint and adjoint solves to tight
    tolerances: cosines, and ratios of lengths.

    Attributes:
        exact, exact_length: of the exact one as in training.
        first_order, first_order_length: of the first-order one as in training.
    """

    exact: float
    exact_length: float
    first_order: float
    first_order_length: float


def compared(task: Restoration) -> Gradients:
    """On validation images."""
    images = task.data.validation.images[:COMPARED]
    joint = task.config.joint
    solver = joint_solver(joint, joint.joint_steps)
    reference = task.slopes(images, Implicit(linear_solver=ADJOINT), TIGHT)
    exact, cheap = (task.slopes(images, task.estimator(kind), solver) for kind in ("exact", "first-order"))
    length = float(reference.norm())
    cosines = [float(torch.cosine_similarity(one, reference, dim=0)) for one in (exact, cheap)]
    return Gradients(cosines[0], float(exact.norm()) / length, cosines[1], float(cheap.norm()) / length)


def read_gradients(run: Run) -> Gradients | None:
    """What a run has measured, if it got so far."""
    there = (run.path / "gradients.json").is_file()
    return from_plain(Gradients, run.read_json("gradients.json")) if there else None


def restored(task: Restoration) -> dict[str, list[Tensor]]:
    """A few test images: clean, corrupted and restored."""
    clean = task.data.test.images[:SHOWN]
    wanted, seen = (part[:SHOWN] for part in task.held_out["test"])
    made, _ = task.restored(wanted, seen)
    return {"clean, corrupted and restored test images": [clean, wanted, made]}

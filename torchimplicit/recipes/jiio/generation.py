"""The generative models, for the framework that trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchimplicit.gradients import Envelope
from torchimplicit.problems import FixedPoint, JointInference
from torchimplicit.recipes.jiio.config import GenerationConfig
from torchimplicit.recipes.jiio.data import Part, read
from torchimplicit.recipes.jiio.model import found, generated, joint_solver, latents, make_decoder, reconstruction
from torchimplicit.recipes.jiio.model import squared_error as error
from torchimplicit.recipes.runtime.task import InOrder, Metric, Rows, Shard, ShuffledSteps, Split, Task, loader
from torchimplicit.regularizers import jacobian_frobenius
from torchimplicit.resolve import resolve
from torchimplicit.solution import Solution
from torchimplicit.state import detached

HELD_OUT_BATCH = 200


class Generation(Task):
    """A decoder, and the images that it learns to make."""

    metric = Metric("mse", "", "min")

    def __init__(self, config: GenerationConfig):
        super().__init__()
        self.config = config
        self.data = read(config.images)
        self.decoder = make_decoder(config.decoder, self.data.pixels, config.equilibria)
        self.encoder: nn.Module | None = None
        if config.model == "vae":
            channels, height, width = self.data.pixels
            self.encoder = nn.Sequential(
                nn.Flatten(),
                nn.Linear(channels * height * width, config.encoder_width),
                nn.ReLU(),
                nn.Linear(config.encoder_width, 2 * config.decoder.latent),
            )

    def training_batches(self, steps: range, shard: Shard) -> Iterable[Any]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`."""
        chosen, data = self.config.optimization, Rows(*self.data.training)
        return loader(data, ShuffledSteps(len(data), chosen.batch_size, chosen.seed, steps, shard))

    def held_out_batches(self, split: Split, shard: Shard) -> Iterable[Any]:
        """See :class:`~torchimplicit.recipes.runtime.task.Task`."""
        data = Rows(*self.data.split(split))
        return loader(data, InOrder(len(data), HELD_OUT_BATCH, shard))

    def loss(self, batch: Any) -> Tensor:
        """The least reconstruction loss, or the autoencoder's bound."""
        images, _ = batch
        if self.encoder is not None:
            return self._bound(self.encoder, images)
        joint, weight = self.config.joint, self.config.equilibria.jacobian_weight
        problem = self._problem(images)
        solver = joint_solver(joint, joint.joint_steps, keep_trajectory=weight > 0)
        solution = found(self.decoder, problem, solver, images, gradient=Envelope())
        self.solved(solution)
        loss = problem.loss(solution.value.z, solution.value.x, images).mean() / images[0].numel()
        return loss + weight * self._penalty(problem.f, solution, images) if weight else loss

    def _problem(self, images: Tensor) -> JointInference:
        joint = self.config.joint
        return reconstruction(self.decoder, joint.prior, joint.step_size, images[0].numel())

    def _penalty(self, function: Any, solution: Solution, images: Tensor) -> Tensor:
        """Of the map's Jacobian in the state, at an iterate drawn at random."""
        assert solution.trajectory is not None
        place = int(torch.randint(len(solution.trajectory), ()))
        state = detached(solution.trajectory[place])
        return jacobian_frobenius(FixedPoint(function), state.z, state.x, images)

    def _bound(self, encoder: nn.Module, images: Tensor) -> Tensor:
        mean, log_variance = encoder(images).chunk(2, dim=1)
        x = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
        pixels = images[0].numel()
        return (error(self.decoder(x), images) + self.config.kl_weight / pixels * divergence).mean()

    def latents(self, images: Tensor) -> Tensor:
        """Found, or encoded: the mean."""
        if self.encoder is None:
            return latents(self.decoder, self.config.joint, images)
        with torch.no_grad():
            return self.encoder(images).chunk(2, dim=1)[0]

    def images(self, x: Tensor) -> Tensor:
        """Of latents."""
        return generated(self.decoder, x)

    @torch.no_grad()
    def score(self, batch: Any) -> Tensor:
        """Sums over images of the squared error after an exact solve, of the whole loss, of those whose joint solve
        stopped at its budget; and their number."""
        images, _ = batch
        if self.encoder is not None:
            mean = self.encoder(images).chunk(2, dim=1)[0]
            errors = error(self.decoder(mean), images)
            losses, stopped = errors, torch.zeros(())
        else:
            joint = self.config.joint
            problem = self._problem(images)
            solution = found(self.decoder, problem, joint_solver(joint, joint.test_steps), images)
            self.solved(solution)
            exact = resolve(problem, solution.value, images, solver=self.decoder.equilibrium.solver, throw=False)
            losses = exact.loss / images[0].numel()
            errors = error(self.decoder.head(exact.solution.value), images)
            stopped = (~solution.converged).sum()
        parts = (errors.double().sum(), losses.double().sum(), stopped.double(), torch.tensor(float(len(images))))
        return torch.stack([part.double().cpu() for part in parts]).to(errors.device)

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Means."""
        errors, losses, stopped, count = sums
        return {"mse": errors / count, "loss": losses / count, "unconverged_latents": stopped / count}

    def describe(self) -> str:
        """The data and the model."""
        counts = ", ".join(f"{len(part.labels)} {name}" for name, part in self.parts.items())
        parameters = sum(p.numel() for p in self.parameters())
        return f"{self.config.images.data}: {counts} images; {self.config.model} with {parameters} parameters."

    @property
    def parts(self) -> dict[str, Part]:
        """The splits by name."""
        return self.data._asdict()


def ready(config: Any) -> None:
    """Raise where the images are missing."""
    read(config.images)

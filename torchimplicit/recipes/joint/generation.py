"""A decoder without an encoder, trained by joint inference; nested optimization beside it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchimplicit.gradients import Envelope, Implicit, OneStep
from torchimplicit.linear import GMRES
from torchimplicit.models import EquilibriumDecoder
from torchimplicit.nn import per_solve
from torchimplicit.problems import FixedPoint, JointInference, JointState
from torchimplicit.recipes.joint.decoder import (
    Decoder,
    Images,
    Joint,
    Part,
    distance,
    equilibria,
    features,
    found,
    generated,
    grid,
    joint_solver,
    latents,
    make_decoder,
    reconstruction,
)
from torchimplicit.recipes.joint.decoder import read as read_images
from torchimplicit.recipes.joint.decoder import squared_error as error
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import save_figure, styled
from torchimplicit.recipes.runtime.run import Run, quietly
from torchimplicit.recipes.runtime.settings import (
    Equilibria,
    Machine,
    Optimization,
    positive,
)
from torchimplicit.recipes.runtime.table import Column, Table
from torchimplicit.recipes.runtime.task import (
    Metric,
    Rows,
    SampledTask,
)
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer
from torchimplicit.regularizers import jacobian_frobenius
from torchimplicit.resolve import resolve
from torchimplicit.solution import Solution
from torchimplicit.solve import solve
from torchimplicit.solvers import Anderson, FixedPointIteration
from torchimplicit.state import detached

# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """A generative model: an equilibrium decoder trained by joint inference, or a variational autoencoder with it.

    With --jacobian-weight, the penalty on the map's Jacobian is taken at a random iterate of the joint solve."""

    model: Literal["jiio", "vae"] = "jiio"
    """Decoder alone, or with an encoder."""

    images: Images = field(default_factory=Images)
    decoder: Decoder = field(default_factory=Decoder)
    joint: Joint = field(default_factory=Joint)

    kl_weight: float = 0.02
    """Of the variational autoencoder's divergence, over the number of pixels: twice the variance of a pixel."""

    encoder_width: int = 128
    """Of its encoder's hidden layer."""

    components: int = 10
    """Of the Gaussian mixture fitted on the training images' latents."""

    density_images: int = 4000
    """How many training images the mixture is fitted on, the first ones: the latent of each must be found."""

    samples: int = 1000
    """Images generated for the Fréchet distance."""

    curves: bool = False
    """Also measure the loss against the time of joint and of nested inference, at the trained weights."""

    curve_images: int = 64
    """Test images in that measurement, one batch."""

    curve_repeats: int = 5
    """Of that measurement, of which the median time is taken."""

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "kl_weight", "encoder_width", "components", "density_images", "samples")
        positive(self, "curve_images", "curve_repeats")
        if self.components > self.density_images:
            raise UserError(f"--components {self.components} is more than --density-images {self.density_images}")
        if self.curves and self.model != "jiio":
            raise UserError("--curves measures joint inference, which --model vae has not")


def generation_digits() -> GenerationConfig:
    """The bundled digits: a minute or two on one core."""
    return GenerationConfig(
        optimization=Optimization(steps=400, batch_size=64, learning_rate=3e-3, validate_every=100),
        equilibria=equilibria(),
    )


def generation_mnist() -> GenerationConfig:
    """MNIST."""
    return replace(
        generation_digits(),
        images=Images(data="mnist", validation_images=500, test_images=1000),
        decoder=Decoder(kind="conv", latent=32, channels=16),
        optimization=Optimization(steps=1500, batch_size=64, learning_rate=3e-3, validate_every=300),
    )


def generation_olivetti() -> GenerationConfig:
    """The Olivetti faces."""
    return replace(
        generation_digits(),
        images=Images(data="olivetti", validation_images=40),
        decoder=Decoder(kind="conv", latent=32, channels=16),
        optimization=Optimization(steps=600, batch_size=32, learning_rate=3e-3, validate_every=150),
    )


# -- The alternative to joint inference: an optimizer of the latent around an equilibrium solve ------------------------


Method = Literal["adam", "adam-one-step", "gradient-descent"]
METHODS: tuple[Method, ...] = ("adam", "adam-one-step", "gradient-descent")


def nested(
    decoder: EquilibriumDecoder,
    loss: Callable[..., Tensor],
    wanted: Tensor,
    method: Method,
    *,
    steps: int,
    rate: float,
    tolerance: float,
) -> Tensor:
    """The latents after some steps from zero, ``[batch, latent]``.

    Each step solves the equilibrium to ``tolerance`` from the last one, and the adjoint system likewise; only with
    ``adam-one-step`` is the equilibrium differentiated by one application of the map. Plain iteration is the cheapest
    solver of maps that contract as these do. No weight may ask for a gradient.

    Args:
        decoder: in eval mode.
        loss: ``loss(image, x, wanted)``, ``[batch]``.
        wanted: what is reconstructed.
        method: which optimizer.
        steps, rate: of it.
        tolerance: relative, of both solves.
    """
    cell = per_solve(decoder.equilibrium.cell)
    z, x = decoder.start(len(wanted))
    x = x.requires_grad_()
    optimizer: Any = torch.optim.SGD([x], rate) if method == "gradient-descent" else torch.optim.Adam([x], rate)
    gradient = OneStep() if method == "adam-one-step" else Implicit(linear_solver=GMRES(rtol=tolerance, max_steps=50))
    solver = FixedPointIteration(rtol=tolerance, max_steps=50)
    problem = FixedPoint(cell)
    for _ in range(steps):
        solution = solve(problem, z, x, solver=solver, gradient=gradient, throw=False)
        z = detached(solution.value)
        x.grad = None
        loss(decoder.head(solution.value), x, wanted).sum().backward()
        optimizer.step()
    return x.detach()


# -- Loss against time: joint inference beside nested optimization, at the same weights and for the same images --------
#
# All in eval mode, from the same start, on one thread; step sizes and tolerances are tuned on validation images for
# every
# method, and the loss is that of an exact equilibrium at the latent that came out. The time is that of the process on
# the CPU, the median over repeats in which the methods take turns.


JOINT = "jiio"
JOINT_STEPS = (4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 25, 30, 40, 60)
NESTED_STEPS = (10, 20, 40)
STEP_SIZES = (1.25, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0)
TUNED_AT = 12
DAMPINGS = ((0.8, 0.6, 1.0), (1.0, 0.6, 1.0), (1.0, 1.0, 1.0))
RATES: dict[Method, tuple[float, ...]] = {
    "adam": (0.03, 0.05, 0.1, 0.2, 0.4),
    "adam-one-step": (0.03, 0.05, 0.1, 0.2, 0.4),
    "gradient-descent": (0.5, 1.0, 2.0, 4.0, 8.0),
}
TOLERANCES = (1e-1, 1e-2, 1e-3)
SLACK = 1.01
"""A looser tolerance is taken where its loss is at most this many times that of the tightest."""


@dataclass(frozen=True)
class Measured:
    """One method with one number of steps.

    Attributes:
        method, steps: which.
        seconds: CPU time, the median.
        loss: after an exact solve, the mean over the images.
    """

    method: str
    steps: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Curves:
    """The measurement.

    Attributes:
        points: all.
        step_size, damping: of the joint solves.
        rates, tolerances: of the nested methods.
    """

    points: list[Measured]
    step_size: float
    damping: tuple[float, float, float]
    rates: dict[str, float]
    tolerances: dict[str, float]


def curves(decoder: EquilibriumDecoder, joint: Joint, validation: Tensor, test: Tensor, repeats: int) -> Curves:
    """Tune on ``validation`` and measure on ``test``, both ``[batch, channels, height, width]``. The decoder's weights
    and mode are left as they were."""
    was = decoder.training, [p.requires_grad for p in decoder.parameters()]
    decoder.eval().requires_grad_(False)
    try:
        with quietly():
            return _Measurement(decoder, joint).run(validation, test, repeats)
    finally:
        decoder.train(was[0])
        for parameter, wanted in zip(decoder.parameters(), was[1], strict=True):
            parameter.requires_grad_(wanted)


class _Measurement:
    def __init__(self, decoder: EquilibriumDecoder, joint: Joint):
        self.decoder, self.joint = decoder, joint
        self.exact = Anderson(rtol=1e-6, max_steps=300)

    def run(self, validation: Tensor, test: Tensor, repeats: int) -> Curves:
        pairs = [(size, damping) for size in STEP_SIZES for damping in DAMPINGS]
        step_size, damping = min(
            pairs, key=lambda pair: self.worth(self.jointly(validation, TUNED_AT, *pair), validation)
        )
        rates: dict[str, float] = {}
        tolerances: dict[str, float] = {}
        for method in METHODS:
            tried = {rate: self.tried(validation, method, rate, TOLERANCES[1]) for rate in RATES[method]}
            rate = min(tried, key=lambda rate: tried[rate])
            losses = {tolerance: self.tried(validation, method, rate, tolerance) for tolerance in TOLERANCES}
            rates[method] = rate
            tolerances[method] = next(t for t in TOLERANCES if losses[t] <= SLACK * losses[TOLERANCES[-1]])
        cases: dict[tuple[str, int], Callable[[], Tensor]] = {
            (JOINT, steps): lambda steps=steps: self.jointly(test, steps, step_size, damping)  # type: ignore[misc]
            for steps in JOINT_STEPS
        }
        for method in METHODS:
            for steps in NESTED_STEPS:
                cases[method, steps] = lambda method=method, steps=steps: nested(  # type: ignore[misc]
                    self.decoder,
                    self.loss,
                    test,
                    method,
                    steps=steps,
                    rate=rates[method],
                    tolerance=tolerances[method],
                )
        seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
        losses_of: dict[tuple[str, int], float] = {}
        for repeat in range(repeats + 1):
            for case, run in cases.items():
                began = time.process_time()
                x = run()
                spent = time.process_time() - began
                if repeat:  # the first warms up
                    seconds[case].append(spent)
                else:
                    losses_of[case] = self.worth(x, test)
        points = [Measured(*case, median(seconds[case]), losses_of[case]) for case in cases]
        return Curves(points, step_size, damping, rates, tolerances)

    def loss(self, made: Tensor, x: Tensor, wanted: Tensor) -> Tensor:
        return (made - wanted).square().flatten(1).mean(dim=1) + self.joint.prior * x.square().mean(dim=1)

    def tried(self, wanted: Tensor, method: Method, rate: float, tolerance: float) -> float:
        steps = NESTED_STEPS[-1]
        return self.worth(
            nested(self.decoder, self.loss, wanted, method, steps=steps, rate=rate, tolerance=tolerance), wanted
        )

    @torch.no_grad()
    def jointly(self, wanted: Tensor, steps: int, step_size: float, damping: tuple[float, float, float]) -> Tensor:
        problem = reconstruction(self.decoder, self.joint.prior, step_size, wanted[0].numel())
        problem = replace(problem, damping=damping)
        solver = replace(joint_solver(self.joint, steps), rtol=1e-5)
        return found(self.decoder, problem, solver, wanted).value.x

    @torch.no_grad()
    def worth(self, x: Tensor, wanted: Tensor) -> float:
        pixels = wanted[0].numel()
        problem: Any = reconstruction(self.decoder, self.joint.prior, 1.0, pixels)
        z, _ = self.decoder.start(len(x))
        loss = resolve(problem, JointState(z, z, x), wanted, solver=self.exact, throw=False).loss / pixels
        return float(loss.double().mean().nan_to_num(nan=torch.inf))


# -- The generative models, for the framework that trains --------------------------------------------------------------


class Generation(SampledTask):
    """A decoder, and the images that it learns to make."""

    metric = Metric("mse", "", "min")
    held_out_batch = 200

    def __init__(self, config: GenerationConfig):
        super().__init__()
        self.config = config
        self.data = read_images(config.images)
        self.sets = {name: Rows(*part) for name, part in self.parts.items()}
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
    read_images(config.images)


# -- Training a generative model, and what it can do afterwards: reconstruct, interpolate, make new images -------------


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


def enough(config: GenerationConfig) -> None:
    """Raise where there are fewer images than the mixture has components."""
    count = len(read_images(config.images).training.labels)
    if config.components > count:
        raise UserError(f"--components {config.components} is more than there are training images ({count})")


def shown(config: GenerationConfig, run: Run) -> Generated:
    """What the run's best weights make; pictures, and the measurement of time where it is asked for, go into the run's
    directory."""
    task: Generation = TRAINER.best(config, run).cpu()
    found, pictures = made(config, task)
    files.save({key: [row.half() for row in rows] for key, rows in pictures.items()}, run.path / PICTURES)
    with styled():
        save_figure(grid(pictures), run.product("pictures.png"), 150)
    if config.curves:
        tuned, tested = (part.images[: config.curve_images] for part in (task.data.validation, task.data.test))
        run.write_json("curves.json", curves(task.decoder, config.joint, tuned, tested, config.curve_repeats))
    return found


def distances(found: Generated) -> Table:
    """For people."""
    columns = [Column("Fréchet distance to the test images", "", "In the features of a small classifier.")]
    return Table(
        [*columns, Column("New images"), Column("Reconstructions"), Column("Training images")],
        [["", f"{found.mixture:.3f}", f"{found.reconstructions:.3f}", f"{found.floor:.3f}"]],
    )


RUNNER = Measuring(
    first=TRAINER,
    ready=enough,
    measure=shown,
    show=distances,
    name="generation.json",
    again=None,
    doing="Making images",
)


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
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        density = GaussianMixture(min(components, len(latents)), reg_covar=1e-4, random_state=seed)
        density.fit(latents.double().numpy())
    drawn = torch.as_tensor(density.sample(count)[0], dtype=latents.dtype)
    return drawn[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]


def read_pictures(run: Run) -> dict[str, list[Tensor]] | None:
    """Its pictures' rows."""
    path = run.path / PICTURES
    if not path.is_file():
        return None
    stored: Any = files.load(path)
    return {key: [row.float() for row in rows] for key, rows in stored.items()}

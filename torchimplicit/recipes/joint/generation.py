"""Decoders without encoders, trained by joint inference, compared with nested optimization; and their table."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from torchimplicit._resolve import resolve
from torchimplicit._solve import solve
from torchimplicit.gradients import Envelope, Implicit, OneStep
from torchimplicit.linear import GMRES
from torchimplicit.models import EquilibriumDecoder
from torchimplicit.nn import per_solve
from torchimplicit.problems import FixedPoint, JointInference, JointState
from torchimplicit.recipes.joint.decoder import (
    CELEBA,
    DataName,
    Decoder,
    Images,
    Joint,
    Kind,
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
    refuse_published,
)
from torchimplicit.recipes.joint.decoder import read as read_images
from torchimplicit.recipes.joint.decoder import squared_error as error
from torchimplicit.recipes.runtime import files, table
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import axes, save_figure, style, styled
from torchimplicit.recipes.runtime.run import Run, quietly
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, positive
from torchimplicit.recipes.runtime.step_cost import timed_in_turn
from torchimplicit.recipes.runtime.table import (
    CaptionedFigure,
    Cell,
    Claim,
    Column,
    Job,
    Plan,
    Runs,
    Table,
    TitledTable,
)
from torchimplicit.recipes.runtime.task import Metric, Rows, SampledTask
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer
from torchimplicit.regularizers import jacobian_frobenius
from torchimplicit.solution import Solution
from torchimplicit.solvers import Anderson, Broyden, FixedPointIteration
from torchimplicit.state import detached

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """A generative model: an equilibrium decoder trained by joint inference, or an autoencoder with it.

    With --jacobian-weight, the penalty on the map's Jacobian is taken at a random iterate of the joint solve."""

    model: Literal["jiio", "vae", "rae"] = "jiio"
    """jiio: a decoder alone. vae, rae: the same decoder with the encoder of a variational or a regularized autoencoder
    (Ghosh et al. 2020)."""

    images: Images = field(default_factory=Images)
    decoder: Decoder = field(default_factory=Decoder)
    joint: Joint = field(default_factory=Joint)

    kl_weight: float = 0.02
    """Weight of the variational autoencoder's divergence divided by the number of pixels: twice the variance of a
    pixel. For the regularized autoencoder, the weight of half the latents' squares."""

    decoder_decay: float = 1e-5
    """Weight decay of the regularized autoencoder's decoder."""

    encoder_width: int = 128
    """Width of the encoder's hidden layer."""

    components: int = 10
    """Components of the Gaussian mixture fitted to the training images' latents."""

    density_images: int = 4000
    """Number of training images whose latents the mixture is fitted to. The latent of each must be found."""

    samples: int = 1000
    """Number of images generated for a Fréchet distance."""

    fits: int = 10
    """Number of times that a mixture is fitted and images are generated from it. A Fréchet distance of new images is
    the mean over them: from one fit to the next it varies by more than models differ."""

    curves: bool = False
    """Also measure loss against time for joint and nested inference, at the trained weights."""

    curve_images: int = 64
    """Test images in that measurement, as one batch."""

    curve_repeats: int = 5
    """Number of times each solve is timed in that measurement; the median is reported."""

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(
            self,
            "kl_weight",
            "decoder_decay",
            "encoder_width",
            "components",
            "density_images",
            "samples",
            "fits",
            "curve_images",
        )
        positive(self, "curve_repeats")
        if self.components > self.density_images:
            raise UserError(f"--components {self.components} is more than --density-images {self.density_images}")
        if self.curves and self.model != "jiio":
            raise UserError(f"--curves measures joint inference, which --model {self.model} has not")


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


def generation_images() -> GenerationConfig:
    """Pictures of your own: --images FOLDER."""
    return replace(generation_olivetti(), images=Images(validation_images=20))


# -- The alternative to joint inference: an optimizer of the latent around an equilibrium solve ------------------------


Method = Literal["adam", "adam-one-step", "gradient-descent", "adam-published"]
METHODS: tuple[Method, ...] = ("adam", "adam-one-step", "gradient-descent", "adam-published")
PUBLISHED_TOLERANCE = 1e-5
"""Tolerance of the published nested optimization, which solves from zero by Broyden's method."""


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
    solver of maps that contract as these do. ``adam-published`` solves from zero, by Broyden's method. No weight may
    ask for a gradient.

    Args:
        decoder: in eval mode.
        loss: ``loss(image, x, wanted)``, ``[batch]``.
        wanted: what is reconstructed.
        method: which optimizer.
        steps, rate: its number of steps and learning rate.
        tolerance: relative, of both solves.
    """
    cell = per_solve(decoder.equilibrium.cell)
    z, x = decoder.start(len(wanted))
    x = x.requires_grad_()
    optimizer: Any = torch.optim.SGD([x], rate) if method == "gradient-descent" else torch.optim.Adam([x], rate)
    gradient = OneStep() if method == "adam-one-step" else Implicit(linear_solver=GMRES(rtol=tolerance, max_steps=50))
    cold = method == "adam-published"
    solver = (Broyden if cold else FixedPointIteration)(rtol=tolerance, max_steps=50)
    problem = FixedPoint(cell)
    for _ in range(steps):
        solution = solve(problem, z, x, solver=solver, gradient=gradient, throw=False)
        z = z if cold else detached(solution.value)
        x.grad = None
        loss(decoder.head(solution.value), x, wanted).sum().backward()
        optimizer.step()
    return x.detach()


# -- Loss against time: joint inference beside nested optimization, at the same weights and for the same images --------
#
# All in eval mode, from the same start, on one thread; step sizes and tolerances are tuned on validation images for
# every method, and the loss is that of an exact equilibrium at the latent that came out. The time is that of the
# process on the CPU, the median over repeats in which the methods take turns.


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
"""A looser tolerance is chosen if its loss is at most this many times that of the tightest."""


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
    """The measurements of loss against time.

    Attributes:
        points: all.
        step_size, damping: of the joint solves.
        rates, tolerances: rates and tolerances of the nested methods.
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
        worth = {pair: self.worth(self.jointly(validation, TUNED_AT, *pair), validation) for pair in pairs}
        step_size, damping = min(pairs, key=lambda pair: worth[pair])
        rates: dict[str, float] = {}
        tolerances: dict[str, float] = {}
        for method in METHODS:
            if method == "adam-published":
                rates[method], tolerances[method] = rates["adam"], PUBLISHED_TOLERANCE
                continue
            tried = {rate: self.tried(validation, method, rate, TOLERANCES[1]) for rate in RATES[method]}
            rate = min(tried, key=lambda rate: tried[rate])
            losses = {tolerance: self.tried(validation, method, rate, tolerance) for tolerance in TOLERANCES}
            rates[method] = rate
            tolerances[method] = next(t for t in TOLERANCES if losses[t] <= SLACK * losses[TOLERANCES[-1]])
        cases: dict[tuple[str, int], Callable[[], Tensor]] = {
            (JOINT, steps): partial(self.jointly, test, steps, step_size, damping) for steps in JOINT_STEPS
        }
        for method, steps in itertools.product(METHODS, NESTED_STEPS):
            chosen: dict[str, Any] = {"steps": steps, "rate": rates[method], "tolerance": tolerances[method]}
            cases[method, steps] = partial(nested, self.decoder, self.loss, test, method, **chosen)
        timed = timed_in_turn(cases, repeats, torch.device("cpu"), warm=True)
        points = [Measured(*case, seconds, self.worth(x, test)) for case, (seconds, x) in timed.items()]
        return Curves(points, step_size, damping, rates, tolerances)

    def loss(self, generated: Tensor, x: Tensor, wanted: Tensor) -> Tensor:
        return (generated - wanted).square().flatten(1).mean(dim=1) + self.joint.prior * x.square().mean(dim=1)

    def tried(self, wanted: Tensor, method: Method, rate: float, tolerance: float) -> float:
        chosen: dict[str, Any] = {"steps": NESTED_STEPS[-1], "rate": rate, "tolerance": tolerance}
        return self.worth(nested(self.decoder, self.loss, wanted, method, **chosen), wanted)

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
    """A decoder and its training images."""

    metric = Metric("mse", "", "min")
    held_out_batch = 200

    def __init__(self, config: GenerationConfig):
        super().__init__()
        self.config = config
        self.data = read_images(config.images)
        self.sets = {name: Rows(*part) for name, part in self.data._asdict().items()}
        self.decoder = make_decoder(config.decoder, self.data.pixels, config.equilibria)
        self.encoder: nn.Module | None = None
        if config.model != "jiio":
            channels, height, width = self.data.pixels
            self.encoder = nn.Sequential(
                nn.Flatten(),
                nn.Linear(channels * height * width, config.encoder_width),
                nn.ReLU(),
                nn.Linear(config.encoder_width, (2 if config.model == "vae" else 1) * config.decoder.latent),
            )

    def loss(self, batch: Any) -> Tensor:
        """The least reconstruction loss, or the autoencoder's bound."""
        images, _ = batch
        if self.encoder is not None:
            return (self._bound if self.config.model == "vae" else self._regularized)(self.encoder, images)
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
        """The penalty on the map's Jacobian in the state, at a random iterate."""
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

    def _regularized(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """The loss of a deterministic autoencoder, with squared latents and decoder weights."""
        x, config = encoder(images), self.config
        size = 0.5 * config.kl_weight / images[0].numel() * x.square().sum(dim=1)
        weights = sum((p.square().sum() for p in self.decoder.parameters()), start=x.new_zeros(()))
        return (error(self.decoder(x), images) + size).mean() + config.decoder_decay * weights

    def latents(self, images: Tensor) -> Tensor:
        """The latents: found by the joint solve, or encoded (means)."""
        if self.encoder is None:
            return self.joint_latents(images)
        with torch.no_grad():
            return self.encoder(images)[:, : self.config.decoder.latent]

    def joint_latents(self, images: Tensor) -> Tensor:
        """Found by joint inference, for any of the decoders."""
        return latents(self.decoder, self.config.joint, images)

    def images(self, x: Tensor) -> Tensor:
        """Return the images of latents."""
        return generated(self.decoder, x)

    @torch.no_grad()
    def score(self, batch: Any) -> Tensor:
        """Sums over images of the squared error after an exact solve, of the whole loss, and of unconverged joint
        solves; and the number of images."""
        images, _ = batch
        if self.encoder is not None:
            errors = error(self.decoder(self.latents(images)), images)
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
        """The figures, as means."""
        errors, losses, stopped, count = sums
        return {"mse": errors / count, "loss": losses / count, "unconverged_latents": stopped / count}

    def describe(self) -> str:
        """The data and the model."""
        chosen = self.config
        return f"{chosen.images.name}: {self.counts} images; {chosen.model} with {self.weights} parameters."


def ready(config: Any) -> None:
    """Raise where the images are missing."""
    read_images(config.images)


# -- Training a generative model, and what it can do afterwards: reconstruct, interpolate, make new images -------------


TRAINER = Trainer(Generation, ready)

SHOWN = 12
"""Images in a row of the figure."""

PICTURES = "pictures.pt"


@dataclass(frozen=True)
class Generated:
    """Images of a trained model, judged by Fréchet distances to the test images.

    Attributes:
        floor: distance of the training images, which no model can be expected to beat by much.
        reconstructions: distance of the reconstructed test images.
        mixture, gaussian: distances of new images, from a Gaussian mixture and one Gaussian fitted on
            the training latents; means over several fits and draws.
        prior: distance of new images from the autoencoder's own prior; ``None`` without one.
        accuracy: accuracy of the classifier in whose features this is, on the test images.
        mse: mean squared error of the reconstructions, per pixel.
        joint_mse: mean squared error of an autoencoder's decoder, with latents by joint inference in place of the
            encoder's.
        mixture_deviation: standard deviation of ``mixture``'s distances over its fits; ``None`` for one fit.
    """

    floor: float
    reconstructions: float
    mixture: float
    gaussian: float
    prior: float | None
    accuracy: float
    mse: float
    joint_mse: float | None = None
    mixture_deviation: float | None = None


def enough(config: GenerationConfig) -> None:
    """Raise if there are fewer images than mixture components."""
    if config.images.images is not None and config.curves:
        raise UserError("--curves is measured on the data sets alone")
    count = len(read_images(config.images).training.labels)
    if config.components > count:
        raise UserError(f"--components {config.components} is more than there are training images ({count})")


def shown(config: GenerationConfig, run: Run) -> Generated:
    """Judge the images of the run's best weights. Pictures and, if asked for, timings go into the run's directory."""
    task: Generation = TRAINER.best(config, run).cpu()
    images, pictures = made(config, task)
    files.save({key: [row.half() for row in rows] for key, rows in pictures.items()}, run.path / PICTURES)
    with styled():
        save_figure(grid(pictures), run.product("pictures.png"), 150)
    if config.curves:
        tuned, tested = (part.images[: config.curve_images] for part in (task.data.validation, task.data.test))
        run.write_json("curves.json", curves(task.decoder, config.joint, tuned, tested, config.curve_repeats))
    return images


def distances(generated: Generated) -> Table:
    """Tabulate the distances."""
    first = Column("Fréchet distance to the test images", "", "In the features of a small classifier.")
    others = {
        "New images": generated.mixture,
        "Reconstructions": generated.reconstructions,
        "Training images": generated.floor,
    }
    return Table([first, *map(Column, others)], [["", *(f"{distance:.3f}" for distance in others.values())]])


RUNNER = Measuring(
    first=TRAINER,
    ready=enough,
    measure=shown,
    show=distances,
    name="generation.json",
    again=None,
    doing="Making images",
)


@dataclass(frozen=True)
class Remade:
    """Pictures of a folder, which have no classes and therefore no Fréchet distance in a classifier's features.

    Attributes:
        mse: mean squared error of the test pictures' reconstructions, per pixel.
    """

    mse: float


def given(config: GenerationConfig) -> None:
    """Raise if no folder is named."""
    if config.images.images is None:
        raise UserError("no pictures: add --images FOLDER")
    enough(config)


def remade(config: GenerationConfig, run: Run) -> Remade:
    """Reconstruct the test pictures. Some of them, and generated ones, go into the run's directory."""
    task: Generation = TRAINER.best(config, run).cpu()
    test = task.data.test.images
    known, unseen = (task.latents(part) for part in (task.data.training.images[: config.density_images], test))
    again, new = task.images(unseen), task.images(_drawn(known, config.components, 3 * SHOWN, config.optimization.seed))
    pictures = {
        "test pictures, and their reconstructions": [test[:SHOWN], again[:SHOWN]],
        "new ones, from a Gaussian mixture of the training pictures' latents": list(new.split(SHOWN)),
    }
    with styled():
        save_figure(grid(pictures), run.product("pictures.png"), 150)
    return Remade(float((again - test).square().mean()))


OWN = Measuring(first=TRAINER, ready=given, measure=remade, name="generation.json", again=None, doing="Making images")


def made(config: GenerationConfig, task: Generation) -> tuple[Generated, dict[str, list[Tensor]]]:
    """The figures, and rows of images by what they show."""
    data = task.data
    network, accuracy = features(config.images)
    known, unseen = (task.latents(part) for part in (data.training.images[: config.density_images], data.test.images))
    again = task.images(unseen)
    seeds = range(config.fits * config.optimization.seed, config.fits * (config.optimization.seed + 1))

    def from_prior(seed: int) -> Tensor:
        return torch.randn(config.samples, known.shape[1], generator=torch.Generator().manual_seed(seed))

    ways: dict[str, Callable[[int], Tensor]] = {
        "mixture": partial(_drawn, known, config.components, config.samples),
        "gaussian": partial(_drawn, known, 1, config.samples),
        **({"prior": from_prior} if config.model == "vae" else {}),
    }
    distances = {
        name: [distance(network, task.images(draw(seed)), data.test.images) for seed in seeds]
        for name, draw in ways.items()
    }
    new = task.images(ways["mixture"](seeds[0])[: 3 * SHOWN])
    figures = Generated(
        floor=distance(network, data.training.images, data.test.images),
        reconstructions=distance(network, again, data.test.images),
        mixture=fmean(distances["mixture"]),
        gaussian=fmean(distances["gaussian"]),
        prior=fmean(distances["prior"]) if "prior" in distances else None,
        mixture_deviation=stdev(distances["mixture"]) if len(seeds) > 1 else None,
        accuracy=accuracy,
        mse=float((again - data.test.images).square().mean()),
        joint_mse=None if task.encoder is None else _error_of(task, task.joint_latents(data.test.images)),
    )
    return figures, {
        "test images, and their reconstructions": [data.test.images[:SHOWN], again[:SHOWN]],
        "from one test image to another, along a line between their latents": [
            task.images(unseen[i].lerp(unseen[i + 1], torch.linspace(0, 1, SHOWN)[:, None])) for i in (0, 2, 4)
        ],
        "new images, from a Gaussian mixture of the training images' latents": [
            new[i * SHOWN : (i + 1) * SHOWN] for i in range(3)
        ],
    }


def _error_of(task: Generation, x: Tensor) -> float:
    """The mean squared error of the test images' reconstructions from these latents."""
    return float((task.images(x) - task.data.test.images).square().mean())


def _drawn(latents: Tensor, components: int, count: int, seed: int) -> Tensor:
    """Latents from a Gaussian mixture fitted to others, in random order."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        density = GaussianMixture(min(components, len(latents)), reg_covar=1e-4, random_state=seed)
        density.fit(latents.double().numpy())
    drawn = torch.as_tensor(density.sample(count)[0], dtype=latents.dtype)
    return drawn[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]


def read_pictures(run: Run) -> dict[str, list[Tensor]] | None:
    """The rows of the run's pictures."""
    path = run.path / PICTURES
    if not path.is_file():
        return None
    stored: Any = files.load(path)
    return {key: [row.float() for row in rows] for key, rows in stored.items()}


# -- The table ---------------------------------------------------------------------------------------------------------


LABELS = {
    JOINT: "joint inference",
    "adam": "Adam",
    "adam-one-step": "Adam, one-step gradient",
    "gradient-descent": "gradient descent",
    "adam-published": "Adam, cold, by Broyden to 1e-5, as published",
}
"""Labels of the methods: joint inference first, then nested optimization."""

Model = Literal["jiio", "vae", "wide", "rae", "long"]
MODELS: tuple[Model, ...] = ("jiio", "vae", "wide", "rae", "long")
SIZES: tuple[Model, ...] = ("jiio", "wide")
"""Models whose inference is timed."""

LONGER = 8
"""Factor on the autoencoders' training steps, which have no joint solve: the total time is then about the same."""

WIDER = 3
"""Factor on the width of a fully connected decoder. A convolutional one gets twice the channels."""

DEFAULTS = {"digits": generation_digits, "mnist": generation_mnist, "olivetti": generation_olivetti}
NAMES: dict[Model, str] = {
    "jiio": "Decoder",
    "vae": "Variational autoencoder",
    "wide": "Wider decoder",
    "rae": "Regularized autoencoder",
    "long": "Decoder, as many steps as the autoencoders",
}

AIMS = (9.0, 3.5)
"""Ratio of CPU times, Adam with ``LONGEST`` steps over joint inference, to reach the same loss: the target, and the
smallest published."""

LONGEST = 40

PUBLISHED_FID = {"jiio": (46.82, 32.52), "vae": (48.12, 39.12), "rae": (40.96, 36.01)}
"""Published FID on CelebA 64×64, of generation and of reconstruction."""


@dataclass(frozen=True, kw_only=True)
class JiioGenerationConfig:
    """Decoders trained by joint inference, compared with autoencoders; loss against time, compared with nested
    optimization."""

    plan: Plan = field(default_factory=Plan)

    data: DataName = "digits"
    """Data set of images."""

    data_dir: Path | None = None
    """Folder of MNIST or the Olivetti faces. Default: download them."""

    kind: Kind | None = None
    """Kind of every decoder. Default: that of the recipe for these images."""

    steps: int | None = None
    """Optimizer steps of every model. Default: those of the recipe."""

    repeats: int = 5
    """Number of times each solve is timed."""

    def __post_init__(self) -> None:
        positive(self, "steps", "repeats")
        refuse_published(self.plan.scale, CELEBA)


def training(config: JiioGenerationConfig, model: Model, seed: int) -> GenerationConfig:
    """The settings of one model."""
    usual = DEFAULTS[config.data]()
    optimization = replace(usual.optimization, seed=seed)
    decoder = usual.decoder if config.kind is None else replace(usual.decoder, kind=config.kind)
    if config.steps is not None:
        optimization = replace(optimization, steps=config.steps, validate_every=max(1, config.steps // 4))
    if model in ("vae", "rae", "long"):
        optimization = optimization.of(seed, times=LONGER)
    if model == "wide":
        decoder = replace(decoder, width=WIDER * decoder.width, channels=2 * decoder.channels)
        # at the narrow one's rate it becomes so steep that the joint solves diverge
        optimization = replace(optimization, learning_rate=optimization.learning_rate / WIDER)
    return replace(
        usual,
        model=model if model in ("vae", "rae") else "jiio",
        decoder=decoder,
        images=replace(usual.images, data_dir=config.data_dir),
        curves=model in SIZES,
        curve_repeats=config.repeats,
        optimization=optimization,
        machine=Machine(device="cpu", tensorboard=False),
    )


def jobs(config: JiioGenerationConfig) -> list[Job]:
    """All jobs, seed by seed."""
    recipe = f"jiio-generation-{config.data}"
    return [
        Job(f"{model}-{seed}", recipe, training(config, model, seed), {"row": model, "seed": seed})
        for seed in config.plan.all_seeds
        for model in MODELS
    ]


def figures(config: JiioGenerationConfig, run: Run) -> dict[str, Any] | None:
    """Figures of a finished run."""
    one = table.trained(config, run)
    if one is None or one["state"] != "complete" or one["test"] is None:
        return None
    files = {"generated": "generation.json", "curves": "curves.json"}
    return {**one, **{name: table.read(file)(config, run) for name, file in files.items()}}


Points = Mapping[str, Any]
"""The timing measurements of one run, as the record holds them; see :class:`Curves`."""


def timed(runs: Runs) -> dict[Model, list[Points]]:
    """The available timings, one per seed."""
    return {size: curves for size in SIZES if (curves := runs.of(size, "curves"))}


def methods(each: Sequence[Points]) -> list[str]:
    """The methods that were measured."""
    there = {p["method"] for one in each for p in one["points"]}
    return [method for method in LABELS if method in there]


def at(one: Points, method: str, steps: int) -> tuple[float, float]:
    """Seconds and loss of a method after a number of steps."""
    return next((p["seconds"], p["loss"]) for p in one["points"] if (p["method"], p["steps"]) == (method, steps))


@dataclass(frozen=True)
class Overtaking:
    """The cheapest joint solve whose loss is at most that of a nested one.

    Attributes:
        steps, seconds: number of steps and time of the joint solve.
        ratio: time of the nested optimization divided by that of the joint solve.
    """

    steps: int
    seconds: float
    ratio: float


def overtaking(one: Points, method: str, steps: int) -> Overtaking | None:
    """The cheapest joint solve at least as good as the nested one; ``None`` if no measured one is."""
    seconds, loss = at(one, method, steps)
    good = [p for p in one["points"] if p["method"] == JOINT and p["loss"] <= loss]
    best = min(good, key=lambda p: p["seconds"], default=None)
    return best and Overtaking(best["steps"], best["seconds"], seconds / best["seconds"])


def sheets(config: JiioGenerationConfig, runs: Runs) -> Iterator[TitledTable]:
    """Tables of the speedup of the joint solve, of joint inference by steps, and of the images."""
    spread = table.spread
    lines = [
        (size, method, steps, each, [overtaking(one, method, steps) for one in each])
        for size, each in timed(runs).items()
        for method, steps in itertools.product(methods(each), (10, 20, LONGEST))
        if method != JOINT
    ]

    def there(line: Any) -> list[Overtaking]:
        return [better for better in line[4] if better]

    yield table.sheet("Time to the same loss: nested optimization and joint inference", lines, [
        Cell("Nested", lambda line: f"{NAMES[line[0]]}: {LABELS[line[1]]}"),
        Cell("Nested steps", lambda line: str(line[2]), "", "Steps of the optimizer of the latent."),
        Cell("Nested loss", lambda line: spread([at(c, line[1], line[2])[1] for c in line[3]], 5), "",
             "Loss after an exact solve: mean ± standard deviation over the seeds."),
        Cell("Nested time", lambda line: spread([at(c, line[1], line[2])[0] for c in line[3]], 0, 1000), "ms",
             "CPU time of the nested optimization."),
        Cell("Joint steps",
             lambda line: ", ".join(str(b.steps) if b else table.NONE for b in line[4]) or table.NONE, "",
             "Steps of the cheapest joint solve with the same loss or a lower one, for every seed."),
        Cell("Joint time", lambda line: spread([b.seconds for b in there(line)], 0, 1000), "ms",
             "CPU time of that joint solve."),
        Cell("Ratio", lambda line: spread([b.ratio for b in there(line)], 1), "×",
             "Nested time divided by joint time: mean ± standard deviation over the seeds."),
        Cell("Ratio at as many steps",
             lambda line: spread([at(c, line[1], line[2])[0] / at(c, JOINT, line[2])[0] for c in line[3]], 1), "×",
             "Nested time divided by joint time when both take as many steps. Published for 40 steps, with the rivals "
             "in training mode: 8.9."),
    ])  # fmt: skip
    points = [
        (size, n, [at(one, JOINT, n) for one in each])
        for size, each in timed(runs).items()
        for n in sorted({p["steps"] for one in each for p in one["points"] if p["method"] == JOINT})
    ]
    yield table.sheet("Loss and time of joint inference by its number of steps", points, [
        Cell("Joint steps", lambda point: f"{NAMES[point[0]]}: {point[1]}"),
        Cell("Loss", lambda point: spread([loss for _, loss in point[2]], 5), "",
             "Loss after an exact solve: mean ± standard deviation over the seeds."),
        Cell("Time", lambda point: spread([seconds for seconds, _ in point[2]], 0, 1000), "ms", "CPU time."),
    ])  # fmt: skip
    floors = [line["generated.floor"] for model in MODELS for line in runs.where(row=model) if line["generated"]]
    images = "training images"

    def distance(figure: str) -> Any:
        return runs.told(f"generated.{figure}", 3)

    there_are = [model for model in MODELS if model in MODELS[:3] or runs.where(row=model)]
    yield table.sheet("Reconstructed and new images", [*there_are, images], [
        Cell("Model", lambda row: NAMES.get(row, row)),
        Cell("Reconstruction", runs.told("test.mse", 5), "",
             "Mean squared error per pixel on the test images, after an exact solve."),
        Cell("Reconstruction by joint inference", runs.told("generated.joint_mse", 5), "",
             "Mean squared error per pixel of an autoencoder's decoder with latents that joint inference finds instead "
             "of the encoder."),
        Cell("Fréchet, new images", lambda row: spread(floors[:1], 3) if row == images else distance("mixture")(row),
             "", "Fréchet distance of images whose latents are drawn from a Gaussian mixture that is fitted to the "
             "training images' latents."),
        Cell("Fréchet, one Gaussian", distance("gaussian"), "",
             "Fréchet distance of images whose latents are drawn from one fitted Gaussian."),
        Cell("Fréchet, prior", distance("prior"), "",
             "Fréchet distance of images whose latents are drawn from the autoencoder's prior."),
        Cell("Fréchet, reconstructions", distance("reconstructions"), "",
             "Fréchet distance of the reconstructed test images."),
        Cell("FID published", lambda row: " / ".join(f"{v:.2f}" for v in PUBLISHED_FID.get(row, ())) or table.NONE, "",
             "Published FID of new images / reconstructions on CelebA, which is another metric on other images."),
    ])  # fmt: skip


def claims(config: JiioGenerationConfig, runs: Runs) -> Iterator[Claim]:
    """Compare the results with the targets."""
    spread = table.spread
    for size, each in timed(runs).items():
        better = [overtaking(one, "adam", LONGEST) for one in each]
        ratios = [b.ratio for b in better if b is not None]
        if "adam-published" in methods(each):
            published = [overtaking(one, "adam-published", LONGEST) for one in each]
            times = [b.ratio for b in published if b is not None]
            yield Claim(
                f"{NAMES[size]}: Adam with {LONGEST} steps, run as published, takes at least 9 times as much CPU time "
                "as joint inference to the same loss or a lower one",
                f"{spread(times)} times as much; {len(times)} of {len(published)} seeds reach the loss",
                len(times) == len(published) and fmean(times) >= 9,
            )
        for aim in AIMS:
            yield Claim(
                f"{NAMES[size]}: Adam with {LONGEST} steps takes at least {aim:g} times as much CPU time as joint "
                "inference to the same loss or a lower one",
                f"{spread(ratios)} times as much ({', '.join(f'{ratio:.1f}' for ratio in ratios)}); "
                f"{len(ratios)} of {len(better)} seeds reach the loss",
                len(ratios) == len(better) and fmean(ratios) >= aim,
            )
        losses = {m: [at(one, m, LONGEST)[1] for one in each] for m in methods(each)}
        yield Claim(
            f"{NAMES[size]}: {LONGEST} joint steps end at a lower loss than {LONGEST} steps of any nested method",
            ", ".join(f"{LABELS[m]} {spread(values, 5)}" for m, values in losses.items()),
            all(joint <= min(rest) for joint, *rest in zip(*losses.values(), strict=True)),
        )
    if runs.of("jiio", "generated") and runs.of("vae", "generated"):
        # the autoencoder makes new images in the better of its two ways
        ways = [values for what in ("mixture", "prior") if (values := runs.of("vae", f"generated.{what}"))]
        for what, images, theirs in (
            ("mixture", "new images", min(ways, key=fmean)),
            ("reconstructions", "reconstructions", runs.of("vae", "generated.reconstructions")),
        ):
            ours = runs.of("jiio", f"generated.{what}")
            yield Claim(
                f"The Fréchet distance of {images} is no larger than the autoencoder's",
                f"{spread(ours, 3)} against {spread(theirs, 3)}",
                fmean(ours) <= fmean(theirs),
            )

    best = {model: runs.of(model, "test.mse") for model in ("jiio", "long")}
    rivals = {model: runs.of(model, "test.mse") for model in ("vae", "rae")}
    if all(best.values()) and all(rivals.values()):
        words = ", ".join(f"{NAMES[model]} {spread(values, 5)}" for model, values in {**best, **rivals}.items())  # type: ignore[index]
        yield Claim(
            "A decoder without an encoder, trained for as many steps as the autoencoders, reconstructs no worse than "
            "they do",
            words,
            fmean(best["long"]) <= min(map(fmean, rivals.values())),
        )
    for model in ("vae", "rae"):
        if jointly := runs.of(model, "generated.joint_mse"):
            coded = runs.of(model, "test.mse")
            yield Claim(
                f"{NAMES[model]}: latents found by joint inference reconstruct better than those of its encoder",
                f"{spread(jointly, 5)} against {spread(coded, 5)}",
                fmean(jointly) < fmean(coded),
            )


def protocol(config: JiioGenerationConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    usual, wide = (training(config, model, config.plan.first_seed) for model in SIZES)
    small, large = usual.decoder, wide.decoder
    if small.kind == "mlp":
        sizes = f"a state of {small.width} entries, or {large.width} in the wider one"
    else:
        sizes = f"{small.channels} channels, or {large.channels} in the wider one"
    return (
        f"Equilibrium decoders ({small.kind}) with {small.latent} latents and {sizes} reconstruct images of "
        f"{config.data}. Training takes {usual.optimization.steps} steps of Adam on {usual.optimization.batch_size} "
        f"images, at rate {usual.optimization.learning_rate:g} or a third of it for the wider decoder. Each has a "
        f"joint solve of {usual.joint.joint_steps} steps by Anderson's method (memory {usual.joint.joint_memory}, "
        f"regularization {usual.joint.joint_regularization:g}) and the gradient of the envelope theorem; the loss is a "
        "sum over pixels, as published, with step sizes as for their mean. The weights with the least validation error "
        "are tested. The autoencoder has an equally large equilibrium decoder, an encoder with one hidden layer of "
        f"{usual.encoder_width} units, the exact implicit gradient, and {LONGER} times as many steps, which take about "
        f"as long. Times are CPU times of the process for {usual.curve_images} test images at the trained weights, in "
        f"evaluation mode with one thread: the median of {usual.curve_repeats} repeats that alternate between the "
        "methods, all of which start from zero. Nested optimization starts every equilibrium solve at the previous "
        "equilibrium, by plain iteration, and solves the adjoint system by GMRES. Its step size and its tolerance (the "
        "loosest that costs at most 1 % of the loss), and the step size and damping of the joint solve, are tuned on "
        "validation images for every seed. The loss is always that of an exact equilibrium at the latents found."
    )


def notes(config: JiioGenerationConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    accuracies = [a for model in MODELS for a in runs.of(model, "generated.accuracy")]
    right = f" ({100 * accuracies[0]:.1f} % accurate on the test images)" if accuracies else ""
    yield (
        "The Fréchet distance is that of FID's formula in the 32 features of a small classifier trained here on the "
        f"same training images{right}: it compares the models of this page with each other, not with published FIDs."
    )
    if spreads := [s for model in MODELS for s in runs.of(model, "generated.mixture_deviation")]:
        yield (
            "The Fréchet distance of new images is a mean over mixtures that are fitted to the same latents from other "
            f"starts. It varies by {fmean(spreads):.3f} (standard deviation) from one of them to the next."
        )
    elif accuracies:
        yield (
            "The Fréchet distance of new images is that of one fitted mixture and of one draw from it. With another "
            "seed for these alone, that of one trained decoder of the digits moved by 0.04 (standard deviation over "
            "ten), which is more than the models differ: the comparison of new images is undecided."
        )
    yield (
        "The published times are 7659 ms for Adam with 40 steps, 862 ms for 40 joint steps and 2156 ms for 100, for a "
        "multiscale model on CelebA with the nested optimizer in training mode. Here all methods run in evaluation "
        "mode, the nested optimizer's solves start at the previous equilibria, and their tolerance is tuned."
    )
    yield (
        "Nested optimization with the one-step gradient is cheaper and not exact; gradient descent with a tuned step "
        "size is a stronger baseline than Adam where the loss is nearly quadratic in the latent."
    )
    for size, each in timed(runs).items():
        tuned = "; ".join(
            f"α = {c['step_size']:g}, damping {' '.join(f'{d:g}' for d in c['damping'])}, "
            + ", ".join(f"{LABELS[m]} {c['rates'][m]:g} at {c['tolerances'][m]:g}" for m in LABELS if m in c["rates"])
            for c in each
        )
        yield f"{NAMES[size]}: values tuned on validation images for every seed (step size at tolerance) are {tuned}."
    yield from table.missing(jobs(config), runs)


def drawings(config: JiioGenerationConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Loss against time, and images of the first seed that has some."""
    for size, each in timed(runs).items():
        yield CaptionedFigure(
            f"curves-{size}",
            against_time(each),
            f"{NAMES[size]}: loss of {training(config, size, 0).curve_images} test images after an exact solve at the "
            "latents found, against CPU time. Lines are means over the seeds, faint lines single seeds; numbers beside "
            "the points are numbers of steps.",
        )
    for model in ("jiio", "vae"):
        several = (read_pictures(folders[line.name]) for line in runs.where(row=model))
        if (pictures := next((one for one in several if one is not None), None)) is not None:
            yield CaptionedFigure(
                f"images-{model}", grid(pictures), f"{NAMES[model]}: images of {config.data}, not chosen by hand."
            )


def against_time(curves: Sequence[Points]) -> Figure:
    """Loss against time, a line per method: means over seeds, a point per number of steps."""
    figure, (panel,) = axes()
    for index, method in enumerate(methods(curves)):
        steps = sorted({p["steps"] for one in curves for p in one["points"] if p["method"] == method})
        look = style(index)
        for one in curves:
            panel.plot(*zip(*(at(one, method, n) for n in steps), strict=True), color=look["color"], alpha=0.2, lw=0.8)
        points = [[at(one, method, n) for one in curves] for n in steps]
        means = [(fmean(p[0] for p in each), fmean(p[1] for p in each)) for each in points]
        panel.plot([m[0] for m in means], [m[1] for m in means], label=LABELS[method], **look)
        for n, mean in zip(steps, means, strict=True):
            if n in (10, 20, 40):
                panel.annotate(str(n), mean, xytext=(4, 4), textcoords="offset points", fontsize=7.5)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("CPU time (s)")
    panel.set_ylabel("loss after an exact solve")
    panel.legend()
    return figure


TABLE = table.published(
    globals(),
    title="Joint inference and input optimization: a decoder without an encoder",
    source="Gurumurthy et al. 2021 (arXiv 2111.13236): Fig. 3 and the tables of generation and time.",
)

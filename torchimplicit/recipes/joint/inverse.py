"""Inverse problems by joint inference: the recipe, and its table of exact and first-order training gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchimplicit._resolve import resolve
from torchimplicit.gradients import Envelope, FixedInput, Gradient, Implicit
from torchimplicit.linear import GMRES
from torchimplicit.problems import JointInference
from torchimplicit.recipes.joint.decoder import (
    CELEBA,
    DataName,
    Decoder,
    Images,
    Joint,
    equilibria,
    found,
    grid,
    joint_solver,
    make_decoder,
    read,
    refuse_published,
    squared_error,
)
from torchimplicit.recipes.joint.generation import (
    PICTURES,
    SHOWN,
    generation_mnist,
    generation_olivetti,
    read_pictures,
    ready,
)
from torchimplicit.recipes.runtime import files, table
from torchimplicit.recipes.runtime.page import save_figure, styled
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, fraction, positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, TitledTable
from torchimplicit.recipes.runtime.task import Metric, Rows, SampledTask, Split, generator
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer
from torchimplicit.solvers import Anderson

Corruption = Literal["denoising", "inpainting"]
Through = Literal["exact", "first-order", "generative"]

# -- settings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InverseConfig:
    """An inverse problem: the latent is fitted to a corrupted image, and its image should match the clean one.

    The decoder is trained for that, and the weight of the latent's prior, where the gradient sees it."""

    corruption: Corruption = "denoising"
    """denoising: Gaussian noise on every pixel. inpainting: a missing square."""

    noise: float = 0.3
    """Standard deviation of the noise, for pixels between 0 and 1."""

    missing: float = 0.5
    """Side of the missing square, as a share of the image's."""

    through: Through = "exact"
    """How the outer loss is differentiated. exact: including the latent's dependence on the weights. first-order: with
    the latent held fixed. generative: the decoder is trained to reconstruct clean images and never sees a corrupted
    one."""

    prior_rate: float = 10.0
    """Learning rate of the logarithm of the prior's weight, relative to that of the other weights. It starts at
    --prior."""

    images: Images = field(default_factory=Images)
    decoder: Decoder = field(default_factory=Decoder)
    joint: Joint = field(default_factory=Joint)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "noise", "prior_rate")
        fraction(self, "missing")


def inverse_digits() -> InverseConfig:
    """The bundled digits: a minute or two on one core."""
    return InverseConfig(
        # a weaker prior leaves latents that the corrupted image hardly determines, and joint solves far from converged
        joint=Joint(joint_steps=25, prior=0.03),
        optimization=Optimization(steps=160, batch_size=32, learning_rate=3e-3, validate_every=40),
        equilibria=equilibria(),
    )


def inverse_mnist() -> InverseConfig:
    """MNIST."""
    wider = generation_mnist()
    return replace(inverse_digits(), images=wider.images, decoder=wider.decoder)


def inverse_olivetti() -> InverseConfig:
    """The Olivetti faces."""
    wider = generation_olivetti()
    return replace(
        inverse_digits(), images=wider.images, decoder=wider.decoder, noise=0.1, optimization=wider.optimization
    )


# -- Inverse problems, for the framework that trains: images from corrupted ones ---------------------------------------


class Restoration(SampledTask):
    """A decoder fitted to corrupted images and trained to give the clean ones.

    Attributes:
        prior_shift: what the logarithm of the weight of the latent's prior has moved, over ``config.prior_rate``. The
            exact gradient learns it; to the first-order one it does nothing, since the latent is taken as given.
    """

    metric = Metric("mse", "", "min")
    held_out_batch = 200

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
        held_out: dict[str, Any] = {
            name: Rows(self.data.split(name).images, *seen) for name, seen in self.held_out.items()
        }
        self.sets = {"training": Rows(self.data.training.images), **held_out}

    @property
    def prior(self) -> Tensor:
        """The weight of the latent's prior."""
        return self.config.joint.prior * (self.config.prior_rate * self.prior_shift).exp()

    def corrupted(self, images: Tensor, source: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The corrupted images, and a mask ``[n, 1, height, width]`` that is zero where pixels are missing.

        Args:
            images: clean, ``[n, channels, height, width]``.
            source: source of the noise or the places; ``None``: the global generator.
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
        """The problem of the latent whose image is nearest to the corrupted one."""
        pixels = math.prod(self.data.pixels)

        # a sum over pixels, as published
        def loss(generated: Tensor, x: Tensor, wanted: Tensor, seen: Tensor, prior: Tensor) -> Tensor:
            misfit = ((generated - wanted).square() * seen).flatten(1).sum(dim=1)
            return misfit + pixels * prior * x.square().mean(dim=1)

        return self.decoder.inference(loss, self.config.joint.step_size / pixels)

    def loss(self, batch: Any) -> Tensor:
        """The squared error of the restored images against the clean ones."""
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
        """The gradient estimator of the outer loss; by default the recipe's own."""
        chosen = self.config.equilibria
        linear_solver = GMRES(rtol=chosen.backward_tolerance, max_steps=chosen.backward_steps)
        estimators: dict[str, Any] = {"exact": Implicit, "first-order": FixedInput}
        return estimators[through or self.config.through](linear_solver=linear_solver)

    def slopes(self, images: Tensor, gradient: Gradient, solver: Anderson, seed: int = 0) -> Tensor:
        """The outer loss's gradient in the decoder's weights, flattened, for images corrupted with a seed."""
        shown = self.corrupted(images, generator(seed, 2))
        weights = [p for p in self.decoder.parameters() if p.requires_grad]
        prior = self.prior.detach()
        with torch.enable_grad():
            solution = found(self.decoder, self.problem(), solver, *shown, prior, gradient=gradient)
            loss = squared_error(self.decoder.head(solution.value.z), images).mean()
        return torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, weights)])

    @torch.no_grad()
    def restored(self, wanted: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The restored images, each at its exact equilibrium; and whether the joint solve converged."""
        joint, problem = self.config.joint, self.problem()
        prior = self.prior
        solution = found(self.decoder, problem, joint_solver(joint, joint.test_steps), wanted, seen, prior)
        self.solved(solution)
        exact = resolve(
            problem, solution.value, wanted, seen, prior, solver=self.decoder.equilibrium.solver, throw=False
        )
        return self.decoder.head(exact.solution.value), solution.converged

    def score(self, batch: Any) -> Tensor:
        """Sums over images of the squared errors after and before restoration, and of unconverged joint solves; and the
        number of images."""
        images, wanted, seen = batch
        restored, converged = self.restored(wanted, seen)
        parts = (
            squared_error(restored, images).sum(),
            squared_error(wanted, images).sum(),
            (~converged).sum(),
            torch.tensor(len(images), device=images.device),
        )
        return torch.stack([part.double() for part in parts])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """The figures, as means."""
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
        chosen = self.config
        return f"{chosen.images.name}: {self.counts} images; {chosen.corruption}, trained {chosen.through}."


TRAINER = Trainer(Restoration, ready)


# -- Training on an inverse problem, and pictures of what it restores --------------------------------------------------


COMPARED = 16
"""Validation images on which gradients are compared."""

TIGHT = Anderson(memory=30, rtol=1e-5, max_steps=300)
ADJOINT = GMRES(rtol=1e-4, max_steps=200)


@dataclass(frozen=True)
class Gradients:
    """Gradients of the outer loss at the trained weights, compared with the exact one from tightly solved joint and
    adjoint problems: cosines and ratios of norms.

    Attributes:
        exact, exact_length: cosine and ratio of the exact gradient as in training.
        first_order, first_order_length: cosine and ratio of the first-order gradient as in training.
    """

    exact: float
    exact_length: float
    first_order: float
    first_order_length: float


def compared(task: Restoration) -> Gradients:
    """Compare the gradients on validation images."""
    images = task.data.validation.images[:COMPARED]
    joint = task.config.joint
    solver = joint_solver(joint, joint.joint_steps)
    reference = task.slopes(images, Implicit(linear_solver=ADJOINT), TIGHT)
    exact, cheap = (task.slopes(images, task.estimator(kind), solver) for kind in ("exact", "first-order"))
    length = float(reference.norm())
    cosines = [float(torch.cosine_similarity(one, reference, dim=0)) for one in (exact, cheap)]
    return Gradients(cosines[0], float(exact.norm()) / length, cosines[1], float(cheap.norm()) / length)


def restored(task: Restoration) -> dict[str, list[Tensor]]:
    """A few test images: clean, corrupted and restored."""
    clean = task.data.test.images[:SHOWN]
    wanted, seen = (part[:SHOWN] for part in task.held_out["test"])
    images, _ = task.restored(wanted, seen)
    return {"clean, corrupted and restored test images": [clean, wanted, images]}


def shown(config: InverseConfig, run: Run) -> Gradients:
    """The gradients at the run's best weights; pictures go into its directory."""
    task: Restoration = TRAINER.best(config, run).cpu()
    rows = restored(task)
    files.save({name: [row.half() for row in images] for name, images in rows.items()}, run.path / PICTURES)
    with styled():
        save_figure(grid(rows), run.product("pictures.png"), 150)
    return compared(task)


RUNNER = Measuring(first=TRAINER, measure=shown, name="gradients.json", again=None)


# -- The table ---------------------------------------------------------------------------------------------------------


CORRUPTIONS: tuple[Corruption, ...] = ("denoising", "inpainting")


@dataclass(frozen=True)
class Row:
    """A row: how a decoder is trained.

    Attributes:
        label: label to display.
        through: which gradient.
        prior: initial weight of the latent's prior, divided by the recipe's.
    """

    label: str
    through: Through
    prior: float = 1.0


ROWS = {
    "exact": Row("exact", "exact"),
    "first-order": Row("first-order", "first-order"),
    "exact-weak": Row("exact, from a third of the prior", "exact", 1 / 3),
    "first-order-weak": Row("first-order, with a third of the prior", "first-order", 1 / 3),
    "generative": Row("none: clean images alone", "generative"),
}
"""The rows, by the second part of their runs' names."""

DEFAULTS = {"digits": inverse_digits, "mnist": inverse_mnist, "olivetti": inverse_olivetti}


@dataclass(frozen=True, kw_only=True)
class JiioInverseConfig:
    """Denoising and inpainting, trained with the exact gradient, the first-order gradient, and on clean images."""

    plan: Plan = field(default_factory=Plan)

    data: DataName = "digits"
    """Data set of images."""

    data_dir: Path | None = None
    """Folder of MNIST or the Olivetti faces. Default: download them."""

    steps: int | None = None
    """Optimizer steps of every model. Default: those of the recipe."""

    def __post_init__(self) -> None:
        positive(self, "steps")
        refuse_published(self.plan.scale, CELEBA)


def training(config: JiioInverseConfig, corruption: Corruption, row: Row, seed: int) -> InverseConfig:
    """The settings of one model."""
    usual = DEFAULTS[config.data]()
    optimization = replace(usual.optimization, seed=seed)
    if config.steps is not None:
        optimization = replace(optimization, steps=config.steps, validate_every=max(1, config.steps // 3))
    return replace(
        usual,
        corruption=corruption,
        through=row.through,
        joint=replace(usual.joint, prior=row.prior * usual.joint.prior),
        images=replace(usual.images, data_dir=config.data_dir),
        optimization=optimization,
        machine=Machine(device="cpu", tensorboard=False),
    )


def jobs(config: JiioInverseConfig) -> list[Job]:
    """All jobs: seeds outermost and rows innermost, so that a slow phase of the machine affects all rows."""
    return [
        Job(
            f"{corruption}-{name}-{seed}",
            f"jiio-inverse-{config.data}",
            training(config, corruption, row, seed),
            {"row": name, "corruption": corruption, "seed": seed},
        )
        for seed in config.plan.all_seeds
        for corruption in CORRUPTIONS
        for name, row in ROWS.items()
    ]


def figures(config: JiioInverseConfig, run: Run) -> dict[str, Any] | None:
    """Figures of a finished run."""
    one = table.trained(config, run)
    if one is None or one["state"] != "complete" or one["test"] is None:
        return None
    step = one["best"] and one["best"]["step"]
    return {**one, "selected_step": step, "gradients": table.read("gradients.json")(config, run)}


def sheets(config: JiioInverseConfig, runs: Runs) -> Iterator[TitledTable]:
    """A table per problem, and the accuracy of the gradients."""
    for corruption in CORRUPTIONS:
        here = runs.where(corruption=corruption)

        def over(row: str, here: Runs = here) -> str:
            return table.spread([a / b for a, b in here.paired(row, "first-order", "test.mse")], 3)

        def counted(row: str, here: Runs = here) -> str:
            return str(len(here.where(row=row)))

        yield table.sheet(f"{corruption.capitalize()}: restoration of test images", ROWS, [
            Cell[str]("Gradient", lambda row: ROWS[row].label),
            Cell("Error", here.told("test.mse", 2, 1e3), "1e-3",
                 "Mean squared error per pixel on the test images: mean ± standard deviation over the seeds."),
            Cell("PSNR", here.told("test.psnr", 2), "dB", "Peak signal-to-noise ratio at that error."),
            Cell("Before", here.told("test.mse_before", 1, 1e3), "1e-3",
                 "Mean squared error per pixel of the corrupted images."),
            Cell("Relative to first-order", over, "",
                 "Error divided by that with the first-order gradient and the same seed: mean ± standard deviation."),
            Cell("Prior", here.told("test.prior", 2, 1e3), "1e-3",
                 "Weight on the latent's mean square at the end of training; the exact gradient alone learns it."),
            Cell("Training", here.told("seconds", 0), "s", "Wall time of all training steps."),
            Cell("Seeds", counted, "", "Runs that finished."),
        ])  # fmt: skip

    def compared(figure: str) -> Any:
        return lambda pair: table.spread(runs.where(corruption=pair[0]).of(pair[1], f"gradients.{figure}"), 3)

    known = [(c, row) for c in CORRUPTIONS for row in ROWS if runs.where(corruption=c).of(row, "gradients.exact")]
    yield table.sheet("Accuracy of the gradients at the trained weights", known, [
        Cell("Problem and gradient of training", lambda pair: f"{pair[0]}: {ROWS[pair[1]].label}"),
        Cell("Exact, cosine", compared("exact"), "",
             "Cosine between the exact gradient as in training and the reference, the gradient of tight joint and "
             "adjoint solves."),
        Cell("Exact, length", compared("exact_length"), "",
             "Norm of the exact gradient as in training, divided by that of the reference."),
        Cell("First-order, cosine", compared("first_order"), "",
             "Cosine between the first-order gradient and the reference."),
        Cell("First-order, length", compared("first_order_length"), "",
             "Norm of the first-order gradient, divided by that of the reference."),
    ])  # fmt: skip


def claims(config: JiioInverseConfig, runs: Runs) -> Iterator[Claim]:
    """Test whether the exact gradient is correct, and worth its cost."""
    exact = Runs(line for line in runs if ROWS[line["row"]].through == "exact" and line["gradients"])
    if exact:
        right, rough = (exact.column(f"gradients.{name}") for name in ("exact", "first_order"))
        yield Claim(
            "The exact gradient as in training has a cosine of at least 0.95 with the gradient of tight solves, at "
            "weights that were trained with it",
            f"the exact gradient has {table.spread(right, 3)}, the first-order gradient {table.spread(rough, 3)}",
            min(right) >= 0.95,
        )
    for corruption in CORRUPTIONS:
        for row, other in (("exact", "first-order"), ("exact-weak", "first-order-weak")):
            ratios = [a / b for a, b in runs.where(corruption=corruption).paired(row, other, "test.mse")]
            if not ratios:
                continue
            error = stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0
            yield Claim(
                f"{corruption.capitalize()}: the error of the row '{ROWS[row].label}' is below that of the row "
                f"'{ROWS[other].label}' by more than two standard errors over the seeds",
                f"the errors have a ratio of {fmean(ratios):.3f} ± {error:.3f}",
                len(ratios) > 1 and fmean(ratios) + 2 * error < 1,
            )


def protocol(config: JiioInverseConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    usual = training(config, "denoising", ROWS["exact"], config.plan.first_seed)
    return (
        f"A {usual.decoder.kind} equilibrium decoder with {usual.decoder.latent} latents restores images of "
        f"{config.data}; it is trained by {usual.optimization.steps} steps of Adam on batches of "
        f"{usual.optimization.batch_size} images. The inner loss fits the latent to the visible pixels of the "
        "corrupted image, with a weight on the latent's square; the outer loss is the squared error between the "
        "decoder's image and the clean one. Denoising removes Gaussian noise of standard deviation "
        f"{usual.noise:g}. Inpainting fills a missing square with {100 * usual.missing:.0f} % of the image's side, at "
        f"a random place. Joint solves take {usual.joint.joint_steps} steps in training and {usual.joint.test_steps} "
        "in tests, which end with an exact solve of the equilibrium. The exact gradient solves the adjoint of the "
        f"whole joint map (GMRES to a relative tolerance of {usual.equilibria.backward_tolerance:g}, at most "
        f"{usual.equilibria.backward_steps} products) and also learns the weight on the latent. The first-order "
        "gradient takes the latent as a constant. The weights with the least validation error are tested."
    )


def notes(config: JiioInverseConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    yield (
        "No published figures are quoted: they were found with another model, other images and the first-order "
        "gradient, which the published code takes here, and do not compare with these."
    )
    yield (
        "The first-order gradient leaves out how the latent depends on the weights; the last table shows how far that "
        "turns it. An earlier run with a thirtieth of the prior's weight, a mean over pixels instead of a sum, and 100 "
        "steps found no gain from the exact gradient: with so weak a prior the joint solves of an untrained decoder do "
        "not converge in the steps of training, and the gradient is exact only at a solution."
    )
    yield (
        "Training is short, so that the table compares errors after equally many steps, not at convergence. The weight "
        "on the latent is learned by the exact gradient alone, in logarithm and at ten times the learning rate of the "
        "other weights. Its initial value was chosen by trials on these digits, but not for the rows with a third of "
        "it."
    )
    yield from table.missing(jobs(config), runs)


def drawings(config: JiioInverseConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Images of the first seed that has some, a figure per problem."""
    for corruption in CORRUPTIONS:
        named: dict[str, Any] = {}
        for name, row in ROWS.items():
            several = (read_pictures(folders[line.name]) for line in runs.where(corruption=corruption, row=name))
            for shown in (next((one for one in several if one is not None), None) or {}).values():
                named.setdefault("clean and corrupted", shown[:2])
                named[f"restored; gradient: {row.label}"] = shown[2:]
        if named:
            yield CaptionedFigure(
                corruption, grid(named), f"{corruption.capitalize()} of the first test images, with the first seed."
            )


TABLE = table.published(
    globals(),
    title="Inverse problems by joint inference",
    source="Gurumurthy et al. 2021 (arXiv 2111.13236), inverse problems: denoising and inpainting.",
)

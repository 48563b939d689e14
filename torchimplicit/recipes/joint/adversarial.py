"""Adversarial training of an equilibrium classifier, attacks on it, and the table of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit._solve import solve
from torchimplicit.attacks import JIIO, PGD, Attack, Found, Norm
from torchimplicit.constraints import L2Ball
from torchimplicit.gradients import Envelope, Implicit
from torchimplicit.linear import GMRES
from torchimplicit.models import MDEQ, EquilibriumClassifier, EquilibriumClassifierConfig, mdeq_small
from torchimplicit.problems import FixedPoint, JointInference
from torchimplicit.recipes.joint.decoder import refuse_published
from torchimplicit.recipes.phantom.image_data import IMAGES, Selection, Splits, selected
from torchimplicit.recipes.runtime import files, table
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import axes, canvas, style
from torchimplicit.recipes.runtime.run import Run, device, quietly
from torchimplicit.recipes.runtime.settings import (
    Equilibria,
    Machine,
    Optimization,
    fraction,
    numbers,
    option,
    positive,
)
from torchimplicit.recipes.runtime.step_cost import timed_in_turn
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Plan, Runs, Table, TitledTable
from torchimplicit.recipes.runtime.task import Metric, SampledTask, gradient, solver
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer
from torchimplicit.regularizers import jacobian_frobenius
from torchimplicit.solution import Solution
from torchimplicit.solvers import Anderson, Broyden, FixedPointIteration

# -- settings ----------------------------------------------------------------------------------------------------------


Adversary = Literal["none", "pgd", "jiio"]
DataName = Literal["digits", "mnist", "cifar10"]

CLEAN = "clean"
"""Label of images that were not attacked."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(Selection):
    """An equilibrium classifier trained on images that an attack changes within a ball."""

    data: DataName
    """Data set of images."""

    model: Literal["tanh", "mdeq"] = "tanh"
    """tanh: tanh(Wz + Ux + b), dense on the digits and convolutional on other images. mdeq: a multiscale model
    (MDEQ)."""

    adversary: Adversary = "jiio"
    """Attack on the training images: none, projected gradient ascent through the equilibrium (pgd), or joint inference
    (jiio)."""

    attack_gradient: Literal["resolve", "envelope"] = "resolve"
    """Weight gradient under --adversary jiio. resolve: solve the equilibrium of the attacked image (warm-started) and
    differentiate by --gradient. envelope: the envelope theorem, from the state and adjoint with which JIIO ends, at no
    further cost."""

    radius: float = 0.5
    """Radius of the ball around each image, in --norm. Pixels lie in [0, 1], and attacked images stay there."""

    norm: Norm = "l2"
    """Norm of the ball: l2, or linf (largest change of one pixel)."""

    attack_steps: int = 20
    """Steps of the attack in training: evaluations of JIIO, or solves with a gradient of PGD."""

    attack_step_size: float = 0.8
    """Step size of the attack, as a share of the radius."""

    channels: int = 100
    """Channels of the state; the state's size for the dense model of the digits; channels of each of the two branches
    of MDEQ."""

    bound: float = 0.8
    """Bound on the spectral norm of the state's weight matrix. MDEQ has no bound; use --jacobian-weight instead."""

    validation_images: int = 300
    """Training images set aside to select the weights."""

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "radius", "attack_steps", "attack_step_size", "channels")
        super().__post_init__()
        fraction(self, "bound")
        if self.attack_gradient == "envelope" and self.adversary != "jiio":
            raise UserError(
                f"{option('attack_gradient')} envelope needs the adjoint that JIIO finds, and {option('adversary')} "
                f"is {self.adversary}"
            )
        if self.attack_gradient == "envelope" and (self.model != "tanh" or self.norm != "l2"):
            raise UserError(f"{option('attack_gradient')} envelope is for --model tanh and --norm l2 alone")
        if self.adversary != "none" and self.equilibria.gradient == "unrolled":
            raise UserError(
                f"{option('gradient')} unrolled would differentiate a solve that begins at its solution, as it does "
                "after an attack, and takes hardly a step: take implicit, or a phantom gradient"
            )


def adversarial_digits() -> AdversarialConfig:
    """A dense model on the bundled digits: half a minute on one core."""
    return AdversarialConfig(
        data="digits", optimization=Optimization(steps=150, batch_size=128, learning_rate=1e-2, validate_every=30)
    )


def adversarial_mnist() -> AdversarialConfig:
    """A convolutional model on MNIST: some minutes on one core."""
    return AdversarialConfig(
        data="mnist",
        radius=1.0,
        channels=24,
        validation_images=1000,
        test_images=1000,
        optimization=Optimization(steps=300, batch_size=64, learning_rate=5e-3, validate_every=100),
    )


MDEQ_CHANNELS = 16


def adversarial_mdeq() -> AdversarialConfig:
    """A multiscale model (MDEQ) on the bundled digits: minutes on one core. The Jacobian's penalty, of the published
    weight, keeps its map a contraction, which joint inference needs."""
    usual = adversarial_digits()
    return replace(
        usual,
        model="mdeq",
        channels=MDEQ_CHANNELS,
        optimization=replace(usual.optimization, steps=300, learning_rate=4e-3, batch_size=64, validate_every=100),
        equilibria=Equilibria(
            tolerance=1e-3, gradient="neumann-phantom", phantom_steps=5, phantom_damping=0.5, jacobian_weight=0.01
        ),
    )


@dataclass(frozen=True, kw_only=True)
class AttacksConfig:
    """Trains a classifier, then compares all attacks on it at the best weights, in turn."""

    training: AdversarialConfig = field(default_factory=adversarial_digits)

    pgd_steps: tuple[int, ...] = (2, 3, 5, 7, 10, 20)
    """Numbers of PGD steps to compare."""

    jiio_steps: tuple[int, ...] = (6, 10, 20, 30, 40, 80)
    """Numbers of JIIO steps to compare."""

    step_sizes: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Step sizes to try, as shares of the radius. Each attack uses the one with the largest cross-entropy on validation
    images."""

    tolerances: tuple[float, ...] = (1e-1, 1e-2)
    """Solver tolerances to try for PGD. It uses the loosest that loses at most --tolerated of the cross-entropy."""

    tolerated: float = 0.01
    """Share of the cross-entropy that a looser tolerance may lose."""

    tuning_images: int = 200
    """Validation images on which step sizes and tolerances are chosen."""

    attacked_images: int = 360
    """Number of test images to attack."""

    repeats: int = 3
    """Number of times each attack is timed."""

    def __post_init__(self) -> None:
        positive(self, "tuning_images", "attacked_images", "repeats", "tolerated")
        numbers(self, "pgd_steps", "jiio_steps", "step_sizes", "tolerances")

    def strongest(self, kind: str) -> str:
        """The name of the longest attack of a kind."""
        return f"{kind}-{max(self.pgd_steps if kind == 'PGD' else self.jiio_steps)}"


def attacks() -> AttacksConfig:
    """On the bundled digits."""
    return AttacksConfig()


# -- Attacks are the library's; and joint inference whose gradient the envelope theorem gives --------------------------


def jointly(
    model: EquilibriumClassifier,
    images: Tensor,
    labels: Tensor,
    radius: float,
    *,
    steps: int,
    step_size: float,
    tolerance: float = 1e-3,
    keep_trajectory: bool = False,
) -> Solution:
    """The joint solve for a perturbation in the ball, differentiated by the envelope theorem, for a loss that is the
    cross-entropy at its state (the inner loss with the other sign, Danskin's theorem).

    The range of the pixels is not held here. The arguments are as for :class:`torchimplicit.attacks.JIIO`.
    """
    f = model.map()

    def loss(z: Tensor, change: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return -functional.cross_entropy(model.read(z), labels, reduction="none")

    problem = JointInference(
        lambda z, change, images, labels: f(z, images + change),
        loss,
        radius * step_size,
        L2Ball(radius),
        rowwise=True,
        damping=(0.8, 0.6, 1.0),
        normalized=True,
    )
    solver = FixedPointIteration(rtol=tolerance, max_steps=steps, keep_trajectory=keep_trajectory)
    start = (model.start(images), torch.zeros_like(images))
    return solve(problem, start, images, labels, solver=solver, gradient=Envelope())


class Standardized(nn.Module):
    """A classifier of standardized images, wrapped to take pixels in [0, 1]."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], deviation: tuple[float, ...]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None], persistent=False)

    mean: Tensor
    deviation: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` to scores."""
        return self.model((images - self.mean) / self.deviation)


def judged(model: nn.Module, images: Tensor, labels: Tensor) -> Any:
    """Cross-entropy of every image, and whether each is classified correctly, at an exact solve from zero: ``[batch]``
    both."""
    with torch.no_grad():
        scores = model(images)
        return functional.cross_entropy(scores, labels, reduction="none"), scores.argmax(1) == labels


# -- Adversarial training, for the framework that trains ---------------------------------------------------------------


STRIDE = {"digits": None, "mnist": 4, "cifar10": 4}


class AdversarialTraining(SampledTask):
    """A classifier and an adversary that changes its training images."""

    def __init__(self, config: AdversarialConfig):
        super().__init__()
        self.config = config
        self.metric = Metric("accuracy" if config.adversary == "none" else "attacked", "%", "max")
        splits = selected(config.data, config)
        self.sets = splits.sets()
        self.model = _model(config, splits)

    @property
    def attack(self) -> Attack:
        """The adversary of training; without one, an adversary for tests."""
        config = self.config
        settings: dict[str, Any] = {"radius": config.radius, "norm": config.norm, "step_size": config.attack_step_size}
        if config.adversary == "jiio":
            return JIIO(self.model, **settings, steps=config.attack_steps, last_step_size=None)
        return pgd(self.model, steps=config.attack_steps if config.adversary == "pgd" else 10, **settings)

    def loss(self, batch: Any) -> Tensor:
        """The cross-entropy of the attacked images."""
        images, labels = pixels(batch[0]), batch[1]
        if self.config.attack_gradient == "envelope":
            return self._by_envelope(images, labels)
        if self.config.adversary == "none":
            return functional.cross_entropy(self.model(images), labels)
        attacked = self._found(images, labels)
        if isinstance(self.model, EquilibriumClassifier):
            return functional.cross_entropy(self.model(attacked.images, attacked.states[0].detach()), labels)
        return functional.cross_entropy(self.model(attacked.images), labels)

    def _found(self, images: Tensor, labels: Tensor) -> Found:
        attack = self.attack.find(images, labels)
        for one in attack.solves:
            self.solved(one)
        return attack

    def _by_envelope(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss at JIIO's final state, whose adjoint gives the gradient. No layer makes this solve, so the
        Jacobian penalty is added here, at a random iterate."""
        config = self.config
        weight = config.equilibria.jacobian_weight
        assert isinstance(self.model, EquilibriumClassifier)
        settings: dict[str, Any] = {"steps": config.attack_steps, "step_size": config.attack_step_size}
        attack = jointly(self.model, images, labels, config.radius, **settings, keep_trajectory=weight > 0)
        self.solved(attack)
        loss = functional.cross_entropy(self.model.read(attack.value.z), labels)
        if weight:
            at = attack.trajectory[int(torch.randint(len(attack.trajectory), ()))]
            f = self.model.map()
            penalty = jacobian_frobenius(FixedPoint(f), at.z.detach(), images + at.x.detach())
            loss = loss + weight * penalty
        return loss

    def score(self, batch: Any) -> Tensor:
        """Sums of correct predictions and cross-entropies, clean and attacked, and the number of images."""
        with torch.inference_mode(False):
            images, labels = pixels(batch[0].clone()), batch[1].clone()
            parts: list[Tensor] = []
            for shown in (images, self._found(images, labels).images):
                losses, right = judged(self.model, shown, labels)
                parts += [right.double().sum(), losses.double().sum()]
            return torch.stack([*parts, parts[0].new_tensor(float(len(labels)))])

    def figures(self, sums: list[float]) -> dict[str, float]:
        """Accuracy and mean cross-entropy, clean and attacked."""
        right, loss, attacked, attacked_loss, count = sums
        return {
            "accuracy": right / count,
            "loss": loss / count,
            "attacked": attacked / count,
            "attacked_loss": attacked_loss / count,
        }

    def describe(self) -> str:
        """The data and the model."""
        adversary = {"none": "no adversary", "pgd": "PGD", "jiio": "JIIO"}[self.config.adversary]
        return f"{self.config.data}: {self.counts} images; {self.weights} parameters, trained against {adversary}."


def pgd(model: nn.Module, *, tolerance: float = 1e-2, **own: Any) -> PGD:
    """Projected gradient ascent with solves to a relative tolerance."""
    gradient = Implicit(linear_solver=GMRES(rtol=tolerance, max_steps=40))
    return PGD(model, **own, solver=Anderson(rtol=tolerance, max_steps=40), gradient=gradient)


AS_PUBLISHED = "PGD-20, as published"
"""The rival of the published times: every solve and adjoint solve begins at zero and runs its budget out."""


def published_pgd(model: nn.Module, **own: Any) -> PGD:
    """The projected gradient ascent that Gurumurthy et al. timed, by their code: 20 steps of 0.6 radii, cold solves of
    18 Broyden steps to 1e-5, and 20 products for the adjoint, by GMRES where theirs are Broyden steps."""
    return PGD(
        model,
        **own,
        steps=20,
        step_size=0.6,
        solver=Broyden(rtol=1e-5, max_steps=18),
        gradient=Implicit(linear_solver=GMRES(rtol=1e-9, max_steps=20)),
        warm_start=False,
    )


def _model(config: AdversarialConfig, splits: Splits) -> nn.Module:
    solved: dict[str, Any] = {"solver": solver(config.equilibria), "gradient": gradient(config.equilibria)}
    kind = IMAGES[config.data]
    if config.model == "mdeq":
        size = mdeq_small(
            image_channels=kind.channels,
            classes=kind.classes,
            channels=(config.channels, config.channels),
            downsamplings=1 if kind.size < 16 else 2,
        )
        return Standardized(MDEQ(size, **solved), splits.mean, splits.deviation)
    return EquilibriumClassifier(
        EquilibriumClassifierConfig(
            image_channels=kind.channels,
            image_size=kind.size,
            classes=kind.classes,
            channels=config.channels,
            stride=STRIDE[config.data],
            bound=config.bound,
            mean=splits.mean[0],
            deviation=splits.deviation[0],
        ),
        **solved,
    )


def pixels(images: Tensor) -> Tensor:
    """Convert uint8 to [0, 1]."""
    return images.float() / 255


def ready(config: AdversarialConfig) -> None:
    """Raise where the data is missing or wrong."""
    selected(config.data, config)


RUNNER = Trainer(AdversarialTraining, ready)


# -- What attacks do to a trained classifier, and what they cost -------------------------------------------------------


SHOWN = 8
"""Number of images in the figure."""


@dataclass(frozen=True)
class Strength:
    """One attack on the test images.

    Attributes:
        accuracy, cross_entropy: under the attack, after an exact solve at the changed images.
        seconds: CPU seconds of the process for all images at once; on a GPU, wall seconds. The median of several
            times, all attacks in turn.
        evaluations: evaluations of the map plus products with its Jacobian, in whole-batch equivalents.
        step_size: chosen, as a share of the radius.
        tolerance: chosen, of PGD's solves.
    """

    accuracy: float
    cross_entropy: float
    seconds: float = 0.0
    evaluations: float = 0.0
    step_size: float = 0.0
    tolerance: float = 0.0


def measured(config: AttacksConfig, run: Run) -> dict[str, Strength]:
    """Every attack at the run's best weights, with step size and tolerance tuned on validation images. Some images
    under the longest attack of each kind are saved."""
    task: AdversarialTraining = RUNNER.best(config.training, run)
    where = device(config.training.machine.device)
    model = task.model.eval()
    with quietly():
        attacks = tuned(config, model, *_images(task, "validation", config.tuning_images, where))
        images, labels = _images(task, "test", config.attacked_images, where)
        cases = {name: partial(attack.find, images, labels) for name, attack in attacks.items()}
        timed = timed_in_turn(cases, config.repeats, where)
        by_attack, changed = {}, {CLEAN: images}
        changed |= {name: result.images for name, (_, result) in timed.items()}
        for name, one in changed.items():
            losses, right = judged(model, one, labels)
            by_attack[name] = Strength(float(right.double().mean()), float(losses.double().mean()))
        for name, (seconds, result) in timed.items():
            attack = attacks[name]
            tolerance = attack.solver.rtol if isinstance(attack, PGD) and attack.solver else 0.0
            more: dict[str, Any] = {"evaluations": result.evaluations, "tolerance": tolerance}
            more["step_size"] = attack.step_size
            by_attack[name] = replace(by_attack[name], seconds=seconds, **more)
        shown = {name: changed[name][:SHOWN] for name in (CLEAN, config.strongest("PGD"), config.strongest("JIIO"))}
        with torch.no_grad():
            pictures = {name: (one.cpu(), model(one).argmax(1).cpu()) for name, one in shown.items()}
    files.save(pictures, run.path / "pictures.pt")
    return by_attack


def tuned(config: AttacksConfig, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, PGD | JIIO]:
    """Every attack with the settings under which it is strongest on these images, by name."""
    settings: dict[str, Any] = {"radius": config.training.radius, "norm": config.training.norm}

    def best(tries: Iterable[Any]) -> tuple[float, Any]:
        strong = ((float(judged(model, one(images, labels), labels)[0].mean()), one) for one in tries)
        return max(strong, key=lambda pair: pair[0])

    attacks: dict[str, PGD | JIIO] = {}
    sizes: list[dict[str, Any]] = [
        {"step_size": size, "last_step_size": last} for size in config.step_sizes for last in (None, 0.2)
    ]
    for steps in config.pgd_steps:
        tries = [
            best(pgd(model, steps=steps, tolerance=one, **size, **settings) for size in sizes)
            for one in sorted(config.tolerances)
        ]
        enough = (1 - config.tolerated) * max(value for value, _ in tries)
        attacks[f"PGD-{steps}"] = [attack for value, attack in tries if value >= enough][-1]  # the loosest
    attacks[AS_PUBLISHED] = published_pgd(model, **settings)
    ways = [{**size, "damping": damping} for size in sizes for damping in ((0.8, 0.6, 1.0), (1.0, 1.0, 1.0))]
    for steps in config.jiio_steps:
        attacks[f"JIIO-{steps}"] = best(JIIO(model, steps=steps, **way, **settings) for way in ways)[1]
    steps = sorted(config.jiio_steps)[len(config.jiio_steps) // 2]
    accelerated = Anderson(memory=20, rtol=1e-3, max_steps=steps)
    tried = (JIIO(model, steps=steps, start=None, solver=accelerated, **way, **settings) for way in ways)
    attacks[f"JIIO-{steps}, Anderson"] = best(tried)[1]
    return attacks


def strengths(by_attack: dict[str, Strength]) -> Table:
    """Table of the attacks."""
    return table.sheet("", by_attack, [
        Cell("Attack", lambda name: name),
        Cell("Accuracy", lambda name: f"{100 * by_attack[name].accuracy:.1f}", "%"),
        Cell("Cross-entropy", lambda name: f"{by_attack[name].cross_entropy:.3f}"),
        Cell("Time", lambda name: f"{1e3 * by_attack[name].seconds:.0f}", "ms"),
        Cell("Evaluations", lambda name: f"{by_attack[name].evaluations:.0f}"),
        Cell("Step", lambda name: f"{by_attack[name].step_size:g}", "radii"),
    ]).table  # fmt: skip


def _images(task: AdversarialTraining, split: str, count: int, where: torch.device) -> tuple[Tensor, Tensor]:
    images, labels = (part[:count].to(where) for part in task.sets[split].tensors)
    return pixels(images), labels


ATTACKS = Measuring(
    first=RUNNER,
    training=lambda config: config.training,
    measure=measured,
    show=strengths,
    name="attacks.json",
    doing="Attacking",
)


# -- The table ---------------------------------------------------------------------------------------------------------


ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "clean": ("clean images", {"adversary": "none"}),
    "pgd": ("PGD-10", {"adversary": "pgd", "attack_steps": 10, "attack_step_size": 0.3}),
    "jiio": ("JIIO-20", {"adversary": "jiio"}),
    "envelope": ("JIIO-20, envelope", {"adversary": "jiio", "attack_gradient": "envelope"}),
}
"""The kinds of training images: a label and the settings of each."""

TRAINED = {"clean": "on clean images", "pgd": "against PGD-10", "jiio": "against JIIO-20"}
"""The kinds whose models are attacked, in a sentence."""

PUBLISHED_STEPS = {"pgd": 20, "jiio": 80, "envelope": 80}
"""Steps of the adversaries in training at the paper's scale."""

PUBLISHED = {"pgd": (99.18, 96.53, 95.74), "jiio": (99.32, 95.74, 96.63)}
"""Gurumurthy et al. 2021, Table 5, MNIST: accuracy in percent on clean images, under PGD, and under JIIO."""


@dataclass(frozen=True, kw_only=True)
class AdversarialTableConfig:
    """Training on clean images, with PGD and with JIIO, tested on clean images and under both attacks; strength of the
    attacks against time."""

    plan: Plan = field(default_factory=Plan)

    data: DataName = "digits"
    """Data set of images."""

    model: Literal["tanh", "mdeq"] = "tanh"
    """tanh or mdeq; see 'torchimplicit train jiio-adversarial-digits --help'."""

    norm: Norm = "l2"
    """Norm of the ball: l2, or linf (largest change of one pixel)."""

    radius: float | None = None
    """Radius of the ball. Default: the recipe's in the 2-norm, 0.1 in the maximum norm."""

    data_dir: Path | None = None
    """Folder of the data. Default: download it."""

    steps: int | None = None
    """Optimizer steps of each training. Default: the recipe's."""

    machine: Machine = field(default_factory=lambda: Machine(tensorboard=False))

    def __post_init__(self) -> None:
        positive(self, "steps", "radius")
        if self.data == "digits":
            refuse_published(self.plan.scale, "of MNIST, which --data mnist asks for, and these are 8×8 digits")


def attacked(config: AdversarialTableConfig, row: str, seed: int) -> AttacksConfig:
    """One run's settings."""
    usual = adversarial_digits() if config.data == "digits" else replace(adversarial_mnist(), data=config.data)
    if config.model == "mdeq":
        multiscale = adversarial_mdeq()
        usual = replace(usual, model="mdeq", channels=multiscale.channels, equilibria=multiscale.equilibria)
        usual = replace(usual, optimization=multiscale.optimization) if config.data == "digits" else usual
    radius = config.radius or (usual.radius if config.norm == "l2" else 0.1)
    usual = replace(usual, norm=config.norm, radius=radius)
    optimization = usual.optimization.of(seed, config.steps)
    if config.plan.scale == "paper":
        usual = replace(usual, train_images=None, test_images=None)
        optimization = replace(optimization, steps=20 * optimization.steps)
    settings: dict[str, Any] = {"data_dir": config.data_dir, "optimization": optimization, "machine": config.machine}
    adversary = dict(ROWS[row][1])
    if config.plan.scale == "paper" and row in PUBLISHED_STEPS:
        adversary["attack_steps"] = PUBLISHED_STEPS[row]
    return AttacksConfig(training=replace(usual, **adversary, **settings))


def jobs(config: AdversarialTableConfig) -> list[Job]:
    """All jobs: every way of training, seed by seed."""
    rows = [row for row in ROWS if row != "envelope" or (config.model, config.norm) == ("tanh", "l2")]
    pairs = [(row, seed) for seed in config.plan.all_seeds for row in rows]
    return [
        Job(f"{row}-seed{seed}", "jiio-adversarial-attacks", attacked(config, row, seed), {"row": row, "seed": seed})
        for row, seed in pairs
    ]


def figures(config: AdversarialTableConfig, run: Run) -> dict[str, Any] | None:
    """Return the figures of a run whose attacks are measured."""
    attacks, trained = (table.read(name)(config, run) for name in ("attacks.json", "results.json"))
    if attacks is None or trained is None:
        return None
    return {"attacks": attacks, **{name: trained[name] for name in ("validations", "seconds", "costs")}}


def of(runs: Runs, row: str, attack: str, what: str) -> list[float]:
    """A figure of an attack on the models of a row, for every seed."""
    return runs.of(row, f"attacks.{attack}.{what}")


def ratio(runs: Runs, row: str, one: str, other: str, what: str) -> float:
    """Mean over the seeds of the ratio of a figure between two attacks."""
    return fmean(a / b for a, b in zip(of(runs, row, one, what), of(runs, row, other, what), strict=True))


def against(runs: Runs, row: str, attack: str, rival: str) -> tuple[float, float]:
    """An attack's cross-entropy over that of a rival, and the rival's time over the attack's."""
    return ratio(runs, row, attack, rival, "cross_entropy"), ratio(runs, row, rival, attack, "seconds")


def measured_of(runs: Runs, row: str, kind: str, steps: Iterable[int]) -> dict[int, str]:
    """The names of the attacks of a kind on the models of a row, by their numbers of steps. A record of an earlier
    version may have fewer of them."""
    return {n: name for n in sorted(steps) if of(runs, row, name := f"{kind}-{n}", "seconds")}


def sheets(config: AdversarialTableConfig, runs: Runs) -> Iterator[TitledTable]:
    """Accuracies, and the strength of the attacks."""
    strongest = [attacked(config, "jiio", 0).strongest(kind) for kind in ("PGD", "JIIO")]
    cells = [Cell[str]("Trained on", lambda row: ROWS[row][0])]
    for place, attack in enumerate((CLEAN, *strongest)):

        def published(row: str, place: int = place) -> str:
            return f"{PUBLISHED[row][place]:.2f}" if row in PUBLISHED else table.NONE

        title, accuracy = "Clean" if attack == CLEAN else f"Under {attack}", f"attacks.{attack}.accuracy"
        cells.append(
            Cell(title, runs.told(accuracy, 1, 100), "%", "Test accuracy, mean ± standard deviation over the seeds.")
        )
        told = "Published accuracy, of another model on MNIST."
        cells.append(Cell(f"{title}, published", published, "%", told))
    note = "Median wall time of a training step. Other programs ran on the machine, so that it is rough."
    cells.append(Cell("A training step", runs.told("costs.seconds", 0, 1e3), "ms", note))
    yield table.sheet("Test accuracy, clean and attacked", ROWS, cells)
    for row in ("clean", "jiio"):
        yield strength(runs.where(row=row), row)


def strength(runs: Runs, row: str) -> TitledTable:
    """Tabulate the effect and cost of the attacks on the models of a row."""
    first: dict[str, Any] = runs[0]["attacks"] if runs else {}
    rival = next((name for name in reversed(first) if name.startswith("PGD") and name != AS_PUBLISHED), CLEAN)

    def told(what: str, digits: int, scale: float = 1.0) -> Any:
        return lambda name: table.spread(of(runs, row, name, what), digits, scale)

    names = [name for name in first if name != CLEAN]
    return table.sheet(f"Strength and time of attacks on the model trained {TRAINED[row]}", names, [
        Cell("Attack", lambda name: name),
        Cell("Cross-entropy", told("cross_entropy", 3), "",
             "Mean over the attacked test images, at an exact solve of their equilibria."),
        Cell("Accuracy", told("accuracy", 1, 100), "%", "Accuracy at the same solve."),
        Cell("Relative to PGD-20", lambda name: f"{ratio(runs, row, name, rival, 'cross_entropy'):.3f}", "",
             "Cross-entropy divided by that of PGD-20."),
        Cell("Time", told("seconds", 0, 1e3), "ms",
             "CPU time for all images at once: median of repeats that alternate between the attacks, mean over the "
             "seeds."),
        Cell("Speed-up over PGD-20", lambda name: f"{ratio(runs, row, rival, name, 'seconds'):.1f}", "×",
             "Time of PGD-20 divided by that of the attack."),
        Cell("Evaluations", lambda name: f"{fmean(of(runs, row, name, 'evaluations')):.0f}", "",
             "Evaluations of the map plus products with its Jacobian, in whole-batch equivalents."),
        Cell("Step size", lambda name: f"{first[name]['step_size']:g}", "radii",
             "Step size that was chosen on the validation images, for the first seed."),
        Cell("Tolerance", lambda name: f"{tolerance:g}" if (tolerance := first[name]["tolerance"]) else table.NONE, "",
             "Tolerance of PGD's solves that was chosen in the same way."),
    ])  # fmt: skip


def claims(config: AdversarialTableConfig, runs: Runs) -> Iterator[Claim]:
    """Claims about the attacks' strength per time, then about training against them."""
    kind = attacked(config, "jiio", 0)
    rival = kind.strongest("PGD")
    for row in ("clean", "pgd", "jiio"):
        if not runs.where(row=row):
            continue
        jiio, pgd = (
            measured_of(runs, row, attack, steps).values()
            for attack, steps in (("JIIO", kind.jiio_steps), ("PGD", kind.pgd_steps))
        )
        rivals = [one for one in (rival, AS_PUBLISHED) if one in runs.where(row=row)[0]["attacks"]]
        beside = {one: [(name, *against(runs, row, name, one)) for name in jiio] for one in rivals}
        for one, shown in beside.items():
            yield Claim(
                f"On the model trained {TRAINED[row]}, JIIO reaches at least 0.97 of the cross-entropy of {one} and "
                "is at least 3 times as fast",
                "; ".join(
                    f"{name} reaches {strong:.3f} of it and is {fast:.1f} times as fast" for name, strong, fast in shown
                ),
                any(strong >= 0.97 and fast >= 3 for _, strong, fast in shown),
            )
        strong, short = (
            max(((fast, name) for name, share, fast in each if share >= 0.97), default=(0.0, "no JIIO"))
            for each in (beside[rival], [(name, *against(runs, row, name, rival)) for name in pgd])
        )
        yield Claim(
            f"On the model trained {TRAINED[row]}, the fastest JIIO of that strength is at least 3 times as fast as "
            "the fastest PGD of that strength, which may take few and long steps",
            f"{short[1]} is {short[0]:.1f} times as fast as {rival}, {strong[1]} is {strong[0]:.1f} times as fast as "
            f"{rival}: a ratio of {strong[0] / short[0]:.1f}",
            strong[0] >= 3 * short[0],
        )
    if pairs := runs.couples("pgd", "jiio"):
        differences = {
            attack: 100 * fmean(runs.gaps("jiio", "pgd", f"attacks.{attack}.accuracy"))
            for attack in (CLEAN, rival, kind.strongest("JIIO"))
        }
        costs = [fmean(pair[i]["costs.seconds"] for pair in pairs if pair[i]["costs"]) for i in (0, 1)]
        words = ", ".join(f"{attack}: {value:+.1f} points" for attack, value in differences.items())
        yield Claim(
            "A model trained against JIIO is at most one point less accurate than one trained against PGD-10, on clean "
            "images and under both attacks, and takes less time to train",
            f"{words}; a training step is {costs[0] / costs[1]:.1f} times as fast",
            min(differences.values()) >= -1 and costs[1] < costs[0],
        )


def protocol(config: AdversarialTableConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    kind = attacked(config, "jiio", 0)
    one, sizes, tolerances = kind.training, kind.step_sizes, kind.tolerances
    kind_of = "A dense model" if config.data == "digits" else "A convolutional model"
    model = f"{kind_of} tanh(Wz + Ux + b) of {one.channels} channels with a bound of {one.bound:g} on the norm of W"
    if config.model == "mdeq":
        model = f"A multiscale model (MDEQ) with two branches of {one.channels} channels"
    norm = "2-norm" if one.norm == "l2" else "maximum norm"
    seeds = f"{config.plan.seeds} seed{'s' * (config.plan.seeds > 1)}"
    return (
        f"{model} classifies images of {config.data}. Attacks change an image within a ball of radius {one.radius:g} "
        f"in the {norm}, with pixels kept in [0, 1]. Each model was trained with {seeds}, for "
        f"{one.optimization.steps} steps of Adam on batches of {one.optimization.batch_size} images; the weights with "
        "the best validation accuracy under the attack that was trained against were tested. The step size of each "
        f"attack is the one of {', '.join(f'{s:g}' for s in sizes)} radii with the largest cross-entropy on "
        f"{kind.tuning_images} validation images. PGD's solves begin at the equilibrium of the previous step, with the "
        f"loosest tolerance of {', '.join(f'{t:g}' for t in tolerances)} that keeps {100 * (1 - kind.tolerated):g} % "
        "of its cross-entropy. JIIO is not accelerated. Its damping is the published one or none, and the step sizes "
        "of both attacks stay constant or fall to a fifth of a radius: the strongest choice is taken. "
        f"'{AS_PUBLISHED}' follows the authors' code: solves from zero of 18 Broyden steps to a tolerance of 1e-5, 20 "
        "products for every adjoint, and steps of 0.6 radii. Attacks were tested on at most "
        f"{kind.attacked_images} test images, in evaluation mode, and each was timed {kind.repeats} times, in "
        "alternation with the others."
    )


def notes(config: AdversarialTableConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    if config.data == "digits":
        yield "The images are 8×8 digits and a model trains for about a minute: compare rows with each other only."
    if config.plan.scale == "paper":
        yield "The images, the steps and the adversaries' lengths are as published; the model and the radius are not."
    yield (
        "The published figures are those of another model on MNIST, which takes 4360 ms for PGD-20 and 1401 ms for "
        "JIIO-80."
    )
    yield (
        "Adversarial training minimizes over the weights a maximum over changes of the image, so that the gradient at "
        "the strongest change is that of the loss with the change held fixed (Danskin's theorem). By default it is "
        "taken at an exact solve, which begins at JIIO's state and costs a few evaluations; it is then exact for the "
        "change that was found, even where the attack has not converged. The row named envelope takes state and "
        "adjoint as JIIO leaves them, without a further solve; its gradient is exact only as far as JIIO has "
        "converged."
    )
    yield (
        "JIIO that is accelerated by Anderson's method finds weaker attacks here, even with the safeguard by the cost: "
        "the problem is not convex, and acceleration finds other stationary points."
    )
    clean = runs.where(row="clean")
    if clean and AS_PUBLISHED in clean[0]["attacks"]:
        counts = {
            name: fmean(of(runs, "clean", name, "evaluations"))
            for name in clean[0]["attacks"]
            if name.startswith(("PGD", "JIIO"))
        }
        yield (
            "Evaluations of the map plus products with its Jacobian, on the model trained on clean images: "
            f"{', '.join(f'{name} {count:.0f}' for name, count in counts.items())}. The published ratio compares JIIO "
            "with solves that begin at zero and use up their step budgets; loose solves that begin at the previous "
            "equilibrium take a few evaluations each. The layers before and after the equilibrium run forward and "
            "backward in every joint step, but only once per solve in PGD."
        )
    yield (
        "PGD with steps longer than the radius jumps from boundary to boundary, and is close to its final strength "
        "after a few of them where the ball is small. Compared with such a PGD instead of PGD-20, JIIO saves less time "
        "or none, as the claims about the fastest PGD show."
    )


def drawings(config: AdversarialTableConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Strength against time, and images of the first seed, clean and attacked."""
    if not runs:
        return
    kind = attacked(config, "jiio", 0)
    rows = [row for row in ("clean", "pgd", "jiio") if runs.where(row=row)]
    figure, panels = axes(len(rows), width=4.2, height=3.6)
    for panel, row in zip(panels, rows, strict=True):
        for index, (label, several) in enumerate({"PGD": kind.pgd_steps, "JIIO": kind.jiio_steps}.items()):
            names = measured_of(runs, row, label, several)
            times = [1e3 * fmean(of(runs, row, name, "seconds")) for name in names.values()]
            strong = [fmean(of(runs, row, name, "cross_entropy")) for name in names.values()]
            panel.plot(times, strong, label=label, **style(index))
            for n, x, y in zip(names, times, strong, strict=True):
                panel.annotate(str(n), (x, y), textcoords="offset points", xytext=(4, -10), fontsize=7.5)
        panel.set(xlabel="CPU time, ms", ylabel="cross-entropy", title=f"trained {TRAINED[row]}")
        panel.legend()
    yield CaptionedFigure(
        "strength",
        figure,
        "Cross-entropy of the attacked test images at an exact solve, against the time of the attack on all of them. "
        "Numbers beside the points are numbers of steps; all figures are means over the seeds.",
    )
    lines = []
    for row in ("clean", "jiio"):
        kept = [folders[line.name].path / "pictures.pt" for line in runs.where(row=row)]
        for file in [file for file in kept if file.is_file()][:1]:
            lines += [(row, name, *one) for name, one in files.load(file).items()]
    if not lines:
        return
    count = len(lines[0][2])
    figure = canvas(1.05 * count + 1.6, 1.2 * len(lines))
    grid = figure.subplots(len(lines), count, squeeze=False)
    for axs, (row, name, images, answers) in zip(grid, lines, strict=True):
        for ax, image, answer in zip(axs, images, answers, strict=True):
            ax.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            ax.set_title(str(int(answer)), fontsize=8, pad=2)
        axs[0].set_ylabel(f"trained\n{TRAINED[row]}\n{name}", fontsize=7, rotation=0, ha="right", va="center")
    yield CaptionedFigure(
        "pictures",
        figure,
        "Clean and attacked test images, with the class that the model predicts above each: a model trained on clean "
        "images and one trained against JIIO, with the first seed.",
    )


TABLE = table.published(
    globals(),
    title="Adversarial training by joint inference",
    source="Gurumurthy, Bai, Manchester, Kolter 2021, Joint inference and input optimization in equilibrium "
    "networks: Table 5 (MNIST), and the comparison of the attack's time with projected gradient ascent.",
)

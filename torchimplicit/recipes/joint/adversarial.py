"""An equilibrium classifier trained against attacks, and what attacks do to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.constraints import L2Ball
from torchimplicit.gradients import Envelope, Implicit
from torchimplicit.linear import GMRES
from torchimplicit.models import EquilibriumClassifier, EquilibriumClassifierConfig
from torchimplicit.problems import FixedPoint, JointInference, JointState
from torchimplicit.recipes.phantom.image_data import IMAGES, selected
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, clock, device, quietly
from torchimplicit.recipes.runtime.settings import (
    Equilibria,
    Machine,
    Optimization,
    fraction,
    not_negative,
    option,
    positive,
)
from torchimplicit.recipes.runtime.table import Cell, Table, sheet
from torchimplicit.recipes.runtime.task import (
    Metric,
    Rows,
    SampledTask,
    gradient,
    solver,
)
from torchimplicit.recipes.runtime.trainer import Measuring, Trainer
from torchimplicit.regularizers import jacobian_frobenius
from torchimplicit.solution import Solution
from torchimplicit.solve import solve
from torchimplicit.solvers import Anderson, FixedPointIteration, Solver

# -- settings ----------------------------------------------------------------------------------------------------------


Adversary = Literal["none", "pgd", "jiio"]

CLEAN = "clean"
"""What images are called that no attack has changed."""


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """An equilibrium classifier trained on images that are changed, within a ball, so as to be hard for it."""

    data: Literal["digits", "mnist"]
    """Which images."""

    data_dir: Path | None = None
    """The folder that holds them. By default MNIST is downloaded; the digits come with scikit-learn."""

    adversary: Adversary = "jiio"
    """What changes the training images: nothing, projected gradient ascent through the equilibrium, or JIIO."""

    attack_gradient: Literal["resolve", "envelope"] = "resolve"
    """With JIIO, the weights' gradient: at an exact solve for the changed image (warm-started), by --gradient; or by
    the envelope theorem, from the state and the adjoint that JIIO ends with, at no further cost."""

    radius: float = 0.5
    """Of the ball around each image, in the 2-norm of its pixels in [0, 1]."""

    attack_steps: int = 20
    """Steps of the attack in training: of JIIO, evaluations; of pgd, equilibria and their gradients."""

    attack_step_size: float = 0.8
    """A step of the attack, as a share of the radius."""

    channels: int = 100
    """Of the state; of the digits' dense model, its size."""

    bound: float = 0.8
    """On the spectral norm of the weight between states."""

    validation_images: int = 300
    """Training images set apart to select the weights by."""

    train_images: int | None = None
    """How many of the other training images to use; by default all."""

    test_images: int | None = None
    """How many of the test images to use; by default all."""

    split_seed: int = 0
    """Which images are set apart."""

    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "radius", "attack_steps", "attack_step_size", "channels")
        positive(self, "validation_images", "train_images", "test_images")
        not_negative(self, "split_seed")
        fraction(self, "bound")
        if self.attack_gradient == "envelope" and self.adversary != "jiio":
            raise UserError(
                f"{option('attack_gradient')} envelope needs the adjoint that JIIO finds, and {option('adversary')} "
                f"is {self.adversary}"
            )
        if self.adversary != "none" and self.equilibria.gradient == "unrolled":
            raise UserError(
                f"{option('gradient')} unrolled would differentiate a solve that begins at its solution, as it does "
                "after an attack, and takes hardly a step: take implicit, or a phantom gradient"
            )


def adversarial_digits() -> AdversarialConfig:
    """A dense model on the bundled digits: half a minute on one core."""
    return AdversarialConfig(
        data="digits",
        optimization=Optimization(steps=150, batch_size=128, learning_rate=1e-2, validate_every=30),
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


@dataclass(frozen=True, kw_only=True)
class AttacksConfig:
    """Trains a classifier, then attacks it at the best weights by everything there is, in turn."""

    training: AdversarialConfig = field(default_factory=adversarial_digits)

    pgd_steps: tuple[int, ...] = (2, 3, 5, 10, 20)
    """Of projected gradient ascent."""

    jiio_steps: tuple[int, ...] = (10, 20, 40, 80)
    """Of JIIO."""

    step_sizes: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Shares of the radius, of which each attack has the best: that of most cross-entropy on validation images."""

    tolerances: tuple[float, ...] = (1e-1, 1e-2)
    """Of PGD's solves; it has the loosest that costs no more than --tolerated of the cross-entropy."""

    tolerated: float = 0.01
    """See --tolerances."""

    tuning_images: int = 200
    """Validation images on which step sizes and tolerances are chosen."""

    attacked_images: int = 360
    """Test images that are attacked."""

    repeats: int = 3
    """How often each attack is timed."""

    def __post_init__(self) -> None:
        positive(self, "tuning_images", "attacked_images", "repeats", "tolerated")
        for name in ("pgd_steps", "jiio_steps", "step_sizes", "tolerances"):
            if not getattr(self, name) or not min(getattr(self, name)) > 0:
                raise UserError(f"{option(name)} must be one or more positive numbers")

    def strongest(self, kind: str) -> str:
        """The name of the longest attack of a kind."""
        return f"{kind}-{max(self.pgd_steps if kind == 'PGD' else self.jiio_steps)}"


def attacks() -> AttacksConfig:
    """On the bundled digits."""
    return AttacksConfig()


# -- Attacks within a ball: projected gradient ascent through the equilibrium, and joint inference ---------------------


DAMPING = (0.8, 0.6, 1.0)
"""Of state, adjoint and perturbation, as published."""


class Found(NamedTuple):
    """What an attack came to.

    Attributes:
        change: of the images, within the ball.
        state: of the equilibrium, approximately: a start for an exact solve.
        evaluations: of the map, and products with its Jacobian, in whole-batch equivalents. A step of JIIO is one of
            each.
    """

    change: Tensor
    state: Tensor
    evaluations: float


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected ascent along the normalized gradient, every gradient that of an equilibrium (Madry et al. 2018).

    The solves begin at the last step's equilibrium.

    Args:
        steps: how many.
        step_size: as a share of the radius.
        tolerance: relative, of each solve and of its adjoint.
        seen: is told of every solve.
    """

    steps: int
    step_size: float
    tolerance: float = 1e-2
    seen: Callable[[Solution], None] | None = None

    def __call__(self, model: EquilibriumClassifier, images: Tensor, labels: Tensor, radius: float) -> Found:
        """Attack; no gradient is carried."""
        mix = model.mixed()
        problem = FixedPoint(lambda z, u: torch.tanh(mix(z) + u), rowwise=True)
        solver = Anderson(rtol=self.tolerance, max_steps=40)
        gradient = Implicit(linear_solver=GMRES(rtol=self.tolerance, max_steps=40))
        change, z, evaluations = torch.zeros_like(images), model.start(images), 0.0
        with torch.enable_grad():
            for _ in range(self.steps):
                change.requires_grad_()
                found = solve(problem, z, model.inject(images + change), solver=solver, gradient=gradient)
                loss = functional.cross_entropy(model.read(found.value), labels, reduction="sum")
                (slope,) = torch.autograd.grad(loss, change)
                if self.seen is not None:
                    self.seen(found)
                assert found.adjoint is not None
                evaluations += found.evaluations + found.adjoint.evaluations
                z = found.value.detach()
                length = slope.flatten(1).norm(dim=1).clamp_min(torch.finfo(slope.dtype).tiny)
                change = _into_ball(change.detach() + radius * self.step_size * _over(slope, length), radius)
        return Found(change, z, evaluations)


@dataclass(frozen=True, kw_only=True)
class JIIO:
    """Joint inference and input optimization (Gurumurthy et al. 2021): perturbation and equilibrium by one iteration.

    Args:
        steps: the most; samples that settle earlier leave.
        step_size: as a share of the radius; the steps are normalized.
        tolerance: relative, of the joint residual.
        solver: by default plain iteration, damped as published. Anderson's method, though it keeps the iterate of the
            highest cost, comes to other stationary points of this problem, which is not convex, and to weaker attacks.
        seen: is told of every solve.
    """

    steps: int
    step_size: float
    tolerance: float = 1e-3
    solver: Solver | None = None
    seen: Callable[[Solution], None] | None = None

    def __call__(self, model: EquilibriumClassifier, images: Tensor, labels: Tensor, radius: float) -> Found:
        """Attack; no gradient is carried."""
        with torch.no_grad():
            found = self.solve(model, images, labels, radius)
        state: JointState = found.value
        return Found(state.x, state.z, 2 * found.evaluations)

    def solve(
        self,
        model: EquilibriumClassifier,
        images: Tensor,
        labels: Tensor,
        radius: float,
        *,
        keep_trajectory: bool = False,
    ) -> Solution:
        """The joint solve, with the gradient of the envelope theorem: for a loss that is the cross-entropy at its
        state, which is the inner loss with the other sign (Danskin's theorem)."""
        solver = self.solver or FixedPointIteration(
            rtol=self.tolerance, max_steps=self.steps, keep_trajectory=keep_trajectory
        )
        start = (model.start(images), torch.zeros_like(images))
        found = solve(self.problem(model, radius), start, images, labels, solver=solver, gradient=Envelope())
        if self.seen is not None:
            self.seen(found)
        return found

    def problem(self, model: EquilibriumClassifier, radius: float) -> JointInference:
        """Perturbation of least likelihood; the arguments are the images and their labels."""
        f = model.map()

        def loss(z: Tensor, change: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            return -functional.cross_entropy(model.read(z), labels, reduction="none")

        return JointInference(
            lambda z, change, images, labels: f(z, images + change),
            loss,
            radius * self.step_size,
            L2Ball(radius),
            rowwise=True,
            damping=DAMPING,
            normalized=True,
        )


Attack = Callable[[EquilibriumClassifier, Tensor, Tensor, float], Found]


def _over(images: Tensor, lengths: Tensor) -> Tensor:
    return images / lengths.view(-1, *(1,) * (images.ndim - 1))


def _into_ball(change: Tensor, radius: float) -> Tensor:
    return _over(change, (change.flatten(1).norm(dim=1) / radius).clamp_min(1))


def judged(model: EquilibriumClassifier, images: Tensor, labels: Tensor) -> Any:
    """Cross-entropy of every image, and which are told right, at an exact solve from zero: ``[batch]`` both."""
    with torch.no_grad():
        scores = model(images, model.start(images))
        return functional.cross_entropy(scores, labels, reduction="none"), scores.argmax(1) == labels


# -- Adversarial training, for the framework that trains ---------------------------------------------------------------


STRIDE = {"digits": None, "mnist": 4}


class AdversarialTraining(SampledTask):
    """A classifier, and an adversary that changes what it learns from."""

    def __init__(self, config: AdversarialConfig):
        super().__init__()
        self.config = config
        self.metric = Metric("accuracy" if config.adversary == "none" else "attacked", "%", "max")
        splits = selected(config.data, config)
        self.sets = {
            "training": Rows(*splits.train),
            "validation": Rows(*splits.validation),
            "test": Rows(*splits.test),
        }
        self.model = EquilibriumClassifier(
            EquilibriumClassifierConfig(
                image_size=IMAGES[config.data].size,
                classes=IMAGES[config.data].classes,
                channels=config.channels,
                stride=STRIDE[config.data],
                bound=config.bound,
                mean=splits.mean[0],
                deviation=splits.deviation[0],
            ),
            solver=solver(config.equilibria),
            gradient=gradient(config.equilibria),
        )

    @property
    def attack(self) -> Attack:
        """The adversary; where there is none in training, one that tests."""
        config = self.config
        if config.adversary == "jiio":
            return self._jiio
        steps = config.attack_steps if config.adversary == "pgd" else 10
        return PGD(steps=steps, step_size=config.attack_step_size, seen=self.solved)

    @property
    def _jiio(self) -> JIIO:
        return JIIO(steps=self.config.attack_steps, step_size=self.config.attack_step_size, seen=self.solved)

    def loss(self, batch: Any) -> Tensor:
        """The cross-entropy of the images as the adversary has changed them."""
        images, labels = pixels(batch[0]), batch[1]
        if self.config.attack_gradient == "envelope":
            return self._by_envelope(images, labels)
        if self.config.adversary == "none":
            return functional.cross_entropy(self.model(images, self.model.start(images)), labels)
        found = self.attack(self.model, images, labels, self.config.radius)
        scores = self.model(images + found.change, found.state.detach())
        return functional.cross_entropy(scores, labels)

    def _by_envelope(self, images: Tensor, labels: Tensor) -> Tensor:
        """At the state that JIIO ends with, whose adjoint gives the gradient. The solve is no layer's, so that the
        Jacobian's penalty is added here: at one of its iterates, drawn at random."""
        config = self.config
        weight = config.equilibria.jacobian_weight
        found = self._jiio.solve(self.model, images, labels, config.radius, keep_trajectory=weight > 0)
        loss = functional.cross_entropy(self.model.read(found.value.z), labels)
        if weight:
            at = found.trajectory[int(torch.randint(len(found.trajectory), ()))]
            f = self.model.map()
            penalty = jacobian_frobenius(FixedPoint(f), at.z.detach(), images + at.x.detach())
            loss = loss + weight * penalty
        return loss

    def score(self, batch: Any) -> Tensor:
        """How many are right, and the sum of the cross-entropies: of the images as they are, and attacked. And how
        many there are."""
        with torch.inference_mode(False):
            images, labels = pixels(batch[0].clone()), batch[1].clone()
            change = self.attack(self.model, images, labels, self.config.radius).change.detach()
            parts: list[Tensor] = []
            for shown in (images, images + change):
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
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in self.sets.items())
        parameters = sum(p.numel() for p in self.model.parameters())
        adversary = {"none": "no adversary", "pgd": "PGD", "jiio": "JIIO"}[self.config.adversary]
        return f"{self.config.data}: {counts} images; {parameters} parameters, trained against {adversary}."


def pixels(images: Tensor) -> Tensor:
    """uint8 to [0, 1]."""
    return images.float() / 255


def ready(config: AdversarialConfig) -> None:
    """Raise where the data is missing or wrong."""
    selected(config.data, config)


RUNNER = Trainer(AdversarialTraining, ready)


# -- What attacks do to a trained classifier, and what they cost -------------------------------------------------------


SHOWN = 8
"""Images of the picture."""


@dataclass(frozen=True)
class Strength:
    """One attack on the test images.

    Attributes:
        accuracy, cross_entropy: under the attack, after an exact solve at the changed images.
        seconds: CPU seconds of the process for all images at once; on a GPU, wall seconds. The median of several
            times, all attacks in turn.
        evaluations: of the map, and products with its Jacobian, in whole-batch equivalents.
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
    """Every attack at the run's best weights, with the step size and the tolerance that suit it on the validation
    images; some of the images, attacked by the longest of each
    kind, go into the run's directory."""
    task: AdversarialTraining = RUNNER.best(config.training, run)
    where = device(config.training.machine.device)
    model, radius = task.model, config.training.radius
    with quietly():
        attacks = tuned(config, model, *_images(task, "validation", config.tuning_images, where))
        images, labels = _images(task, "test", config.attacked_images, where)
        losses, right = judged(model, images, labels)
        found = {CLEAN: Strength(float(right.double().mean()), float(losses.double().mean()))}
        seconds: dict[str, list[float]] = {name: [] for name in attacks}
        changed: dict[str, Tensor] = {}
        evaluations: dict[str, float] = {}
        now = clock(where)
        for _ in range(config.repeats):
            for name, attack in attacks.items():
                began = now()
                result = attack(model, images, labels, radius)
                seconds[name].append(now() - began)
                changed[name], evaluations[name] = images + result.change.detach(), result.evaluations
        for name, attack in attacks.items():
            losses, right = judged(model, changed[name], labels)
            found[name] = Strength(
                accuracy=float(right.double().mean()),
                cross_entropy=float(losses.double().mean()),
                seconds=median(seconds[name]),
                evaluations=evaluations[name],
                step_size=attack.step_size,
                tolerance=attack.tolerance if isinstance(attack, PGD) else 0.0,
            )
        shown = {
            CLEAN: images,
            **{name: changed[name] for name in (config.strongest("PGD"), config.strongest("JIIO"))},
        }
        with torch.no_grad():
            pictures = {
                name: (one[:SHOWN].cpu(), model(one[:SHOWN], model.start(one[:SHOWN])).argmax(1).cpu())
                for name, one in shown.items()
            }
    files.save(pictures, run.path / "pictures.pt")
    return found


def tuned(config: AttacksConfig, model: EquilibriumClassifier, images: Tensor, labels: Tensor) -> dict[str, PGD | JIIO]:
    """Every attack as it is strongest on these images, by name."""

    def strength(attack: Attack) -> float:
        return float(
            judged(model, images + attack(model, images, labels, config.training.radius).change, labels)[0].mean()
        )

    def best(attack: Any) -> tuple[float, Any]:
        tries = [replace(attack, step_size=size) for size in config.step_sizes]
        return max(((strength(one), one) for one in tries), key=lambda pair: pair[0])

    found: dict[str, PGD | JIIO] = {}
    for steps in config.pgd_steps:
        tries = [best(PGD(steps=steps, step_size=1.0, tolerance=one)) for one in sorted(config.tolerances)]
        enough = (1 - config.tolerated) * max(value for value, _ in tries)
        found[f"PGD-{steps}"] = [attack for value, attack in tries if value >= enough][-1]  # the loosest
    for steps in config.jiio_steps:
        found[f"JIIO-{steps}"] = best(JIIO(steps=steps, step_size=1.0))[1]
    steps = sorted(config.jiio_steps)[len(config.jiio_steps) // 2]
    accelerated = JIIO(steps=steps, step_size=1.0, solver=Anderson(memory=20, rtol=1e-3, max_steps=steps))
    found[f"JIIO-{steps}, Anderson"] = best(accelerated)[1]
    return found


def table(found: dict[str, Strength]) -> Table:
    """For people."""
    return sheet("", found, [
        Cell("Attack", lambda name: name),
        Cell("Accuracy", lambda name: f"{100 * found[name].accuracy:.1f}", "%"),
        Cell("Cross-entropy", lambda name: f"{found[name].cross_entropy:.3f}"),
        Cell("Time", lambda name: f"{1e3 * found[name].seconds:.0f}", "ms"),
        Cell("Evaluations", lambda name: f"{found[name].evaluations:.0f}"),
        Cell("Step", lambda name: f"{found[name].step_size:g}", "radii"),
    ]).table  # fmt: skip


def _images(task: AdversarialTraining, split: str, count: int, where: torch.device) -> tuple[Tensor, Tensor]:
    images, labels = (part[:count].to(where) for part in task.sets[split].tensors)
    return pixels(images), labels


ATTACKS = Measuring(
    first=RUNNER,
    training=lambda config: config.training,
    measure=measured,
    show=table,
    name="attacks.json",
    doing="Attacking",
)

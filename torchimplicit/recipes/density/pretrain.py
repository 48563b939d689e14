"""Trains a density functional, or a predictor of densities, on Kohn-Sham calculations without minimizing it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.models.orbital_free import CoefficientNetwork, Domain, Molecule, OrbitalFree, OrbitalFreeConfig
from torchimplicit.models.orbital_free.on_grid import SHARED
from torchimplicit.recipes.density import labels_file, storage
from torchimplicit.recipes.density.learning_settings import Kind, Pretraining
from torchimplicit.recipes.density.lessons import Bare, Lesson, fit_start, network_of, slopes_of
from torchimplicit.recipes.density.objective import Case
from torchimplicit.recipes.density.predict import Trained
from torchimplicit.recipes.density.prepare import prepare_labels
from torchimplicit.recipes.density.quality import Quality, Summary, quality, summarized
from torchimplicit.recipes.density.settings import LabelSettings, OrbitalFreeTraining
from torchimplicit.recipes.density.split import located
from torchimplicit.recipes.density.stepping import Course, Stepper, draw, half_square
from torchimplicit.recipes.density.training import checked, exchange_correlation
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import cache_folder
from torchimplicit.recipes.runtime.fitting import read_checkpoint
from torchimplicit.recipes.runtime.page import COLOURS, Section, axes, document, saved, styled
from torchimplicit.recipes.runtime.run import Environment, Run, threads
from torchimplicit.recipes.runtime.table import CaptionedFigure, Column, Table

FARTHEST = 6e-3
"""The largest L at which a quadratic model is trusted."""

FORGOTTEN, AT_REFERENCE = 0.05, 0.03
"""Probabilities that a molecule's walk restarts at the superposition of atoms, and at the reference density."""

PERTURBED = 0.7
"""Share of the labels whose densities are displaced."""

SPURIOUS_ENERGY, SPURIOUS_LOSS = 0.05, 2.0
"""Thresholds in hartree per electron, and relative to the L of the superposition of atoms. A minimum farther off than
either is a spurious one rather than an error of a trained functional."""


# -- What a network is trained by -------------------------------------------------------------------------------------


class Teacher:
    """The training loss over some molecules, and the figures of others.

    Of a slope :math:`g` that the functional has beside the one that it should have, what counts is how far it moves the
    minimum, :math:`\\lVert Rg\\rVert^2/2N` (:func:`~torchimplicit.models.orbital_free.response`): to first order, the
    implicit loss. Of energies it is their error per electron.
    """

    def __init__(
        self, network: CoefficientNetwork, lessons: Sequence[Lesson], held: Sequence[Lesson], config: Pretraining
    ):
        self.network, self.lessons, self.held, self.config = network, lessons, held, config
        self.walks = [lesson.start.clone() for lesson in lessons]

    def loss(self, numbers: list[int], step: int) -> float:
        """Loss of a batch of molecules; its gradient is left in the network."""
        chosen = [self.lessons[number] for number in numbers]
        generator = draw(self.config.seed, step)
        if self.config.kind == "functional":
            total = self._of_functional(numbers, chosen, generator)
        else:
            total = self._of_tangent(chosen)
        total = total / len(chosen)
        total.backward()
        return float(total.detach())

    def figures(self) -> dict[str, float]:
        """Figures of the held-out molecules: linearized 10³ L, and the error of the energy in mHa per electron."""
        losses, errors = [], []
        for lesson in self.held:
            tangent = self.config.kind != "functional"
            rows = lesson.guess if tangent else lesson.rows[:1]
            ((energy, slope),) = slopes_of(self.network, [lesson], [rows], recorded=False)
            losses.append(1e3 * float(half_square(self._missed(lesson, slope, [0])).sum()) / lesson.electrons)
            if tangent:
                energy = energy + self._along(lesson, slope)
            errors.append(1e3 * abs(float((energy - lesson.energies[0]).detach())) / lesson.electrons)
        if not self.held:
            return {}
        figures = {"L": fmean(losses)}
        return figures if self.config.kind == "density" else {**figures, "dE": fmean(errors)}

    def kept(self) -> list[Tensor]:
        """The tensors for a checkpoint."""
        return self.walks

    def take(self, held: list[Tensor]) -> None:
        """Restore from a checkpoint."""
        self.walks = list(held)

    def _missed(self, lesson: Lesson, slope: Tensor, which: list[int]) -> Tensor:
        """The distance of each minimum from its target, ``[k, n]``; for a directly predicted density, its own
        distance."""
        if self.config.kind == "density":
            return lesson.start - slope @ lesson.plain.T
        if self.config.metric == "overlap":
            return slope @ lesson.plain.T - lesson.plainly[which]
        return slope @ lesson.answer.T - lesson.wanted[which]

    def _along(self, lesson: Lesson, slope: Tensor) -> Tensor:
        """The contribution of the energy's tangent at the guess on the way to the reference, ``[1]``."""
        away = (lesson.rows[:1] - lesson.guess).flatten(1)[:, lesson.place]
        return (slope * away).sum(dim=1)

    def _of_tangent(self, chosen: list[Lesson]) -> Tensor:
        total = torch.zeros(())
        found = slopes_of(self.network, chosen, [lesson.guess for lesson in chosen], recorded=True)
        for lesson, (energy, slope) in zip(chosen, found, strict=True):
            total = total + 2e3 * half_square(self._missed(lesson, slope, [0])).mean() / lesson.electrons
            if self.config.kind == "potential" and self.config.energy_weight:
                error = energy + self._along(lesson, slope) - lesson.energies[:1]
                total = total + self.config.energy_weight * 1e2 * error.abs().mean() / lesson.electrons
        return total

    def _of_functional(self, numbers: list[int], chosen: list[Lesson], generator: torch.Generator) -> Tensor:
        total = torch.zeros(())
        which, moves = [], []
        for number, lesson in zip(numbers, chosen, strict=True):
            others = torch.randperm(len(lesson.rows) - 1, generator=generator)[: self.config.at_once - 1]
            labels = [0, *(1 + others).tolist()]
            which.append(labels)
            moves.append(self._displaced(number, lesson, len(labels), generator))
        rows = [lesson.moved(lesson.rows[k], y) for lesson, k, y in zip(chosen, which, moves, strict=True)]
        found = slopes_of(self.network, chosen, rows, recorded=True)
        for number, lesson, labels, y, (energy, slope) in zip(numbers, chosen, which, moves, found, strict=True):
            missed = self._missed(lesson, slope, labels)
            total = total + 2e3 * half_square(missed).mean() / lesson.electrons
            # the slope that is missing is taken to be the same beside the label
            wanted = lesson.energies[labels] + (y * lesson.gradient(labels)).sum(dim=1)
            if self.config.energy_weight:
                error = (energy - wanted).abs().mean() / lesson.electrons
                total = total + self.config.energy_weight * 1e2 * error
            if self.config.policy:
                self._walk(number, lesson, (slope[0].detach() @ lesson.answer.T - lesson.wanted[0]))
        return total

    def _displaced(self, number: int, lesson: Lesson, count: int, generator: torch.Generator) -> Tensor:
        """Displacements of the labels ``[count, n]`` in the metric's coordinates: random ones, with the walk's for the
        first."""
        y = torch.zeros(count, len(lesson.start))
        if self.config.noise:
            y = torch.randn(y.shape, generator=generator) @ lesson.soft.T
            size = half_square(y) / lesson.electrons
            least, most = -5.0, math.log10(self.config.noise)
            target = 10 ** (least + (most - least) * torch.rand(count, generator=generator))
            kept = torch.rand(count, generator=generator) < PERTURBED
            y = y * (kept * (target / size).sqrt())[:, None]
        if self.config.policy:
            chance = float(torch.rand((), generator=generator))
            if chance < FORGOTTEN:
                self.walks[number] = lesson.start.clone()
            elif chance < FORGOTTEN + AT_REFERENCE:
                self.walks[number] = torch.zeros_like(lesson.start)
            y[0] = self.walks[number]
        return y

    def _walk(self, number: int, lesson: Lesson, missed: Tensor) -> None:
        """Move half a step towards the estimated minimum, given by the base's curvature and the slope at the walk's
        position."""
        walk = self.walks[number]
        walk = walk - 0.5 * (walk + missed)
        size = float(half_square(walk)) / lesson.electrons
        self.walks[number] = walk * min(1.0, (FARTHEST / max(size, 1e-12)) ** 0.5)


# -- What comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """``results.json``.

    Attributes:
        state: ``complete``.
        weights: weights of the network.
        start_test: the test molecules with the linear terms alone, empty for a predictor of densities.
        validation, test: the molecules that are held out, by minimization from the superposition of atoms; of a
            predictor of densities, by its densities.
        spurious: the share of the test molecules whose minimum is converged and yet another one; see :func:`spurious`.
        spurious_start: likewise with the linear terms alone.
        selected: the step whose weights they are.
        skipped: molecules that could not be computed.
        config: the settings.
    """

    state: str
    kind: Kind
    weights: int
    start_test: list[Quality]
    validation: list[Quality]
    test: list[Quality]
    spurious: float
    spurious_start: float
    selected: int
    skipped: list[str]
    course: Course
    environment: Environment
    config: Pretraining


def spurious(one: Quality, electrons: float) -> bool:
    """Return whether a minimum is unrelated to the reference, or on the finer grid a different one, farther away than
    half of the superposition's L."""
    if not one.converged:
        return False
    if one.finer is not None and one.finer.converged and one.finer.moved > 0.5 * one.guess_loss:
        return True
    return one.loss > SPURIOUS_LOSS * one.guess_loss or abs(one.energy_error) > SPURIOUS_ENERGY * electrons


# -- The runner; see :class:`torchimplicit.recipes.runtime.run.Runner` -------------------------------------------------


def check(config: Pretraining) -> None:
    """Check that the functional includes the exchange-correlation of the molecules.

    Raises:
        UserError: it is not.
    """
    exchange_correlation(config.training())


def train(config: Pretraining, run: Run, console: Console) -> bool:
    """Train from the last step that was kept, and write ``results.json`` and ``index.html``."""
    with threads(config.threads), SHARED.limited(config.memory * 1e9), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is not converged is recorded
        files, skipped = located(config.molecules)
        functional, lessons, held = taught(config, files, console)
        assert functional.network is not None
        stepper = stepper_of(config, functional.network, lessons, held)
        stepper.restore(run)
        console.print(
            f"{len(lessons)} molecules to train on, {len(held)} to select by and {len(files['test'])} to test; "
            f"{_count(functional.network)} weights; Ctrl-C stops and keeps what is done.",
            highlight=False,
        )
        if not stepper.run(run, console):
            return False
        functional.network.double()
        results = _finished(config, functional, stepper.course, files, skipped, run)
    run.write_json("results.json", results)
    if config.page:
        write_report(results, run)
    console.print(_table(results).rich_rows())
    return True


def evaluate(config: Pretraining, run: Run, console: Console) -> None:
    """Measure the selected weights again."""
    from torchimplicit.recipes.runtime.settings import from_plain

    if not run.best.is_file():
        raise UserError(f"{run.best} does not exist: nothing was trained yet; 'resume' the run first")
    with threads(config.threads), SHARED.limited(config.memory * 1e9), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        files, skipped = located(config.molecules)
        functional, _, _ = taught(config, files, console)
        course = from_plain(Course, read_checkpoint(run.checkpoint)["course"])
        results = _finished(config, functional, course, files, skipped, run)
    run.write_json("evaluation.json", {name: getattr(results, name) for name in ("validation", "test", "spurious")})
    if config.page:
        write_report(results, run)
    console.print(_table(results).rich_rows())


def taught(
    config: Pretraining, files: Mapping[str, Mapping[str, Path]], console: Console
) -> tuple[OrbitalFree, list[Lesson], list[Lesson]]:
    """The functional with fitted linear terms and its initial network (single precision, scaled to the training
    molecules); and the training and validation lessons."""
    records = {split: [storage.read(path) for path in files[split].values()] for split in ("train", "validation")}
    training = config.training()
    network = network_of(records["train"], width=config.width, channels=config.channels, rounds=config.rounds)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        functional = OrbitalFree(
            OrbitalFreeConfig(
                weizsaecker=config.weizsaecker,
                penalty=config.penalty,
                hidden=0,
                pairs=network.elements if config.pairs else (),
                exchange_correlation=exchange_correlation(training),
                network=network,
                network_at="density" if config.kind == "functional" else "guess",
            )
        )
    labels: dict[str, Any] = {}
    if config.kind == "functional":
        folder = config.molecules.data_dir or cache_folder("molecules")
        geometries = [record.geometry for record in records["train"]]
        outcomes = prepare_labels(geometries, config.molecules.chemistry, LabelSettings(count=config.labels), folder)
        labels = {one.geometry.name: one.path for one in outcomes}
        if lacking := [f"{one.geometry.name}: {one.reason}" for one in outcomes if one.path is None]:
            raise UserError("labels could not be computed: " + "; ".join(lacking))
    bare: dict[str, list[Bare]] = {"train": [], "validation": []}
    without = OrbitalFree(replace(functional.config, network=None, pairs=()))
    with_pairs = OrbitalFree(replace(functional.config, network=None))
    with console.status("Reading the molecules") as status:
        for split, ones in records.items():
            for record in ones:
                status.update(f"Reading the molecules: {record.geometry.name}")
                path = labels.get(record.geometry.name) if split == "train" else None
                bare[split].append(Bare.of(without, with_pairs, record, labels_file.read(path) if path else None))
    fit_start(functional, bare["train"])
    assert functional.network is not None
    lessons = {split: [Lesson.of(functional, one) for one in ones] for split, ones in bare.items()}
    seen = [one.guess if config.kind != "functional" else one.rows for one in lessons["train"]]
    functional.network.float().scale(seen, [one.graph.kinds for one in lessons["train"]])
    return functional, lessons["train"], lessons["validation"]


def stepper_of(
    config: Pretraining, network: CoefficientNetwork, lessons: Sequence[Lesson], held: Sequence[Lesson]
) -> Stepper:
    """The stepper that trains a network."""
    teacher = Teacher(network, lessons, held, config)
    return Stepper(
        network,
        config.stepping,
        len(lessons),
        config.seed,
        teacher.loss,
        teacher.figures,
        (teacher.kept, teacher.take),
    )


def _finished(
    config: Pretraining,
    functional: OrbitalFree,
    course: Course,
    files: Mapping[str, Mapping[str, Path]],
    skipped: list[str],
    run: Run,
) -> Results:
    """The results, for the selected weights."""
    network = functional.network
    assert network is not None
    network.double().load_state_dict(read_checkpoint(run.best)["weights"])
    training = config.training()
    measure = measured_directly if config.kind == "density" else measured
    start: list[Quality] = []
    if config.kind != "density":
        linear = OrbitalFree(replace(functional.config, network=None))
        linear.load_state_dict({k: v for k, v in functional.state_dict().items() if not k.startswith("network.")})
        start = measured(linear, files["test"], training)
        domain = Domain.of([storage.read(path).molecule_without_grid() for path in files["train"].values()])
        Trained(functional, domain, config.molecules.chemistry).save(run)
    validation, test = (measure(functional, files[split], training) for split in ("validation", "test"))
    electrons = {name: float(storage.read(path).geometry.electrons) for name, path in files["test"].items()}
    return Results(
        state="complete",
        kind=config.kind,
        weights=_count(network),
        start_test=start,
        validation=validation,
        test=test,
        spurious=share_spurious(test, electrons),
        spurious_start=share_spurious(start, electrons),
        selected=course.best,
        skipped=skipped,
        course=course,
        environment=Environment.of(torch.device("cpu")),
        config=config,
    )


def share_spurious(found: Sequence[Quality], electrons: Mapping[str, float]) -> float:
    """The share of spurious minima among molecules, given their numbers of electrons by name; NaN for none."""
    return fmean(spurious(one, electrons[one.name]) for one in found) if found else math.nan


def measured(
    functional: OrbitalFree,
    files: Mapping[str, Path],
    config: OrbitalFreeTraining,
    *,
    spectrum: bool = False,
    constants: Tensor | None = None,
    look_closer: bool = True,
) -> list[Quality]:
    """Measure each molecule, minimizing from the superposition of atoms; one molecule at a time is in memory. See
    :func:`~torchimplicit.recipes.density.quality.quality`."""
    finer = look_closer and checked(config)
    return [
        quality(
            Case.of(storage.load(path)),
            functional,
            config,
            spectrum=spectrum,
            constants=constants,
            file=path if finer else None,
        )
        for path in files.values()
    ]


@torch.no_grad()
def measured_directly(functional: OrbitalFree, files: Mapping[str, Path], config: OrbitalFreeTraining) -> list[Quality]:
    """Measure each molecule's density as the network predicts it, without energy or minimization."""
    found = []
    for path in files.values():
        case = Case.of(storage.load(path))
        p, molecule = predicted(functional, case), case.molecule
        found.append(
            Quality(
                name=molecule.name,
                size=molecule.size,
                loss=float(case.loss(p)),
                l1=float(case.l1(p)),
                energy_error=math.nan,
                guess_loss=float(case.loss(molecule.guess)),
                guess_l1=float(case.l1(molecule.guess)),
                negative=float(molecule.density(p).min()),
                steps=0,
                evaluations=0.0,
                converged=True,
            )
        )
    return found


def predicted(functional: OrbitalFree, case: Case) -> Tensor:
    """The density that a network predicts directly, ``[n]``: the superposition of atoms minus the network's slope
    there, in the metric's coordinates and with the right number of electrons."""
    assert functional.network is not None
    molecule: Molecule = case.molecule
    inverse, normal = case.plane
    slope = inverse @ functional.network.tangent(molecule)[1]
    return molecule.guess - inverse @ (slope - normal[0] * (normal[0] @ slope))


def _count(network: CoefficientNetwork) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# -- The page ---------------------------------------------------------------------------------------------------------


NAMES: dict[Kind, str] = {
    "potential": "A learned external potential",
    "functional": "A density functional of the coefficients",
    "density": "A predictor of the density",
}


def write_report(results: Results, run: Run) -> None:
    """``figures/*.png`` and ``index.html``."""
    with styled():
        drawn, plots = axes(2, width=5.0)
        glances = results.course.glances
        for plot, what, label in zip(plots, ("L", "dE"), ("10³ L, linearized", "ΔE, mHa per electron"), strict=True):
            there = [glance for glance in glances if what in glance.figures]
            if there:
                values = [glance.figures[what] for glance in there]
                plot.plot([glance.step for glance in there], values, "o-", color=COLOURS[0], markersize=3)
                plot.set(xlabel="step", ylabel=label, yscale="log", title="validation")
        caption = "The validation molecules during training: how far their minima would be away, and their energies."
        pictures = saved([CaptionedFigure("training", drawn, caption)], run)
    lead = (
        f"{NAMES[results.kind]} of {results.weights} weights, {results.course.step} steps, "
        f"{results.course.seconds:.0f} s; the weights of step {results.selected} were selected. "
        f"{100 * results.spurious:.0f} % of the test molecules have a spurious minimum."
    )
    run.write_text(
        "index.html",
        document("Pre-training a density functional", [lead], [Section(pictures=pictures, table=_table(results))]),
    )


def _table(results: Results) -> Table:
    columns = [
        Column("Molecules"),
        Column("L", "10⁻³"),
        Column("L1 per electron"),
        Column("ΔE", "mHa"),
        Column("Better than MINAO", "%"),
        Column("Spurious minima", "%"),
        Column("Converged", "%"),
        Column("Steps"),
    ]
    lines = {
        "test, linear terms alone": (results.start_test, results.spurious_start),
        "validation": (results.validation, math.nan),
        "test": (results.test, results.spurious),
    }
    rows = [_row(name, summarized(found), spurious) for name, (found, spurious) in lines.items() if found]
    return Table(columns, rows)


def _row(name: str, one: Summary, spurious: float) -> list[str]:
    return [
        name,
        f"{1e3 * one.loss:.3f} (MINAO {1e3 * one.guess_loss:.3f})",
        f"{one.l1:.4f} (MINAO {one.guess_l1:.4f})",
        "–" if math.isnan(one.energy_error) else f"{1e3 * one.energy_error:.1f}",
        f"{100 * one.better:.0f}",
        "–" if math.isnan(spurious) else f"{100 * spurious:.0f}",
        f"{100 * (1 - one.unconverged):.0f}",
        f"{one.mean_steps:.1f}",
    ]

"""Fine-tunes a pre-trained density functional on the densities at its minima."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.models.orbital_free import OrbitalFree, element_counts
from torchimplicit.models.orbital_free.on_grid import SHARED
from torchimplicit.recipes.density import storage
from torchimplicit.recipes.density.learning_settings import Finetuning, Pretraining
from torchimplicit.recipes.density.objective import Case, Share, Weights, Work
from torchimplicit.recipes.density.predict import Trained
from torchimplicit.recipes.density.pretrain import measured, share_spurious
from torchimplicit.recipes.density.quality import Quality, Summary, summarized
from torchimplicit.recipes.density.settings import OrbitalFreeTraining
from torchimplicit.recipes.density.split import located
from torchimplicit.recipes.density.stepping import Course, Stepper
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.execution import opened
from torchimplicit.recipes.runtime.fitting import read_checkpoint
from torchimplicit.recipes.runtime.page import COLOURS, Section, axes, document, saved, styled
from torchimplicit.recipes.runtime.run import Environment, Run, threads
from torchimplicit.recipes.runtime.table import CaptionedFigure, Column, Table

# -- What comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """Work per molecule in the training steps, averaged.

    Attributes:
        steps: steps of a minimization from the density found last.
        adjoint: products, or evaluations, of the gradient's own solve.
        unconverged: the share of the minimizations that were not done within their budget.
    """

    steps: float
    adjoint: float
    unconverged: float


@dataclass(frozen=True)
class Results:
    """``results.json``.

    Attributes:
        state: ``complete``.
        kind: kind of the pre-training.
        weights: number of trained weights.
        trained_on: names of the molecules.
        before, test: the test molecules by the pre-trained functional and by this one, from the superposition of
            atoms.
        before_train, train: likewise those that are trained on.
        reference_before, reference: errors of the energies at the reference densities of the test molecules, in
            hartree, before and after.
        spurious_before, spurious: the shares of the test molecules with a spurious minimum.
        effort: means over the first and the last tenth of the steps.
        pretraining_seconds: CPU seconds of the pre-training.
        selected: the step whose weights they are.
        skipped: molecules that could not be computed.
        wall: seconds of wall-clock time that the steps took in this process.
        config: the settings.
    """

    state: str
    kind: str
    weights: int
    trained_on: list[str]
    before: list[Quality]
    test: list[Quality]
    before_train: list[Quality]
    train: list[Quality]
    reference_before: list[float]
    reference: list[float]
    spurious_before: float
    spurious: float
    effort: list[Effort]
    pretraining_seconds: float
    selected: int
    skipped: list[str]
    wall: float
    course: Course
    environment: Environment
    config: Finetuning


# -- The runner; see :class:`torchimplicit.recipes.runtime.run.Runner` -------------------------------------------------


def check(config: Finetuning) -> None:
    """The run must be a pre-training of a functional.

    Raises:
        UserError: it is not.
    """
    pretrained(config)


def pretrained(config: Finetuning) -> tuple[Pretraining, Trained, float]:
    """The settings of the pre-training, its trained functional, and its CPU seconds.

    Raises:
        UserError: the run is none, or has no functional.
    """
    run, _, settings = opened(config.run)
    if not isinstance(settings, Pretraining):
        raise UserError(f"{config.run} is not a run of 'torchimplicit pretrain', which is what finetune goes on from")
    if settings.kind == "density":
        raise UserError(
            f"{config.run} predicts densities at once: there is no minimum to differentiate; pre-train with --kind "
            "potential or functional"
        )
    seconds = read_checkpoint(run.checkpoint)["course"]["seconds"] if run.checkpoint.is_file() else math.nan
    return settings, Trained.of(run), seconds


def train(config: Finetuning, run: Run, console: Console) -> bool:
    """Train from the last step that was kept, and write ``results.json`` and ``index.html``."""
    with threads(config.threads), SHARED.limited(config.memory * 1e9), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is not converged is recorded
        school = _School(config, console)
        console.print(
            f"{len(school.cases)} molecules to train on, {len(school.held)} to select by and "
            f"{len(school.files['test'])} to test; {school.weights} weights, gradient {config.gradient}; Ctrl-C stops "
            "and keeps what is done.",
            highlight=False,
        )
        school.stepper.restore(run)
        began = time.monotonic()
        if not school.stepper.run(run, console):
            return False
        results = school.results(run, time.monotonic() - began)
    run.write_json("results.json", results)
    if config.page:
        write_report(results, run)
    console.print(_table(results).rich_rows())
    return True


def evaluate(config: Finetuning, run: Run, console: Console) -> None:
    """Measure the selected weights again."""
    if not run.best.is_file():
        raise UserError(f"{run.best} does not exist: nothing was trained yet; 'resume' the run first")
    with threads(config.threads), SHARED.limited(config.memory * 1e9), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        school = _School(config, console)
        school.stepper.restore(run)
        results = school.results(run, math.nan)
    run.write_json("evaluation.json", {name: getattr(results, name) for name in ("before", "test", "spurious")})
    if config.page:
        write_report(results, run)
    console.print(_table(results).rich_rows())


class _School:
    """The molecules, the functional and its training loss."""

    def __init__(self, config: Finetuning, console: Console):
        self.config = config
        self.pretraining, self.trained, self.pretraining_seconds = pretrained(config)
        self.files, self.skipped = located(self.pretraining.molecules)
        if unknown := [name for name in config.only if name not in self.files["train"]]:
            raise UserError(
                f"--only {', '.join(unknown)}: no such training molecule; they are {', '.join(self.files['train'])}"
            )
        names = config.only or tuple(self.files["train"])
        self.training: OrbitalFreeTraining = config.training(self.pretraining.molecules)
        self.functional = self.trained.functional
        assert self.functional.network is not None
        self.functional.network.requires_grad_(True)
        self.functional.constants.requires_grad_(config.energy_weight > 0)
        self.weights = sum(p.numel() for p in self.functional.network.parameters())
        with console.status("Reading the molecules"):
            loaded = [storage.load(self.files["train"][name]) for name in names]
            self.cases = [Case.of(molecule, config.tail_weight) for molecule in loaded]
            self.held = [Case.of(storage.load(path)) for path in self.files["validation"].values()]
        self.names = list(names)
        batch = min(config.stepping.batch, len(self.cases))
        weights = Weights(self.functional, loaded, constants=config.energy_weight > 0)
        self.share = Share(self.functional, self.cases, weights, self.training, batch)
        self.efforts: list[Effort] = []
        self.stepper = Stepper(
            self.functional,
            config.stepping,
            len(self.cases),
            config.seed,
            self._loss,
            self._look,
            (lambda: [vars(one) for one in self.efforts], self._take),
        )
        self.share.tell = lambda doing: self.stepper.tell(doing)

    def results(self, run: Run, wall: float) -> Results:
        """The results, for the selected weights."""
        functional, config = self.functional, self.config
        before = Trained.of(config.run).functional
        functional.load_state_dict(read_checkpoint(run.best)["weights"])
        constants = functional.constants.detach().clone()
        chosen = {name: self.files["train"][name] for name in self.names}
        electrons = {n: float(storage.read(path).geometry.electrons) for n, path in self.files["test"].items()}
        found = {
            "before": measured(before, self.files["test"], self.training, spectrum=config.spectrum),
            "before_train": measured(before, chosen, self.training, look_closer=False),
            "train": measured(functional, chosen, self.training, look_closer=False),
        }
        if not config.energy_weight:  # nothing has trained the constants, on which no density depends
            _refit(functional, self.cases, found["train"])
        test = measured(functional, self.files["test"], self.training, spectrum=config.spectrum, constants=constants)
        Trained(functional, self.trained.domain, self.trained.chemistry).save(run)
        tenth = max(1, len(self.efforts) // 10)
        return Results(
            state="complete",
            kind=self.pretraining.kind,
            weights=self.weights,
            trained_on=self.names,
            test=test,
            **found,
            reference_before=_at_reference(before, self.files["test"].values()),
            reference=_at_reference(functional, self.files["test"].values()),
            spurious_before=share_spurious(found["before"], electrons),
            spurious=share_spurious(test, electrons),
            effort=[_mean(part) for part in (self.efforts[:tenth], self.efforts[-tenth:]) if part],
            pretraining_seconds=self.pretraining_seconds,
            selected=self.stepper.course.best,
            skipped=self.skipped,
            wall=wall,
            course=self.stepper.course,
            environment=Environment.of(torch.device("cpu")),
            config=config,
        )

    def _loss(self, numbers: list[int], step: int) -> float:
        self.share.work = Work()
        total = sum(self.share.step(number) for number in numbers)
        work, count = self.share.work, len(numbers)
        self.efforts.append(Effort(work.steps / count, work.adjoint / count, work.unconverged / count))
        return total

    def _look(self) -> dict[str, float]:
        if not self.held:
            return {}
        found = [_glanced(case, self.functional, self.training) for case in self.held]
        return {
            "L": 1e3 * fmean(one[0] for one in found),
            "steps": fmean(one[1] for one in found),
            "unconverged": fmean(one[2] for one in found),
        }

    def _take(self, held: list[dict[str, float]]) -> None:
        self.efforts = [Effort(**one) for one in held]


def _glanced(case: Case, functional: OrbitalFree, config: OrbitalFreeTraining) -> tuple[float, float, float]:
    with torch.no_grad():
        solution = case.solved(functional, config, cold=True)
        return float(case.loss(solution.value)), float(solution.steps), float(not bool(solution.converged))


def _mean(efforts: Sequence[Effort]) -> Effort:
    return Effort(*(fmean(getattr(one, name) for one in efforts) for name in ("steps", "adjoint", "unconverged")))


@torch.no_grad()
def _refit(functional: OrbitalFree, cases: Sequence[Case], found: Sequence[Quality]) -> None:
    """Fit the elements' constants to the energies at the training molecules' minima."""
    missing = torch.tensor([-one.energy_error for one in found], dtype=torch.float64)
    functional.constants.add_(torch.linalg.pinv(element_counts([case.molecule for case in cases])) @ missing)


@torch.no_grad()
def _at_reference(functional: OrbitalFree, paths: Iterable[Path]) -> list[float]:
    errors = []
    for path in paths:
        molecule = storage.load(path)
        errors.append(float(functional(molecule.reference, molecule) - molecule.energy))
    return errors


# -- The page ---------------------------------------------------------------------------------------------------------


def write_report(results: Results, run: Run) -> None:
    """``figures/*.png`` and ``index.html``."""
    with styled():
        drawn, plots = axes(2, width=5.0)
        glances = results.course.glances
        for plot, what, label in zip(plots, ("L", "steps"), ("10³ L", "steps of a minimization"), strict=True):
            there = [glance for glance in glances if what in glance.figures]
            if there:
                values = [glance.figures[what] for glance in there]
                plot.plot([glance.step for glance in there], values, "o-", color=COLOURS[0], markersize=3)
                plot.set(xlabel="step", ylabel=label, title="validation")
        caption = "The validation molecules during training, each from the superposition of atoms."
        pictures = saved([CaptionedFigure("training", drawn, caption)], run)
    lead = (
        f"{results.weights} weights of a pre-trained {results.kind}, {results.course.step} steps "
        f"({results.config.gradient}), {results.course.seconds:.0f} s after {results.pretraining_seconds:.0f} s of "
        f"pre-training; the weights of step {results.selected} were selected."
    )
    sections = [Section(pictures=pictures, table=_table(results))]
    run.write_text("index.html", document("Fine-tuning a density functional", [lead], sections))


def _table(results: Results) -> Table:
    columns = [
        Column("Molecules"),
        Column("L", "10⁻³"),
        Column("L1 per electron"),
        Column("ΔE", "mHa"),
        Column("ΔE at the reference", "mHa"),
        Column("Better than MINAO", "%"),
        Column("Better than before", "%"),
        Column("Converged", "%"),
        Column("Steps"),
        Column("λmin", "Ha"),
    ]
    rows = (
        [_row("test, before", summarized(results.before), results.reference_before, math.nan)] if results.before else []
    )
    if results.test:
        rows.append(_row("test", summarized(results.test), results.reference, better(results.before, results.test)))
    rows.append(_row("train, before", summarized(results.before_train), [], math.nan))
    rows.append(_row("train", summarized(results.train), [], better(results.before_train, results.train)))
    return Table(columns, rows)


def better(before: Sequence[Quality], after: Sequence[Quality]) -> float:
    """The share of molecules whose L decreased."""
    return fmean(new.loss < old.loss for old, new in zip(before, after, strict=True))


def _row(name: str, one: Summary, reference: Sequence[float], than_before: float) -> list[str]:
    return [
        name,
        f"{1e3 * one.loss:.3f} (MINAO {1e3 * one.guess_loss:.3f})",
        f"{one.l1:.4f} (MINAO {one.guess_l1:.4f})",
        f"{1e3 * one.energy_error:.1f}",
        f"{1e3 * fmean(map(abs, reference)):.1f}" if reference else "–",
        f"{100 * one.better:.0f}",
        "–" if math.isnan(than_before) else f"{100 * than_before:.0f}",
        f"{100 * (1 - one.unconverged):.0f}",
        f"{one.mean_steps:.1f}",
        "–" if math.isnan(one.least) else f"{one.least:.3f}",
    ]

"""Fine-tunes a pre-trained density functional on the densities at its minima."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from torchimplicit.models.orbital_free import Molecule, OrbitalFree, element_counts
from torchimplicit.recipes.density import storage
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.learning_settings import Finetuning, Pretraining
from torchimplicit.recipes.density.objective import Share, Work
from torchimplicit.recipes.density.predict import Trained
from torchimplicit.recipes.density.quality import Quality, loaded, qualities, share_spurious
from torchimplicit.recipes.density.report import Page, Part, table_of, tell
from torchimplicit.recipes.density.settings import Molecules, OrbitalFreeTraining
from torchimplicit.recipes.density.split import located
from torchimplicit.recipes.density.stepping import Course, Stepper, trained_before
from torchimplicit.recipes.density.training import bounded
from torchimplicit.recipes.density.weights import Weights
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.execution import opened
from torchimplicit.recipes.runtime.fitting import read_checkpoint
from torchimplicit.recipes.runtime.run import Environment, Run

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
    if config.run == Path():
        raise UserError("finetune needs the directory of a run of 'torchimplicit pretrain', such as runs/pretrain/001")
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
    with bounded(config.training(Molecules())):
        tuner = _Finetuner(config, console)
        console.print(
            f"{len(tuner.cases)} molecules to train on, {len(tuner.held)} to select by and "
            f"{len(tuner.files['test'])} to test; {tuner.weights} weights, gradient {config.gradient}; Ctrl-C stops "
            "and keeps what is done.",
            highlight=False,
        )
        tuner.stepper.restore(run)
        began = time.monotonic()
        if not tuner.stepper.run(run, console):
            return False
        results = tuner.results(run, time.monotonic() - began)
    run.write_json("results.json", results)
    _tell(results, run, console)
    return True


def evaluate(config: Finetuning, run: Run, console: Console) -> None:
    """Measure the selected weights again."""
    trained_before(run)
    with bounded(config.training(Molecules())):
        tuner = _Finetuner(config, console)
        tuner.stepper.restore(run)
        results = tuner.results(run, math.nan)
    run.write_json("evaluation.json", {name: getattr(results, name) for name in ("before", "test", "spurious")})
    _tell(results, run, console)


class _Finetuner:
    """The molecules, the functional and its training loss."""

    def __init__(self, config: Finetuning, console: Console):
        self.config = config
        self.pretraining, self.trained, self.pretraining_seconds = pretrained(config)
        self.files, self.skipped = located(self.pretraining.molecules, console)
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
        tested = self.files["test"]
        whole: dict[str, Any] = {"spectrum": config.spectrum, "files": tested}
        found = qualities(loaded(tested), before, self.training, **whole)
        found_train = qualities(loaded(chosen), before, self.training)
        train = qualities(loaded(chosen), functional, self.training)
        if not config.energy_weight:  # nothing has trained the constants, on which no density depends
            train = _refitted(functional, [case.molecule for case in self.cases], train)
        test = qualities(loaded(tested), functional, self.training, constants=constants, **whole)
        Trained(functional, self.trained.domain, self.trained.chemistry).save(run)
        tenth = max(1, len(self.efforts) // 10)
        return Results(
            state="complete",
            kind=self.pretraining.kind,
            weights=self.weights,
            trained_on=self.names,
            before=found,
            test=test,
            before_train=found_train,
            train=train,
            reference_before=_at_reference(before, tested),
            reference=_at_reference(functional, tested),
            spurious_before=share_spurious(found, tested),
            spurious=share_spurious(test, tested),
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
        glances = [_glanced(case, self.functional, self.training) for case in self.held]
        return {
            "L": 1e3 * fmean(one[0] for one in glances),
            "steps": fmean(one[1] for one in glances),
            "unconverged": fmean(one[2] for one in glances),
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
def _refitted(functional: OrbitalFree, molecules: Sequence[Molecule], qualities: Sequence[Quality]) -> list[Quality]:
    """Fit the elements' constants to the energies at the training molecules' minima; their qualities with these
    constants."""
    counts = element_counts(molecules)
    errors = torch.tensor([one.energy_error for one in qualities], dtype=torch.float64)
    shift = -torch.linalg.pinv(counts) @ errors
    functional.constants.add_(shift)
    return [
        replace(one, energy_error=one.energy_error + more)
        for one, more in zip(qualities, (counts @ shift).tolist(), strict=True)
    ]


@torch.no_grad()
def _at_reference(functional: OrbitalFree, files: Mapping[str, Path]) -> list[float]:
    molecules = (case.molecule for case in loaded(files))
    return [float(functional(molecule.reference, molecule) - molecule.energy) for molecule in molecules]


def better(before: Sequence[Quality], after: Sequence[Quality]) -> float:
    """The share of molecules whose L decreased; NaN without molecules."""
    return fmean(new.loss < old.loss for old, new in zip(before, after, strict=True)) if after else math.nan


def _tell(results: Results, run: Run, console: Console) -> None:
    """Print the results and, if there is to be one, write the page."""
    table = table_of(
        [
            Part("test, before", results.before, results.spurious_before, reference=results.reference_before),
            Part("test", results.test, results.spurious, better(results.before, results.test), results.reference),
            Part("train, before", results.before_train),
            Part("train", results.train, improved=better(results.before_train, results.train)),
        ]
    )
    page = Page(
        title="Fine-tuning a density functional",
        lead=f"{results.weights} weights of a pre-trained {results.kind}, {results.course.step} steps "
        f"({results.config.gradient}), {results.course.seconds:.0f} s after {results.pretraining_seconds:.0f} s of "
        f"pre-training; the weights of step {results.selected} were selected.",
        panels={"L": "10³ L", "steps": "steps of a minimization"},
        caption="The validation molecules during training, each from the superposition of atoms.",
    )
    tell(table, page if results.config.page else None, results.course, run, console)

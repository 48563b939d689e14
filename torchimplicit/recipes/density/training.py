"""Trains a density functional by its minima; a :class:`torchimplicit.recipes.runtime.run.Runner`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from torchimplicit.models.orbital_free import (
    Domain,
    OrbitalFree,
    OrbitalFreeConfig,
    element_counts,
    fit_constants,
    fit_linear,
)
from torchimplicit.models.orbital_free.functional import ExchangeCorrelation
from torchimplicit.models.orbital_free.on_grid import SHARED
from torchimplicit.recipes.density.case import Case, quiet
from torchimplicit.recipes.density.history import History, Measurement, Results
from torchimplicit.recipes.density.objective import DensityFit
from torchimplicit.recipes.density.pictures import write_report
from torchimplicit.recipes.density.predict import Trained
from torchimplicit.recipes.density.quality import Quality, qualities, summarized
from torchimplicit.recipes.density.report import Part, table_of
from torchimplicit.recipes.density.settings import OrbitalFreeTraining
from torchimplicit.recipes.density.split import SPLITS, Split, geometries, load
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.fitting import read_checkpoint
from torchimplicit.recipes.runtime.optimize import Budget, Checkpointer, Enough
from torchimplicit.recipes.runtime.optimize import run as optimize
from torchimplicit.recipes.runtime.run import Environment, Run, threads
from torchimplicit.recipes.runtime.settings import from_plain, to_plain

EXCHANGE_CORRELATION: dict[str, ExchangeCorrelation] = {
    "lda,pw": "lda",
    "lda,pw_mod": "lda",
    "pbe": "pbe",
    "pbe,pbe": "pbe",
}
"""The functional's exchange-correlation, by PySCF's name of the one in the Kohn-Sham calculation."""


def check(config: OrbitalFreeTraining) -> None:
    """The sources must be readable, and their exchange and correlation that of a functional; everything runs on a CPU.

    Raises:
        UserError: they are not.
    """
    geometries(config.molecules)
    exchange_correlation(config)


def exchange_correlation(config: OrbitalFreeTraining) -> ExchangeCorrelation:
    """The exchange-correlation of the molecules' Kohn-Sham calculations.

    Raises:
        UserError: the functional has none that is like it.
    """
    name = config.molecules.chemistry.functional
    if name.lower().replace(" ", "") not in EXCHANGE_CORRELATION:
        raise UserError(
            f"--functional {name}: densities and energies of that exchange and correlation would "
            "be compared with those of another one, for a density functional here has that of lda,pw or of pbe"
        )
    return EXCHANGE_CORRELATION[name.lower().replace(" ", "")]


def started(config: OrbitalFreeTraining, cases: Sequence[Case]) -> OrbitalFree:
    """The functional that training starts from: the linear terms are fitted to the molecules, in closed form."""
    molecules = [case.molecule for case in cases]
    elements = tuple(sorted({int(charge) for molecule in molecules for charge in molecule.charges}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        functional = OrbitalFree(
            OrbitalFreeConfig(
                weizsaecker=config.weizsaecker,
                penalty=config.penalty,
                hidden=config.hidden,
                pairs=elements if config.pairs else (),
                exchange_correlation=exchange_correlation(config),
            )
        )
    fit_linear(functional, molecules, [case.metric for case in cases])
    fit_constants(functional, molecules)
    return functional


def train(config: OrbitalFreeTraining, run: Run, console: Console) -> bool:
    """Train from the last checkpoint, and write ``results.json``, ``figures/`` and ``index.html``.

    An interruption is answered within an iteration, and leaves the checkpoint of the last one that was whole."""
    with threads(config.threads), SHARED.limited(config.memory * 1e9, config.single):
        split, cases = _read(config, console)
        functional = started(config, cases["train"])
    history = _restored(functional, run.checkpoint)
    with bounded(config), DensityFit(functional, split.train, config) as objective:
        history.weights = len(objective.weights)
        watcher = _Watcher(config, objective, cases, history, run)
        limits = Budget(iterations=config.iterations, seconds=config.seconds, measure_every=config.measure_every)
        budget = f"{config.iterations} iterations" if config.seconds is None else f"{config.seconds:g} seconds"
        console.print(
            f"{len(split.train)} molecules to train on, {len(split.validation)} to select by and {len(split.test)} to "
            f"test; {history.weights} weights, {budget} of {config.optimizer}; Ctrl-C stops and keeps what is "
            "done.",
            highlight=False,
        )
        if not history.looks:
            with console.status("Measuring the start") as status:
                objective.told(lambda doing: status.update(f"Measuring the start: {doing}"))
                watcher.begin()  # before the keeper's clock runs
        with Checkpointer(limits, objective, history, watcher, run, console) as keeper:
            objective.told(keeper.tell)
            try:
                if keeper.spent < 1:
                    optimize(objective, config.optimizer, config.learning_rate, keeper.spent, keeper.step)
            except Enough:
                pass
            except KeyboardInterrupt:
                keeper.keep()
                return False
            keeper.finish()
        results = _results(config, split, cases, functional, history, run)
    run.write_json("results.json", results)
    _tell(results, split, functional, run, console)
    return True


def evaluate(config: OrbitalFreeTraining, run: Run, console: Console) -> None:
    """Measure the selected weights again, and draw the page again if there is to be one."""
    if not run.checkpoint.is_file():
        raise UserError(f"{run.checkpoint} does not exist: nothing was trained yet; 'resume' the run first")
    with bounded(config):
        split, cases = _read(config, console)
        functional = started(config, cases["train"])
        history = _restored(functional, run.checkpoint)
        results = _results(config, split, cases, functional, history, run)
    run.write_json("evaluation.json", {name: getattr(results, name) for name in SPLITS})
    _tell(results, split, functional, run, console)


class _Watcher:
    """Measures during training and keeps the weights with the least validation loss."""

    def __init__(
        self,
        config: OrbitalFreeTraining,
        objective: DensityFit,
        cases: dict[str, list[Case]],
        history: History,
        run: Run,
    ):
        self.config, self.objective, self.cases = config, objective, cases
        self.history, self.run = history, run

    def begin(self) -> None:
        """Measure the start too, so that there is a checkpoint from the beginning."""
        value, _ = self.objective.loss_and_gradient(self.objective.weights)
        self(value, True)
        self.run.save(self._kept())

    def __call__(self, loss: float, measured: bool) -> None:
        history, work = self.history, self.objective.work
        if history.looks and history.looks[-1].iteration == history.iterations:
            if not measured or history.looks[-1].train is not None:
                return
            history.looks.pop()
        count = len(self.cases["train"])
        figures = (work.steps / count, work.adjoint / count, work.unconverged)
        train = validation = score = None
        if measured:
            functional, config = self.objective.functional, self.config
            train = summarized(qualities(self.cases["train"], functional, config, spectrum=config.spectrum))
            if self.cases["validation"]:
                qualities_now = qualities(self.cases["validation"], functional, config)
                validation, score = summarized(qualities_now), _score(qualities_now, self.cases["validation"], config)
        history.looks.append(Measurement(history.iterations, history.seconds, loss, *figures, train, validation, score))
        if measured:
            self._select()

    def _select(self) -> None:
        history = self.history
        scores = ((look.iteration, look.score) for look in history.looks)
        by = {iteration: score for iteration, score in scores if score is not None and isfinite(score)}
        if by:
            history.best = min(by, key=lambda iteration: by[iteration])
        else:
            history.best = history.looks[-1].iteration
        if history.best == history.looks[-1].iteration:
            files.save(self._kept(), self.run.best)

    def _kept(self) -> dict[str, object]:
        return {"weights": self.objective.model.state_dict(), "history": to_plain(self.history)}


def _score(qualities: Sequence[Quality], cases: Sequence[Case], config: OrbitalFreeTraining) -> float:
    """See :class:`~torchimplicit.recipes.density.history.Measurement`."""
    per_electron = [
        one.energy_error / float(case.molecule.electrons) for one, case in zip(qualities, cases, strict=True)
    ]
    energies = fmean(0.5 * config.energy_weight * error**2 for error in per_electron)
    return fmean(one.loss for one in qualities) + energies


def _read(config: OrbitalFreeTraining, console: Console) -> tuple[Split, dict[str, list[Case]]]:
    with console.status("Reading the molecules"):
        split = load(config.molecules, console)
    for line in split.skipped:
        console.print(f"Skipped: {line}", highlight=False)
    return split, {name: [Case.of(molecule) for molecule in split.named(name)] for name in SPLITS}


@contextmanager
def bounded(config: OrbitalFreeTraining) -> Iterator[None]:
    """Limit the threads of PyTorch and of SciPy's linear algebra, and this process's share of the memory; what does not
    converge is recorded, without a warning."""
    share = config.memory * 1e9 / config.processes
    with (
        threads(config.threads),
        threadpool_limits(config.threads or None),
        SHARED.limited(share, config.single),
        quiet(),
    ):
        yield


def _restored(functional: OrbitalFree, path: Path) -> History:
    """Restore a checkpoint, if there is one; its weights are set in the functional."""
    if not path.is_file():
        return History()
    read = read_checkpoint(path)
    try:
        functional.load_state_dict(read["weights"])
        return from_plain(History, read["history"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not fit this run's settings ({reason}); train again") from None


def _results(
    config: OrbitalFreeTraining,
    split: Split,
    cases: dict[str, list[Case]],
    functional: OrbitalFree,
    history: History,
    run: Run,
) -> Results:
    first = started(config, cases["train"])
    start, start_test = (qualities(cases[name], first, config, files=split.files) for name in ("train", "test"))
    _restored(functional, run.best)
    constants = functional.constants.detach().clone()
    if not config.energy_weight:  # nothing has trained the constants, on which no density depends
        with torch.no_grad():
            densities = [case.solved(functional, config, cold=True).value for case in cases["train"]]
        fit_constants(functional, split.train, densities)
    Trained(functional, Domain.of(split.train), config.molecules.chemistry).save(run)
    by_split: dict[str, list[Quality]] = {
        name: qualities(ones, functional, config, spectrum=config.spectrum, constants=constants, files=split.files)
        for name, ones in cases.items()
    }
    counts = element_counts(split.train)
    return Results(
        state="complete",
        weights=history.weights,
        start=start,
        start_test=start_test,
        **by_split,
        selected=history.best,
        skipped=split.skipped,
        iterations=history.iterations,
        seconds=history.seconds,
        residuals=history.residuals,
        jacobians=history.jacobians,
        rejected=history.rejected,
        looks=history.looks,
        environment=Environment.of(torch.device("cpu")),
        config=config,
        free_energies=int(torch.linalg.matrix_rank(counts)) == len(counts),
    )


def _tell(results: Results, split: Split, functional: OrbitalFree, run: Run, console: Console) -> None:
    """Print the results and, if there is to be one, write the page."""
    free = " (as many constants as molecules: ΔE is nought)" if results.free_energies else ""
    table = table_of(
        [
            Part("train, linear terms alone", results.start),
            Part(f"train{free}", results.train),
            Part("validation", results.validation),
            Part("test, linear terms alone", results.start_test),
            Part("test", results.test),
        ]
    )
    if results.config.page:
        write_report(results, table, split, functional, run)
    console.print(table.rich())

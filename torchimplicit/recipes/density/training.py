"""A density functional trained by its minima: data, measurements, page, and the runner."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from torchimplicit.errors import ConvergenceWarning
from torchimplicit.models.orbital_free import (
    Domain,
    Molecule,
    OrbitalFree,
    OrbitalFreeConfig,
    fit_constants,
    fit_linear,
)
from torchimplicit.models.orbital_free.functional import ExchangeCorrelation
from torchimplicit.recipes.density import chemistry as sources
from torchimplicit.recipes.density import compute as storage
from torchimplicit.recipes.density.chemistry import Geometry, check_size, distorted, symbol
from torchimplicit.recipes.density.compute import DensityBasis, Outcome, prepare
from torchimplicit.recipes.density.objective import Case, DensityFit
from torchimplicit.recipes.density.predict import Trained
from torchimplicit.recipes.density.settings import Molecules, OrbitalFreeTraining
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import cache_folder
from torchimplicit.recipes.runtime.fitting import read_checkpoint
from torchimplicit.recipes.runtime.optimize import Budget, Clock, Enough, Keeper
from torchimplicit.recipes.runtime.optimize import run as optimize
from torchimplicit.recipes.runtime.page import COLOURS, Section, axes, document, saved, styled
from torchimplicit.recipes.runtime.run import Environment, Run, threads
from torchimplicit.recipes.runtime.settings import from_plain, to_plain
from torchimplicit.recipes.runtime.table import Column, Drawing, Table

# -- Where a molecule's density is drawn -------------------------------------------------------------------------------


MARGIN = 3.0
"""Bohr beyond the outermost atoms."""


def line(centres: Tensor, count: int = 401) -> tuple[Tensor, Tensor, Tensor]:
    """Along the first two atoms, or along z through a single one.

    Args:
        centres: of the atoms, ``[atoms, 3]``.
        count: of points.

    Returns:
        points ``[count, 3]``, how far they are from the first atom ``[count]``, and the places of the two atoms.
    """
    direction = centres[1] - centres[0] if len(centres) > 1 else centres.new_tensor([0.0, 0.0, 1.0])
    length = float(direction.norm())
    unit = direction / length
    atoms = centres.new_tensor([0.0, length] if len(centres) > 1 else [0.0])
    places = torch.linspace(-MARGIN, float(atoms[-1]) + MARGIN, count, dtype=centres.dtype)
    return centres[0] + places[:, None] * unit, places, atoms


def plane(centres: Tensor, count: int = 81) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """That of the first two atoms and of the one farthest from their line; any through a linear molecule.

    Args:
        centres: of the atoms, at least two, ``[atoms, 3]``.
        count: of points in each direction.

    Returns:
        points ``[count², 3]``, the second coordinate being the slower; the coordinates in both directions; the atoms'
        coordinates ``[atoms, 2]``, those outside the plane projected.
    """
    first = centres[1] - centres[0]
    first = first / first.norm()
    rest = centres - centres[0]
    across = rest - (rest @ first)[:, None] * first
    second = across[across.norm(dim=1).argmax()]
    if float(second.norm()) < 1e-6:
        axis = torch.zeros(3, dtype=centres.dtype)
        axis[first.abs().argmin()] = 1
        second = axis - (axis @ first) * first
    second = second / second.norm()
    atoms = torch.stack((rest @ first, rest @ second), dim=1)
    low, high = atoms.amin(dim=0) - MARGIN, atoms.amax(dim=0) + MARGIN
    x, y = (torch.linspace(float(a), float(b), count, dtype=centres.dtype) for a, b in zip(low, high, strict=True))
    points = centres[0] + y[:, None, None] * second + x[None, :, None] * first
    return points.reshape(-1, 3), (x, y), atoms


# -- The molecules of a training, split --------------------------------------------------------------------------------


SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Molecules by what they are for.

    Attributes:
        train: the loss is theirs.
        validation: the weights are selected by them; empty: the last weights are taken.
        test: looked at once, at the end; empty: there are none.
        skipped: what could not be computed, a line each.
        files: of the molecules, by their names.
    """

    train: list[Molecule]
    validation: list[Molecule]
    test: list[Molecule]
    skipped: list[str]
    files: dict[str, Path]

    def named(self, split: str) -> list[Molecule]:
        """One of :data:`SPLITS`."""
        found: list[Molecule] = getattr(self, split)
        return found


def geometries(config: Molecules) -> tuple[dict[str, list[Geometry]], list[str]]:
    """Of every split, and what was refused, a line each."""
    originals: list[Geometry] = []
    refused: list[str] = []
    for source in config.sources:
        read = sources.read(source)
        refused += [f"{one.name}: {one.reason}" for one in read if not isinstance(one, Geometry)]
        taken = [one for one in read if isinstance(one, Geometry)]
        originals += sorted(taken, key=lambda one: len(one.charges))[: config.limit] if len(taken) > 1 else taken
    for geometry in originals:
        check_size(geometry)
    if 2 * config.held_out >= len(originals):
        raise UserError(
            f"--held-out {config.held_out} takes {2 * config.held_out} molecules away, and there are {len(originals)}"
        )
    order: Iterable[int] = ()
    if config.held_out:
        order = np.random.default_rng(config.geometry_seed).permutation(len(originals))
    away = {int(place): SPLITS[1 + k // config.held_out] for k, place in enumerate(islice(order, 2 * config.held_out))}
    found: dict[str, list[Geometry]] = {split: [] for split in SPLITS}
    numbers = {"train": config.train_copies, "validation": config.validation_copies, "test": config.test_copies}
    for place, geometry in enumerate(originals):
        found[away.get(place, "train")].append(geometry)
        if place in away:
            continue
        copy = 0
        for split, count in numbers.items():
            for _ in range(count):
                copy += 1
                found[split].append(distorted(geometry, config.distort, config.geometry_seed, copy))
    known = {charge for geometry in found["train"] for charge in geometry.charges}
    for split in SPLITS[1:]:
        for geometry in [one for one in found[split] if not known.issuperset(one.charges)]:
            found[split].remove(geometry)
            lacking = ", ".join(symbol(charge) for charge in sorted({*geometry.charges} - known))
            refused.append(f"{geometry.name}: no training molecule has {lacking}")
    return found, refused


def load(config: Molecules, watch: Callable[[Outcome], None] = lambda outcome: None) -> Split:
    """All molecules, computed where they are not in the folder yet.

    Raises:
        UserError: a source that is refused, or nothing left to train on.
    """
    found, skipped = geometries(config)
    folder = config.data_dir or cache_folder("molecules")
    split: dict[str, list[Molecule]] = {}
    files: dict[str, Path] = {}
    for name, ones in found.items():
        outcomes = prepare(ones, config.chemistry, folder, watch=watch)
        there = {one.geometry.name: one.path for one in outcomes if one.path is not None}
        files.update(there)
        split[name] = [storage.load(path) for path in there.values()]
        skipped += [f"{one.geometry.name}: {one.reason}" for one in outcomes if one.path is None]
    if not split["train"]:
        raise UserError("no molecule is left to train on: " + "; ".join(skipped))
    return Split(**split, skipped=skipped, files=files)


# -- What is measured while a functional is trained, and what comes out ------------------------------------------------


@dataclass(frozen=True)
class Look:
    """The state of a training.

    Attributes:
        iteration: iterations done; 0 is the start, with the linear terms fitted.
        seconds: of the processor's time, spent in the optimizer until then.
        loss: with its penalties.
        inner_steps, adjoint: steps of the minimizations and products of the adjoint solves in the last evaluation of
            the loss, from the densities found before, the mean of a molecule.
        unconverged: minimizations in it that were not done.
        train, validation: all densities, found from the superposition of atoms; ``None`` where they were not measured.
    """

    iteration: int
    seconds: float
    loss: float
    inner_steps: float
    adjoint: float
    unconverged: int
    train: Summary | None = None
    validation: Summary | None = None


@dataclass
class History(Clock):
    """A training so far; it travels in the checkpoint.

    Attributes:
        looks: in their order.
        weights: how many are trained.
        best: the iteration of the least validation loss, whose weights are kept; -1 before the first measurement.
    """

    looks: list[Look] = field(default_factory=list)
    weights: int = 0
    best: int = -1


@dataclass(frozen=True)
class Results:
    """``results.json``.

    Attributes:
        weights: how many are trained.
        start, train, validation, test: every molecule, with the linear terms alone (of the training molecules) and at
            the weights that were selected.
        start_test: the test molecules with the linear terms alone.
        selected: the iteration whose weights they are.
        free_energies: whether the elements' constants alone give every training molecule its energy, whatever the
            densities: their energy errors after the fit say nothing then.
        skipped: molecules that could not be computed.
    """

    state: str
    weights: int
    start: list[Quality]
    start_test: list[Quality]
    train: list[Quality]
    validation: list[Quality]
    test: list[Quality]
    selected: int
    skipped: list[str]
    iterations: int
    seconds: float
    residuals: int
    jacobians: int
    rejected: int
    looks: list[Look]
    environment: Environment
    config: OrbitalFreeTraining
    free_energies: bool = False


# -- How good the densities of a functional are, molecule by molecule, and how hard they are to find -------------------


@dataclass(frozen=True)
class Finer:
    """The density that the same functional has on a finer grid, found from the one on its own grid.

    Attributes:
        level: PySCF's, of the finer grid.
        loss, l1, guess_l1, energy_error, converged: see :class:`Quality`.
        moved: :math:`\\int(\\rho-\\rho_{own})^2/(2N)`, how far it is from the density on its own grid.
    """

    level: int
    loss: float
    l1: float
    guess_l1: float
    energy_error: float
    converged: bool
    moved: float

    def better(self, guess_loss: float) -> bool:
        """Than the superposition of atoms, whose L does not depend on the grid."""
        return self.converged and self.loss < guess_loss and self.l1 < self.guess_l1


@dataclass(frozen=True)
class Quality:
    """Of one molecule.

    Attributes:
        name, size: of the molecule, and how many basis functions it has.
        loss: :math:`\\int(\\rho-\\rho_{gs})^2/(2N)`.
        l1: :math:`\\int|\\rho-\\rho_{gs}|/N`.
        energy_error: of the energy at the density that was found, in hartree.
        trained_energy_error: likewise, by the elements' constants that training had; ``energy_error`` is by those that
            are fitted to the training molecules' energies afterwards, unless energies are trained.
        guess_loss, guess_l1: the same figures of the superposition of atoms (MINAO).
        negative: the least density on the grid, per cubic bohr.
        steps, evaluations: of the minimization from that superposition.
        converged: whether it was done within its budget.
        least, largest: eigenvalues of the Hessian on the constraint, in the metric's coordinates; NaN if not asked for.
        finer: the same molecule on a finer grid, where it was looked at.
    """

    name: str
    size: int
    loss: float
    l1: float
    energy_error: float
    guess_loss: float
    guess_l1: float
    negative: float
    steps: int
    evaluations: float
    converged: bool
    least: float = math.nan
    largest: float = math.nan
    trained_energy_error: float = math.nan
    finer: Finer | None = None

    @property
    def better(self) -> bool:
        """Than the superposition of atoms, by both figures, and on the finer grid too where that was looked at."""
        own = self.loss < self.guess_loss and self.l1 < self.guess_l1
        return own and (self.finer is None or self.finer.better(self.guess_loss))


@dataclass(frozen=True)
class Summary:
    """Means over molecules; ``better`` is a share, ``steps`` and the spectrum are the worst. Those named ``finer`` are
    of the finer grid, NaN where none was looked at."""

    loss: float
    l1: float
    energy_error: float
    guess_loss: float
    guess_l1: float
    better: float
    steps: int
    mean_steps: float
    unconverged: float
    least: float
    largest: float
    trained_energy_error: float = math.nan
    finer_loss: float = math.nan
    finer_l1: float = math.nan
    finer_energy_error: float = math.nan


def quality(
    case: Case,
    functional: OrbitalFree,
    config: OrbitalFreeTraining,
    *,
    spectrum: bool = False,
    constants: Tensor | None = None,
    file: Path | None = None,
) -> Quality:
    """Of the density that is found from the superposition of atoms.

    Args:
        spectrum: look at the Hessian's extreme eigenvalues too.
        constants: the elements' constants that training had; ``None``: those that ``functional`` has.
        file: of the molecule, to look at a finer grid too; ``None``: do not.
    """
    molecule = case.molecule
    with torch.no_grad():
        solution = case.solved(functional, config, cold=True)
        p, guess = solution.value, molecule.guess
    least = largest = math.nan
    if spectrum:
        values = torch.linalg.eigvalsh(case.curvature(functional, p))
        least, largest = float(values[0]), float(values[-1])
    with torch.no_grad():
        energy_error = float(functional(p, molecule) - molecule.energy)
        refitted = 0.0 if constants is None else float((functional.constants - constants)[molecule.charges].sum())
        return Quality(
            name=molecule.name,
            size=molecule.size,
            loss=float(case.loss(p)),
            l1=float(case.l1(p)),
            energy_error=energy_error,
            trained_energy_error=energy_error - refitted,
            guess_loss=float(case.loss(guess)),
            guess_l1=float(case.l1(guess)),
            negative=float(molecule.density(p).min()),
            steps=int(solution.steps),
            evaluations=solution.evaluations,
            converged=bool(solution.converged),
            least=least,
            largest=largest,
            finer=None if file is None else finer(case, functional, config, p, file),
        )


def finer(case: Case, functional: OrbitalFree, config: OrbitalFreeTraining, p: Tensor, file: Path) -> Finer:
    """On the finer grid, from the density ``p`` (``[n]``) on its own and with the Hessian that was kept there: that the
    functional has its minimum there too is what is looked at, not how long it takes to find.

    Raises:
        UserError: PySCF, which makes the grid, is missing.
    """
    molecule = storage.read(file).on_grid(config.check_grid).molecule()
    fine = Case(molecule, case.metric, case.weighing, hessian=case.hessian)
    fine.density, fine.fresh = p, True
    solution = fine.solved(functional, replace(config, inner="l-bfgs", correction=0))
    found = solution.value
    moved = found - p
    return Finer(
        level=config.check_grid,
        loss=float(fine.loss(found)),
        l1=float(fine.l1(found)),
        guess_l1=float(fine.l1(molecule.guess)),
        energy_error=float(functional(found, molecule) - molecule.energy),
        converged=bool(solution.converged),
        moved=float(0.5 * moved @ (molecule.overlap @ moved) / molecule.electrons),
    )


def qualities(
    cases: Sequence[Case],
    functional: OrbitalFree,
    config: OrbitalFreeTraining,
    *,
    spectrum: bool = False,
    constants: Tensor | None = None,
    files: Mapping[str, Path] | None = None,
) -> list[Quality]:
    """Of each; ``files`` are those of the molecules by their names, see :func:`quality`."""
    return [
        quality(
            case,
            functional,
            config,
            spectrum=spectrum,
            constants=constants,
            file=None if files is None else files[case.molecule.name],
        )
        for case in cases
    ]


def summarized(found: Sequence[Quality]) -> Summary:
    """Of some molecules, at least one."""
    return Summary(
        loss=fmean(one.loss for one in found),
        l1=fmean(one.l1 for one in found),
        energy_error=fmean(abs(one.energy_error) for one in found),
        guess_loss=fmean(one.guess_loss for one in found),
        guess_l1=fmean(one.guess_l1 for one in found),
        better=fmean(one.better for one in found),
        steps=max(one.steps for one in found),
        mean_steps=fmean(one.steps for one in found),
        unconverged=fmean(not one.converged for one in found),
        least=min(one.least for one in found),
        largest=max(one.largest for one in found),
        trained_energy_error=fmean(abs(one.trained_energy_error) for one in found),
        **{
            f"finer_{name}": fmean(math.nan if one.finer is None else abs(getattr(one.finer, name)) for one in found)
            for name in ("loss", "l1", "energy_error")
        },
    )


# -- The pictures of a trained functional, and its page ----------------------------------------------------------------


CAPTIONS = {
    "line": "The error of the density along a line through two atoms (ticks), by the trained functional, and by the "
    "superposition of atoms that its minimization begins at.",
    "plane": "The error of both on the plane of three atoms, in electrons per cubic bohr.",
    "training": "The error of the density, in the mean of the molecules; dotted: the superposition of atoms.",
    "inner": "Steps that it takes to find a density, the worst molecule; and, where they were asked for, the extreme "
    "eigenvalues of the Hessians.",
}


def figures(results: Results, split: Split, functional: OrbitalFree) -> dict[str, Figure]:
    """By the names of :data:`CAPTIONS`."""
    molecules = split.test or split.train
    shown = max(molecules, key=lambda one: len(one.charges))
    basis = storage.read(split.files[shown.name]).basis
    case = Case.of(shown)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = case.solved(functional, results.config, cold=True).value
    errors = {"trained": found - shown.reference, "superposition of atoms": shown.guess - shown.reference}
    with styled():
        drawn = {"line": _line(shown.name, basis, errors), "training": _training(results.looks)}
        if len(shown.charges) > 1:
            drawn["plane"] = _plane(shown.name, basis, errors)
        drawn["inner"] = _inner(results.looks)
    return drawn


def write_report(results: Results, split: Split, functional: OrbitalFree, run: Run) -> None:
    """``figures/*.png`` and ``index.html``, which holds its pictures itself."""
    drawn = figures(results, split, functional)
    with styled():
        pictures = saved([Drawing(name, drawn[name], text) for name, text in CAPTIONS.items() if name in drawn], run)
    lead = (
        f"{results.weights} weights after {results.iterations} iterations of {results.config.optimizer} "
        f"({results.config.gradient}), {results.seconds:.0f} s; those of iteration {results.selected} were selected."
    )
    run.write_text("index.html", document("An orbital-free density functional", [lead], [Section(pictures=pictures)]))


def _line(name: str, basis: DensityBasis, errors: dict[str, torch.Tensor]) -> Figure:
    drawn, (plot,) = axes()
    points, places, atoms = line(basis.centres)
    values = basis.values(points)
    for index, (label, error) in enumerate(errors.items()):
        plot.plot(places, values @ error, color=COLOURS[index], label=label, linewidth=1.2)
    for place in atoms:
        plot.axvline(float(place), color="0.8", linewidth=0.8, zorder=0)
    plot.set(xlabel="bohr", ylabel="Δρ, electrons per cubic bohr", title=name, yscale="symlog")
    plot.set_yscale("symlog", linthresh=1e-3)
    plot.legend()
    return drawn


def _plane(name: str, basis: DensityBasis, errors: dict[str, torch.Tensor]) -> Figure:
    points, (x, y), atoms = plane(basis.centres)
    values = basis.values(points)
    fields = {label: (values @ error).reshape(len(y), len(x)) for label, error in errors.items()}
    largest = 0.05
    drawn, plots = axes(len(fields), width=4.8, height=3.9)
    for plot, (label, shown) in zip(plots, fields.items(), strict=True):
        image = plot.pcolormesh(x, y, shown, cmap="RdBu_r", vmin=-largest, vmax=largest, rasterized=True)
        plot.plot(atoms[:, 0], atoms[:, 1], "k+", markersize=6)
        drawn.colorbar(image, ax=plot)
        plot.set(xlabel="bohr", title=f"{name}, {label}", aspect="equal")
        plot.grid(False)
    return drawn


def _training(looks: list[Look]) -> Figure:
    drawn, plots = axes(2, width=5.0)
    for plot, what, label in zip(plots, ("loss", "l1"), ("L", "L1 per electron"), strict=True):
        for index, split in enumerate(("train", "validation")):
            there = [look for look in looks if getattr(look, split) is not None]
            if not there:
                continue
            values = [getattr(getattr(look, split), what) for look in there]
            plot.plot([look.iteration for look in there], values, "o-", color=COLOURS[index], label=split, markersize=3)
            guess = getattr(getattr(there[0], split), f"guess_{what}")
            plot.axhline(guess, color=COLOURS[index], linestyle=":", linewidth=1)
        plot.set(xlabel="iteration", ylabel=label, yscale="log")
        plot.legend()
    return drawn


def _inner(looks: list[Look]) -> Figure:
    measured = [look for look in looks if look.train is not None]
    spectrum = [look for look in measured if look.train is not None and look.train.least == look.train.least]
    drawn, plots = axes(2 if spectrum else 1, width=5.0)
    steps = [look.train.steps for look in measured if look.train is not None]
    plots[0].plot([look.iteration for look in measured], steps, "o-", color=COLOURS[0], markersize=3)
    plots[0].set(xlabel="iteration", ylabel="steps of a minimization", ylim=(0, None))
    if spectrum:
        x = [look.iteration for look in spectrum]
        for index, what in enumerate(("least", "largest")):
            values = [getattr(look.train, what) for look in spectrum]
            plots[1].plot(x, values, "o-", color=COLOURS[index], markersize=3, label=f"{what} eigenvalue")
        plots[1].set(xlabel="iteration", ylabel="hartree")
        plots[1].set_yscale("symlog", linthresh=1e-2)
        plots[1].legend()
    return drawn


# -- Trains a functional, and shows what came out; see :class:`torchimplicit.recipes.runtime.run.Runner` ---------------


EXCHANGE_CORRELATION: dict[str, ExchangeCorrelation] = {
    "lda,pw": "lda",
    "lda,pw_mod": "lda",
    "pbe": "pbe",
    "pbe,pbe": "pbe",
}
"""Of the functional, by that of the Kohn-Sham calculation as PySCF names it."""


def check(config: OrbitalFreeTraining) -> None:
    """The sources must be readable, and their exchange and correlation that of a functional; everything runs on a CPU.

    Raises:
        UserError: they are not.
    """
    geometries(config.molecules)
    exchange_correlation(config)


def exchange_correlation(config: OrbitalFreeTraining) -> ExchangeCorrelation:
    """That of the molecules' Kohn-Sham calculations.

    Raises:
        UserError: the functional has none that is like it.
    """
    name = config.molecules.chemistry.functional
    if name.lower().replace(" ", "") not in EXCHANGE_CORRELATION:
        raise UserError(
            f"--molecules.chemistry.functional {name}: densities and energies of that exchange and correlation would "
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
    """Train from the last iteration that was kept, and write ``results.json``, ``figures/`` and ``index.html``."""
    with threads(config.threads):
        split, cases = _read(config, console)
        functional = started(config, cases["train"])
    history = _restored(functional, run.checkpoint)
    interrupted = False
    with (
        _threads(config.threads),
        warnings.catch_warnings(),
        DensityFit(functional, split.train, config) as objective,
    ):
        warnings.simplefilter("ignore", ConvergenceWarning)  # what is not converged is recorded
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
            watcher.begin()  # before the keeper's clock runs
        with Keeper(limits, objective, history, watcher, run, console) as keeper:
            try:
                if keeper.spent < 1:
                    optimize(objective, config.optimizer, config.learning_rate, keeper.spent, keeper.step)
            except Enough:
                pass
            except KeyboardInterrupt:
                interrupted = True
            keeper.finish()
        results = _results(config, split, cases, functional, history, run, "interrupted" if interrupted else "complete")
    run.write_json("results.json", results)
    if config.page:
        write_report(results, split, functional, run)
    console.print(_table(results).rich_rows())
    return not interrupted


def evaluate(config: OrbitalFreeTraining, run: Run, console: Console) -> None:
    """Measure the selected weights again, and draw the page again if there is to be one."""
    if not run.checkpoint.is_file():
        raise UserError(f"{run.checkpoint} does not exist: nothing was trained yet; 'resume' the run first")
    with _threads(config.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        split, cases = _read(config, console)
        functional = started(config, cases["train"])
        history = _restored(functional, run.checkpoint)
        results = _results(config, split, cases, functional, history, run, "complete")
    if config.page:
        write_report(results, split, functional, run)
    run.write_json("evaluation.json", {name: getattr(results, name) for name in SPLITS})
    console.print(_table(results).rich_rows())


class _Watcher:
    """Measures, and keeps the weights of the least validation loss."""

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
        """The start is measured too, and so there is a checkpoint from the beginning."""
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
        train = validation = None
        if measured:
            functional, config = self.objective.functional, self.config
            train = summarized(qualities(self.cases["train"], functional, config, spectrum=config.spectrum))
            if self.cases["validation"]:
                validation = summarized(qualities(self.cases["validation"], functional, config))
        history.looks.append(
            Look(history.iterations, history.seconds, loss, *figures, train=train, validation=validation)
        )
        if measured:
            self._select()

    def _select(self) -> None:
        history = self.history
        by = {look.iteration: look.validation for look in history.looks if look.validation is not None}
        if by:
            history.best = min(by, key=lambda iteration: by[iteration].loss)
        else:
            history.best = history.looks[-1].iteration
        if history.best == history.looks[-1].iteration:
            files.save(self._kept(), self.run.best)

    def _kept(self) -> dict[str, object]:
        return {"weights": self.objective.model.state_dict(), "history": to_plain(self.history)}


def _read(config: OrbitalFreeTraining, console: Console) -> tuple[Split, dict[str, list[Case]]]:
    with console.status("Reading the molecules") as status:
        split = load(
            config.molecules,
            lambda one: status.update(f"Reading the molecules: {one.geometry.name}"),
        )
    for line in split.skipped:
        console.print(f"Skipped: {line}", highlight=False)
    return split, {name: [Case.of(molecule) for molecule in split.named(name)] for name in SPLITS}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch's threads, and those of SciPy's linear algebra."""
    with threads(count), threadpool_limits(count or None):
        yield


def _restored(functional: OrbitalFree, path: Path) -> History:
    """What a checkpoint knows, if there is one; its weights go into the functional."""
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
    state: str,
) -> Results:
    files = split.files if _checked(config) else None
    first = started(config, cases["train"])
    start, start_test = (qualities(cases[name], first, config, files=files) for name in ("train", "test"))
    _restored(functional, run.best)
    constants = functional.constants.detach().clone()
    if not config.energy_weight:  # nothing has trained the constants, on which no density depends
        with torch.no_grad():
            densities = [case.solved(functional, config, cold=True).value for case in cases["train"]]
        fit_constants(functional, split.train, densities)
    Trained(functional, Domain.of(split.train), config.molecules.chemistry).save(run)
    found: dict[str, list[Quality]] = {
        name: qualities(ones, functional, config, spectrum=config.spectrum, constants=constants, files=files)
        for name, ones in cases.items()
    }
    counts = torch.stack([torch.bincount(m.charges, minlength=len(functional.constants)) for m in split.train])
    return Results(
        state=state,
        weights=history.weights,
        start=start,
        start_test=start_test,
        **found,
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
        free_energies=int(torch.linalg.matrix_rank(counts.double())) == len(counts),
    )


def _checked(config: OrbitalFreeTraining) -> bool:
    """Whether densities are looked at on a finer grid."""
    return config.check_grid > config.molecules.chemistry.grid and find_spec("pyscf") is not None


def _table(results: Results) -> Table:
    columns = [
        Column("Molecules"),
        Column("L", "10⁻³"),
        Column("L1 per electron"),
        Column("ΔE, constants refitted", "mHa"),
        Column("ΔE, as trained", "mHa"),
        Column("Better than MINAO", "%"),
        Column("Steps"),
    ]
    checked = any(one.finer is not None for one in results.train)
    if checked:
        columns += [
            Column(f"L, grid {results.config.check_grid}", "10⁻³"),
            Column(f"ΔE, grid {results.config.check_grid}", "mHa"),
        ]
    rows = []
    splits = {"train, linear terms alone": results.start, "train": results.train, "validation": results.validation}
    splits |= {"test, linear terms alone": results.start_test, "test": results.test}
    for name, found in splits.items():
        if found:
            one = summarized(found)
            free = " (whatever the densities)" if name == "train" and results.free_energies else ""
            more = [f"{1e3 * one.finer_loss:.3f}", f"{1e3 * one.finer_energy_error:.1f}"] if checked else []
            rows.append(
                [
                    name,
                    f"{1e3 * one.loss:.3f} (MINAO {1e3 * one.guess_loss:.3f})",
                    f"{one.l1:.4f} (MINAO {one.guess_l1:.4f})",
                    f"{1e3 * one.energy_error:.1f}{free}",
                    f"{1e3 * one.trained_energy_error:.1f}",
                    f"{100 * one.better:.0f}",
                    f"{one.mean_steps:.1f}",
                    *more,
                ]
            )
    return Table(columns, rows)

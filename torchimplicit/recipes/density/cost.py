"""The cost of a density from a functional, compared with a Kohn-Sham calculation, for growing molecules."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from torchimplicit.models.orbital_free.on_grid import SHARED
from torchimplicit.recipes.density.chemistry import Atom, Geometry, from_angstrom
from torchimplicit.recipes.density.compute import kohn_sham, superposition, unsolved
from torchimplicit.recipes.density.forces import forces
from torchimplicit.recipes.density.integrals import made, need_pyscf
from torchimplicit.recipes.density.settings import ChemistrySettings, MoleculeFiles, Molecules, OrbitalFreeTraining
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.run import Run, threads
from torchimplicit.recipes.runtime.settings import own_first, positive
from torchimplicit.recipes.runtime.table import CaptionedFigure, Cell, Claim, Job, Line, Plan, Runs, TitledTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KNOWN = ("H2O", "CH4", "C2H4", "H2CO")
"""Molecules to which the functional is fitted: they contain the elements of the series, with single and double
bonds."""

T = TypeVar("T")

# -- Molecules of any length -------------------------------------------------------------------------------------------


def alkane(carbons: int) -> Geometry:
    """CnH2n+2 in one plane, with bonds of 1.53 and 1.09 angstrom and tetrahedral angles."""
    half = math.acos(-1 / 3) / 2
    along, across = 1.53 * math.sin(half), 1.53 * math.cos(half) / 2
    out, up = 1.09 * math.sin(half), 1.09 * math.cos(half)
    atoms: list[Atom] = []
    for k in range(carbons):
        side = 1 if k % 2 else -1
        x, y = k * along, side * across
        atoms += [("C", (x, y, 0.0)), *(("H", (x, y + side * up, z)) for z in (out, -out))]
        for end, way in ((0, -1), (carbons - 1, 1)):
            if k == end:
                atoms.append(("H", (x + way * 1.09 * math.sin(half), y - side * 1.09 * math.cos(half), 0.0)))
    return from_angstrom(f"C{carbons if carbons > 1 else ''}H{2 * carbons + 2}", atoms)


def waters(count: int) -> Geometry:
    """Molecules 2.9 angstrom apart in a row, each with a hydrogen towards the next."""
    angle = math.radians(104.52)
    atoms: list[Atom] = []
    for k in range(count):
        x, side = 2.9 * k, 1 if k % 2 else -1
        atoms += [
            ("O", (x, 0.0, 0.0)),
            ("H", (x + 0.9572, 0.0, 0.0)),
            ("H", (x + 0.9572 * math.cos(angle), side * 0.9572 * math.sin(angle), 0.0)),
        ]
    return from_angstrom(f"(H2O){count}" if count > 1 else "H2O", atoms)


SERIES: dict[str, Callable[[int], Geometry]] = {"alkanes": alkane, "waters": waters}

# -- One molecule ------------------------------------------------------------------------------------------------------


@own_first
@dataclass(frozen=True, kw_only=True)
class MeasurementConfig(MoleculeFiles):
    """One molecule of a series: its density from a functional, and a Kohn-Sham calculation."""

    series: str = "waters"
    """The series of molecules: alkanes or waters."""

    count: int = 1
    """Size of the molecule: carbon atoms of an alkane, or number of water molecules."""

    memory: float = 1.0
    """Memory for values of basis functions, in gigabytes."""


@dataclass(frozen=True)
class Measured:
    """``cost.json``, with CPU times in seconds of one thread, and peak resident memory in gigabytes.

    Attributes:
        atoms, functions, points, orbitals: atoms, functions, points and orbitals of the molecule, the density's
            basis, the grid, the orbitals' basis.
        integrals: seconds of the integrals, the fit of the superposition of atoms, and the grid.
        minimization, forces: seconds of both with the functional.
        steps, converged: number of steps of the minimization, and if it converged.
        gigabytes: peak memory until the forces are computed.
        kohn_sham, cycles: seconds and cycles of the Kohn-Sham calculation, without forces.
    """

    atoms: int
    functions: int
    points: int
    orbitals: int
    integrals: float
    minimization: float
    forces: float
    steps: int
    converged: bool
    gigabytes: float
    kohn_sham: float
    cycles: int


class Measuring:
    """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""

    def check(self, config: MeasurementConfig) -> None:
        """PySCF must be installed."""
        need_pyscf()

    def train(self, config: MeasurementConfig, run: Run, console: Console) -> bool:
        """Measure."""
        run.write_json("cost.json", asdict(measured(config)))
        return True

    def evaluate(self, config: MeasurementConfig, run: Run, console: Console) -> None:
        """Measure again."""
        self.train(config, run, console)


RUNNER = Measuring()


def measured(config: MeasurementConfig) -> Measured:
    """Measure by the process's CPU clock, in one thread."""
    # these bring Matplotlib and SciPy, without which settings are made
    from torchimplicit.recipes.density.case import Case
    from torchimplicit.recipes.density.split import load
    from torchimplicit.recipes.density.training import started

    chemistry = ChemistrySettings(grid=config.grid)
    training = OrbitalFreeTraining(
        molecules=Molecules(sources=KNOWN, chemistry=chemistry, data_dir=config.data_dir), pairs=False
    )
    with threads(1), SHARED.limited(config.memory * 1e9):
        functional = started(training, [Case.of(molecule) for molecule in load(training.molecules).train])
        functional.requires_grad_(False)
        geometry = SERIES[config.series](config.count)
        record, integrals = timed(lambda: unsolved(geometry, chemistry))
        molecule = record.molecule()
        solution, minimization = timed(lambda: Case.of(molecule).solved(functional, training, cold=True))
        _, slopes = timed(lambda: forces(functional, solution.value, record))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        mol = made(geometry, chemistry.orbital_basis)
        exact, seconds = timed(lambda: kohn_sham(mol, chemistry, superposition(mol)))
    return Measured(
        atoms=len(geometry.charges),
        functions=molecule.size,
        points=len(molecule.points),
        orbitals=int(mol.nao),
        integrals=integrals,
        minimization=minimization,
        forces=slopes,
        steps=int(solution.steps),
        converged=bool(solution.converged),
        gigabytes=peak,
        kohn_sham=seconds,
        cycles=int(exact.cycles),
    )


def timed(do: Callable[[], T]) -> tuple[T, float]:
    """The result of a call, and its CPU seconds."""
    began = time.process_time()
    result = do()
    return result, time.process_time() - began


# -- The table ---------------------------------------------------------------------------------------------------------


@own_first
@dataclass(frozen=True, kw_only=True)
class CostConfig(MoleculeFiles):
    """Alkanes and water clusters of increasing size."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=1))

    alkanes: tuple[int, ...] = (1, 2, 4, 7, 10)
    """Sizes of the alkanes, in carbon atoms."""

    waters: tuple[int, ...] = (1, 2, 4, 8)
    """Sizes of the water clusters, in molecules."""

    memory: float = 1.0
    """Memory for values of basis functions, in gigabytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "memory")


def jobs(config: CostConfig) -> list[Job]:
    """One job per molecule, each in its own process, whose memory is measured."""
    return [
        Job(
            f"{series}-{count}",
            "ofdft-cost-molecule",
            MeasurementConfig(
                series=series, count=count, grid=config.grid, memory=config.memory, data_dir=config.data_dir
            ),
            {"row": series, "count": count},
        )
        for series in SERIES
        for count in getattr(config, series)
    ]


figures = table.read("cost.json")


def whole(line: Line) -> float:
    """The seconds of a density without forces, for comparison with the Kohn-Sham calculation, which has none."""
    return float(line["integrals"] + line["minimization"])


def growth(runs: Runs, seconds: Callable[[Line], float]) -> float:
    """The exponent of the time's growth with the number of atoms, from the second largest to the largest molecule."""
    before, last = sorted(runs, key=lambda line: line["atoms"])[-2:]
    return math.log(seconds(last) / seconds(before)) / math.log(last["atoms"] / before["atoms"])


def protocol(config: CostConfig, runs: Runs) -> str:
    """Describe what was run, and how the figures were selected."""
    return (
        f"The linear terms of the functional are fitted to {', '.join(KNOWN)} in closed form; its network of 16 hidden "
        "units is not trained, but evaluated. Preconditioned L-BFGS finds the density to 1e-8 from the superposition "
        f"of atoms, with grid level {config.grid} and {config.memory:g} GB for values of basis functions. The "
        "Kohn–Sham calculation is PySCF's RKS with LDA and def2-SVP, from that superposition to 1e-9 hartree on "
        "PySCF's grid of level 3, without density fitting. Times are CPU times with one thread in double precision; "
        "each molecule is measured once, in a separate process."
    )


def sheets(config: CostConfig, runs: Runs) -> Iterator[TitledTable]:
    """One row per molecule."""

    def of(path: str, form: str = ".1f") -> Callable[[Line], str]:
        return lambda line: table.shown(line[path], form)

    for series, rows in every(runs):
        yield table.sheet(f"Time and memory of a density: {series}", rows, [
            Cell[Line]("Molecule", lambda line: SERIES[line["row"]](line["count"]).name),
            Cell("Atoms", of("atoms", "d")),
            Cell("Functions", of("functions", "d"), "", "Basis functions of the density."),
            Cell("Points", of("points", "d"), "", "Grid points."),
            Cell("Integrals", of("integrals"), "s", "CPU time of the integrals, the grid and the fit of the "
             "superposition of atoms."),
            Cell("Minimization", of("minimization"), "s", "CPU time of finding the density."),
            Cell("Steps", lambda line: f"{line['steps']}{'' if line['converged'] else ', not converged'}", "",
                 "Steps of the minimization."),
            Cell("Forces", of("forces"), "s", "CPU time of the forces at the density."),
            Cell("Peak memory", of("gigabytes"), "GB", "Peak memory of the process until the forces are computed."),
            Cell("Kohn–Sham", of("kohn_sham"), "s", "CPU time of the Kohn–Sham calculation, without forces."),
            Cell("Cycles", of("cycles", "d"), "", "Self-consistency cycles of the Kohn–Sham calculation."),
            Cell("Relative to Kohn–Sham", lambda line: f"{whole(line) / line['kohn_sham']:.2f}", "",
                 "Time of integrals and minimization divided by that of the Kohn–Sham calculation."),
        ])  # fmt: skip


def every(runs: Runs) -> Iterator[tuple[str, Runs]]:
    """The series that have runs."""
    for series in SERIES:
        if rows := runs.where(row=series):
            yield series, rows


def claims(config: CostConfig, runs: Runs) -> Iterator[Claim]:
    """Claims about the cost compared with Kohn-Sham."""
    for series, rows in every(runs):
        last = max(rows, key=lambda line: line["atoms"])
        yield Claim(
            f"The density of the largest of the {series} takes less time than its Kohn–Sham calculation",
            f"{last['atoms']} atoms: {whole(last):.0f} s against {last['kohn_sham']:.0f} s",
            whole(last) < last["kohn_sham"],
        )
        if len(rows) > 1:
            exponent, other = growth(rows, whole), growth(rows, lambda line: float(line["kohn_sham"]))
            yield Claim(
                f"The time of a density grows by a smaller power of the number of atoms than that of the Kohn–Sham "
                f"calculation, between the two largest of the {series}",
                f"the powers are {exponent:.1f} and {other:.1f}",
                exponent < other,
            )
    if runs:
        converged = runs.column("converged")
        yield Claim("Every density is found", f"{sum(converged)} of {len(converged)}", all(converged))


def notes(config: CostConfig, runs: Runs) -> Iterator[str]:
    """Caveats for the reader."""
    yield (
        "The table compares costs only: the functional is not trained for these molecules, and its densities and "
        "energies are as good as a fit in closed form makes them."
    )
    yield (
        "The Hessian that preconditions the minimization is assembled and factorized, which grows as the cube of the "
        "molecule, as Kohn–Sham's diagonalizations do; its integrals over orbitals grow at first as the fourth power."
    )
    yield from table.missing(jobs(config), runs)


def drawings(config: CostConfig, runs: Runs, folders: Mapping[str, Run]) -> Iterator[CaptionedFigure]:
    """Time and memory against the number of atoms."""
    if runs:
        yield CaptionedFigure(
            "growth",
            grown(runs),
            "Left: CPU time of a density (solid) and of a Kohn–Sham calculation (dashed). Right: peak memory of the "
            "process until the density and its forces are computed.",
        )


def grown(runs: Runs) -> Figure:
    """The figure, in two panels."""
    from torchimplicit.recipes.runtime.page import COLOURS, axes

    figure, (time_of, memory) = axes(2, width=4.9, height=3.9)
    for colour, (series, rows) in zip(COLOURS, every(runs), strict=False):
        atoms = [line["atoms"] for line in rows]
        time_of.plot(atoms, [whole(line) for line in rows], "o-", color=colour, label=f"{series}: density")
        time_of.plot(
            atoms, [line["kohn_sham"] for line in rows], "s--", color=colour, markerfacecolor="none",
            label=f"{series}: Kohn–Sham",
        )  # fmt: skip
        memory.plot(atoms, [line["gigabytes"] for line in rows], "o-", color=colour, label=series)
    time_of.set(xlabel="atoms", ylabel="seconds", xscale="log", yscale="log")
    memory.set(xlabel="atoms", ylabel="gigabytes", ylim=(0, None))
    for panel in (time_of, memory):
        panel.legend(fontsize=7.5)
    return figure


TABLE = table.published(
    globals(),
    "Cost of a density for growing molecules",
    "There are no published figures; the cost of orbital-free calculations is said to grow more slowly than that of "
    "Kohn–Sham calculations. The figures here are ours.",
)

"""Settings of the recipes of density functionals."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import OptimizerName, fraction, not_negative, option, own_first, positive

# -- How a molecule is computed ----------------------------------------------------------------------------------------


def grid_levels(settings: Any, *names: str) -> None:
    """Each must be a level of PySCF's grids."""
    for name in names:
        if not 0 <= getattr(settings, name) <= 9:
            raise UserError(f"{option(name)} must lie in 0 to 9, and it is {getattr(settings, name)}")


@final
@dataclass(frozen=True, kw_only=True)
class ChemistrySettings:
    """The Kohn-Sham calculation, the density basis and the grid. Data files differ if any of these do."""

    functional: str = "lda,pw"
    """Exchange-correlation functional by PySCF's name: a local one, or one with the density's gradient."""

    orbital_basis: str = "def2-svp"
    """Basis of the Kohn-Sham orbitals, by PySCF's name."""

    beta: float = 2.5
    """Ratio of neighbouring exponents in the density's even-tempered basis. A smaller ratio gives a larger and better
    basis."""

    grid: int = 1
    """Level of PySCF's integration grid for the functional, 0 (coarse) to 9."""

    scf_grid: int = 3
    """Level of PySCF's integration grid for the Kohn-Sham calculation, 0 (coarse) to 9."""

    scf_tolerance: float = 1e-9
    """Change in energy, in hartree, below which the Kohn-Sham iteration stops."""

    scf_cycles: int = 50
    """Largest number of Kohn-Sham iterations. Molecules that need more are reported and skipped."""

    def __post_init__(self) -> None:
        positive(self, "scf_tolerance", "scf_cycles")
        if not 1.5 <= self.beta <= 10:
            raise UserError(
                f"--beta must lie in [1.5, 10], and it is {self.beta}: below, the basis is nearly linearly dependent; "
                "above, it has gaps"
            )
        grid_levels(self, "grid", "scf_grid")
        for name in ("functional", "orbital_basis"):
            if not getattr(self, name).strip():
                raise UserError(f"{option(name)} must name one, and it is empty")


@final
@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """The labelled densities of a functional's training, besides the ground state. Data files differ if any of these
    do."""

    count: int = 16
    """Densities per molecule, including the ground state's."""

    nearest: float = 2e-5
    """Smallest target L of an added potential, where L is the integrated squared difference to the ground state's
    density over twice the number of electrons. A step that starts from another density than the ground state's may end
    farther away."""

    farthest: float = 2.5e-3
    """Largest target L. Targets are drawn uniformly in its logarithm."""

    shares: tuple[float, float] = (0.05, 0.5)
    """Smallest and largest share of the superposition of atoms in the density from which every other label starts. The
    others start from the ground state."""

    seed: int = 0
    """Random seed of the potentials."""

    def __post_init__(self) -> None:
        positive(self, "count", "nearest", "farthest")
        not_negative(self, "seed")
        if self.nearest > self.farthest:
            raise UserError(f"--nearest ({self.nearest}) must not exceed --farthest ({self.farthest})")
        if not 0 <= self.shares[0] <= self.shares[1] <= 1:
            raise UserError(f"--shares must be two of [0, 1], the lesser first, and they are {self.shares}")


# -- The settings of the orbital-free recipes --------------------------------------------------------------------------


EstimatorName = Literal["implicit", "damped", "eqprop", "eqprop-one-sided"]
"""Exact implicit differentiation; the same with damping, for a nearly singular Hessian; symmetric equilibrium
propagation; and one-sided equilibrium propagation with a curved nudge."""


@dataclass(frozen=True, kw_only=True)
class MoleculeFiles:
    """The grid of a table's molecules, and where their files are."""

    grid: int = 1
    """Level of the integration grid, 0 to 9."""

    data_dir: Path | None = None
    """Folder of computed molecules. Default: the user's cache. Missing molecules are computed by PySCF."""

    def __post_init__(self) -> None:
        grid_levels(self, "grid")


@dataclass(frozen=True, kw_only=True)
class Molecules:
    """Molecules and their split into training, validation and test."""

    sources: tuple[str, ...] = ("H2", "H2O", "NH3", "CH4")
    """Names, .xyz files, folders or archives of them, or qm9; see 'torchimplicit molecules --help'."""

    limit: int | None = None
    """Take at most this many molecules from each folder or archive, those with the fewest atoms."""

    distort: float = 0.04
    """Standard deviation, in angstrom, of the random displacement of each coordinate in the copies below."""

    train_copies: int = 0
    """Distorted copies of every molecule for training, in addition to the molecule itself."""

    validation_copies: int = 0
    """Distorted copies of every molecule for validation, which selects the weights. With neither copies nor held-out
    molecules the last weights are kept."""

    test_copies: int = 0
    """Distorted copies of every molecule for the test."""

    held_out: int = 0
    """Number of molecules, drawn at random, for validation only, and the same number for the test only."""

    geometry_seed: int = 0
    """Random seed of the distortions and of the choice of held-out molecules."""

    data_dir: Path | None = None
    """Folder of computed molecules. Default: the user's cache. Missing molecules are computed by PySCF."""

    chemistry: ChemistrySettings = field(default_factory=ChemistrySettings)

    def __post_init__(self) -> None:
        positive(self, "limit", "distort")
        not_negative(self, "train_copies", "validation_copies", "test_copies", "held_out", "geometry_seed")
        if not self.sources:
            raise UserError("--sources needs at least one molecule, such as H2O")


@dataclass(frozen=True, kw_only=True)
class Common:
    """Settings that all trainings of density functionals have in common."""

    check_grid: int = 3
    """Level of PySCF's grid on which all densities are minimized again at the end; a density counts as good only if it
    is good there too. No check if it is not finer than --grid, or without PySCF."""

    page: bool = True
    """Write figures and an HTML page at the end."""

    seed: int = 0
    """Random seed of the initial weights and of everything drawn in training."""

    memory: float = 1.0
    """Memory for values of basis functions on the grids, in gigabytes, for all processes together. Values that do not
    fit are recomputed whenever needed, which takes about ten times as long. Matrices and other data come on top."""

    threads: int = 1
    """CPU threads per process; 0 leaves the number to PyTorch."""

    def __post_init__(self) -> None:
        not_negative(self, "seed", "memory", "threads")
        grid_levels(self, "check_grid")


@own_first
@dataclass(frozen=True, kw_only=True)
class ByMinima(Common):
    """Training by the densities at a functional's minima: the loss, its gradient, and the minimizer."""

    gradient: EstimatorName = "implicit"
    """Gradient estimator for the minimum. Gauss–Newton always uses exact Jacobians."""

    nudge: float | None = None
    """Nudge of equilibrium propagation. Default: chosen from the Hessian's least eigenvalue."""

    tail_weight: float = 0.0
    """Weight of ∫(ρ−ρ_gs)²/(ρ_gs+10⁻³)/(2N) in the loss, relative to ∫(ρ−ρ_gs)²/(2N). It emphasizes regions of low
    density and bounds ∫|ρ−ρ_gs|/N."""

    energy_weight: float = 0.0
    """Weight of half the squared error of the energy per electron, in hartree. Its gradient follows from the envelope
    theorem."""

    inner: Literal["l-bfgs", "descent"] = "l-bfgs"
    """Minimizer that finds a density: L-BFGS with a kept Hessian, or gradient descent with momentum."""

    inner_tolerance: float = 1e-6
    """Tolerance on the norm of the projected gradient, in hartree, in coordinates whose length is that of densities."""

    inner_steps: int = 100
    """Largest number of steps of a minimization."""

    inner_rate: float = 3e-3
    """Step size of --inner descent."""

    cold: bool = False
    """Start every minimization from the superposition of atoms with a fresh Hessian, instead of the last density. The
    result is then a function of the weights alone, even with several minima."""

    correction: int = 0
    """Number of iterates before the minimum that also enter the loss, each treated as a minimum (fixed-point
    correction); 0 for none."""

    correction_random: bool = False
    """Draw the iterates of --correction at random instead of evenly spaced."""

    floor_weight: float = 0.0
    """Weight of the penalty max(0, 1 − λ/floor)² on the Hessian's least eigenvalue λ."""

    floor: float = 0.5
    """Eigenvalue below which --floor-weight penalizes, in hartree."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "nudge", "inner_tolerance", "inner_steps", "inner_rate", "floor")
        not_negative(self, "tail_weight", "energy_weight", "correction", "floor_weight")


@own_first
@dataclass(frozen=True, kw_only=True)
class OrbitalFreeTraining(ByMinima):
    """Train a density functional so that its minima, at a fixed number of electrons, are Kohn-Sham densities."""

    molecules: Molecules = field(default_factory=Molecules)

    weizsaecker: float = 0.4
    """Share of the von Weizsäcker kinetic energy in the functional."""

    penalty: float = 100.0
    """Factor of ∫ρ₋² in the energy, which suppresses negative densities."""

    hidden: int = 16
    """Units in each of the enhancement factor's two hidden layers; 0 trains only the linear terms."""

    pairs: bool = True
    """Let the linear term depend on the positions of an atom's neighbours."""

    optimizer: OptimizerName = "least-squares"
    """Outer optimizer: trust-region Gauss–Newton with exact Jacobians, L-BFGS (both from SciPy), or Adam with cosine
    decay."""

    iterations: int = 30
    """Largest number of iterations of the outer optimizer."""

    seconds: float | None = None
    """Stop the outer optimizer after this much CPU time, in seconds. Measurements are not counted."""

    learning_rate: float = 3e-3
    """Peak learning rate of Adam."""

    decay: float = 1e-6
    """Weight of half the sum of the network's squared weights in the loss."""

    correction_gamma: float = 0.8
    """Factor by which each iterate of --correction weighs less than the next."""

    hessian_weight: float = 0.0
    """Weight of the penalty ‖vᵀH‖²/n on the Hessian at the density, with v random."""

    measure_every: int = 5
    """Outer iterations between two evaluations of all densities."""

    spectrum: bool = False
    """Also measure the Hessians' extreme eigenvalues. Slow for large molecules."""

    processes: int = 1
    """Number of processes among which the molecules are divided."""

    single: bool = False
    """Keep values of basis functions in single precision, which halves their memory. Energies change by less than 1e-6
    hartree."""

    tail_weight: float = 0.1
    inner_tolerance: float = 1e-8
    inner_steps: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "iterations", "seconds", "learning_rate", "measure_every", "processes")
        not_negative(self, "weizsaecker", "penalty", "hidden", "decay", "hessian_weight")
        fraction(self, "correction_gamma")
        if self.optimizer == "least-squares":
            if self.gradient != "implicit":
                raise UserError(
                    f"--gradient {self.gradient} estimates a gradient, and --optimizer least-squares needs Jacobians: "
                    "take --optimizer adam or l-bfgs"
                )
            if self.correction_random or self.hessian_weight:
                raise UserError(
                    "--correction-random and --hessian-weight draw at random in every evaluation, which --optimizer "
                    "least-squares cannot compare: take --optimizer adam or l-bfgs"
                )
            if self.correction and not self.cold:
                raise UserError(
                    "--correction with --optimizer least-squares needs --cold: the iterates on the way to a density "
                    "must not depend on the density found last"
                )


def small() -> OrbitalFreeTraining:
    """H2, H2O, NH3 and CH4 with distorted copies, minutes on two cores."""
    return OrbitalFreeTraining(molecules=Molecules(train_copies=2, validation_copies=2, test_copies=3))


def single() -> OrbitalFreeTraining:
    """One molecule, as in the slides: the weights are fitted to it alone."""
    return OrbitalFreeTraining(molecules=Molecules(sources=("H2O",)), optimizer="l-bfgs", iterations=60)


def qm9() -> OrbitalFreeTraining:
    """The smallest molecules of QM9, some of them held out."""
    return OrbitalFreeTraining(
        molecules=Molecules(sources=("qm9",), limit=30, held_out=6), optimizer="l-bfgs", iterations=60, check_grid=2
    )

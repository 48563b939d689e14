"""The settings of the recipes of density functionals."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import OptimizerName, fraction, not_negative, option, positive

# -- How a molecule is computed ----------------------------------------------------------------------------------------


GRIDS = 10
"""PySCF has grids of level 0 to 9."""


@final
@dataclass(frozen=True, kw_only=True)
class ChemistrySettings:
    """Of the Kohn-Sham calculation, the density basis and the grid. Two files of one molecule differ if these do."""

    functional: str = "lda,pw"
    """Exchange and correlation as PySCF names them, local or with the density's gradient."""

    orbital_basis: str = "def2-svp"
    """The basis of the Kohn-Sham orbitals, as PySCF names it."""

    beta: float = 2.5
    """The ratio of neighbouring exponents in the even-tempered basis of the density; smaller is larger and better."""

    grid: int = 1
    """The quadrature grid's level in PySCF, 0 (coarse) to 9, on which functionals are integrated."""

    scf_grid: int = 3
    """The level of the grid of the Kohn-Sham calculation itself."""

    scf_tolerance: float = 1e-9
    """The change in energy, in hartree, at which the Kohn-Sham iteration is done."""

    scf_cycles: int = 50
    """The most iterations; a molecule that needs more is reported and skipped."""

    def __post_init__(self) -> None:
        positive(self, "scf_tolerance", "scf_cycles")
        if not 1.5 <= self.beta <= 10:
            raise UserError(
                f"--beta must lie in [1.5, 10], and it is {self.beta}: below, the basis is nearly linearly dependent; "
                "above, it has gaps"
            )
        for name in ("grid", "scf_grid"):
            if not 0 <= getattr(self, name) < GRIDS:
                raise UserError(
                    f"--{name.replace('_', '-')} must lie in 0 to {GRIDS - 1}, and it is {getattr(self, name)}"
                )
        for name in ("functional", "orbital_basis"):
            if not getattr(self, name).strip():
                raise UserError(f"--{name.replace('_', '-')} must name one, and it is empty")


@final
@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """Of the densities that a functional is trained on beside the ground state's. Two files differ if these do."""

    count: int = 16
    """Densities of each molecule, the ground state's included."""

    nearest: float = 2e-5
    """The least L, the integral of the squared difference to the ground state's density over twice the electrons, that
    an added potential's strength is chosen for. A step from another density than the ground state's may end farther."""

    farthest: float = 2.5e-3
    """The largest L; in between they are drawn evenly in its logarithm."""

    shares: tuple[float, float] = (0.05, 0.5)
    """Of the superposition of atoms in the density of which every other one is a step, the least and the largest; the
    others are steps from the ground state."""

    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        positive(self, "count", "nearest", "farthest")
        not_negative(self, "seed")
        if self.nearest > self.farthest:
            raise UserError(f"--nearest ({self.nearest}) must not exceed --farthest ({self.farthest})")
        if not 0 <= self.shares[0] <= self.shares[1] <= 1:
            raise UserError(f"--shares must be two of [0, 1], the lesser first, and they are {self.shares}")


# -- The settings of the orbital-free recipes --------------------------------------------------------------------------


EstimatorName = Literal["implicit", "damped", "eqprop", "eqprop-one-sided"]
"""Exact implicit differentiation; with damping where the minimum is nearly none; symmetric equilibrium propagation; and
one-sided with a curved nudge."""


@dataclass(frozen=True, kw_only=True)
class Molecules:
    """Which molecules, and how they are split."""

    sources: tuple[str, ...] = ("H2", "H2O", "NH3", "CH4")
    """Names, .xyz files, folders or archives of them, or qm9; see 'torchimplicit molecules --help'."""

    limit: int | None = None
    """Take so many of every folder or archive, those with the fewest atoms."""

    distort: float = 0.04
    """Standard deviation, in angstrom, of the coordinates' displacement in the copies below."""

    train_copies: int = 0
    """Distorted copies of every molecule to train on, beside the molecule itself."""

    validation_copies: int = 0
    """Others to select the weights by; with none, and no molecules held out, the weights are the last ones."""

    test_copies: int = 0
    """Others to test on."""

    held_out: int = 0
    """So many molecules are for validation alone, and as many for test alone, drawn at random."""

    geometry_seed: int = 0
    """Of the distortions, and of which molecules are held out."""

    data_dir: Path | None = None
    """Where the molecules' data files are, or will be computed into; without it the user's cache."""

    chemistry: ChemistrySettings = field(default_factory=ChemistrySettings)

    def __post_init__(self) -> None:
        positive(self, "limit", "distort")
        not_negative(self, "train_copies", "validation_copies", "test_copies", "held_out", "geometry_seed")
        if not self.sources:
            raise UserError("--sources needs at least one molecule, such as H2O")


@dataclass(frozen=True, kw_only=True)
class OrbitalFreeTraining:
    """Train a density functional so that its minima, at a fixed number of electrons, are Kohn-Sham densities."""

    molecules: Molecules = field(default_factory=Molecules)

    weizsaecker: float = 0.4
    """The share of the von Weizsäcker kinetic energy."""

    penalty: float = 100.0
    """The factor of ∫ρ₋², which holds negative densities down."""

    hidden: int = 16
    """Units in each of the enhancement factor's two hidden layers; 0: only the linear terms are trained."""

    pairs: bool = True
    """Let the linear term know where an atom's neighbours are."""

    tail_weight: float = 0.1
    """Of ∫(ρ−ρ_gs)²/(ρ_gs+10⁻³)/(2N) in the loss beside ∫(ρ−ρ_gs)²/(2N): it counts where the density is low, and bounds
    ∫|ρ−ρ_gs|/N."""

    optimizer: OptimizerName = "least-squares"
    """A trust-region Gauss–Newton method with exact Jacobians, L-BFGS (both SciPy's), or Adam with a cosine."""

    iterations: int = 30
    """Of the optimizer, at most."""

    seconds: float | None = None
    """Stop the optimizer after so much of the processor's time, measurements not counted."""

    learning_rate: float = 3e-3
    """Adam's peak."""

    decay: float = 1e-6
    """The weight of the sum of squares of the network's weights, halved, in the loss."""

    energy_weight: float = 0.0
    """Of the squared error of the energy per electron, in hartree, halved; its gradient is that of the envelope
    theorem."""

    gradient: EstimatorName = "implicit"
    """How the minimum is differentiated; least-squares takes exact Jacobians."""

    nudge: float | None = None
    """Of equilibrium propagation; without it, chosen by the least eigenvalue of the Hessian."""

    inner: Literal["l-bfgs", "descent"] = "l-bfgs"
    """How the density is found: by L-BFGS with a kept Hessian, or by gradient descent with momentum."""

    inner_tolerance: float = 1e-8
    """On the projected gradient's norm, in hartree, in coordinates in which lengths are those of densities."""

    inner_steps: int = 300
    """The most steps."""

    inner_rate: float = 3e-3
    """Of descent."""

    cold: bool = False
    """Begin every minimization at the superposition of atoms, with a Hessian made there, and not at the density found
    last: what is found is then a function of the weights alone, also where there are several minima."""

    correction: int = 0
    """Iterates on the way to the density that are in the loss too, each as if it were the minimum; 0: none."""

    correction_gamma: float = 0.8
    """What an iterate weighs less than the next one."""

    correction_random: bool = False
    """Draw the iterates at random rather than evenly."""

    hessian_weight: float = 0.0
    """Of the penalty ‖vᵀH‖²/n on the Hessian at the density, v random."""

    floor_weight: float = 0.0
    """Of the penalty max(0, 1 − λ/floor)² on the Hessian's least eigenvalue λ."""

    floor: float = 0.5
    """See --floor-weight; in hartree."""

    measure_every: int = 5
    """Iterations between two measurements of all densities."""

    spectrum: bool = False
    """Measure the Hessians' extreme eigenvalues too, which takes long for large molecules."""

    check_grid: int = 3
    """At the end every density is found once more on PySCF's grid of this level, and counts as good only if it is there
    too; no finer than --molecules.chemistry.grid: it is not."""

    page: bool = True
    """Draw figures and a page at the end."""

    seed: int = 0
    """Of the initial weights and of what is drawn on the way."""

    processes: int = 1
    """Share the molecules among so many processes."""

    memory: float = 1.0
    """Gigabytes for the values of basis functions on the grids, of all processes together; what does not fit is
    evaluated anew whenever it is needed, which takes some ten times as long. Matrices and the rest come on top."""

    single: bool = False
    """Keep these values in single precision, in half the room: energies change by less than 1e-6 hartree."""

    threads: int = 1
    """CPU threads of a process; 0 leaves the number to PyTorch."""

    def __post_init__(self) -> None:
        positive(self, "iterations", "seconds", "learning_rate", "inner_tolerance", "inner_steps", "inner_rate")
        positive(self, "measure_every", "floor", "nudge", "processes")
        not_negative(
            self,
            "memory",
            "weizsaecker",
            "penalty",
            "hidden",
            "decay",
            "energy_weight",
            "correction",
            "seed",
            "threads",
        )
        if not 0 <= self.check_grid < GRIDS:
            raise UserError(f"--check-grid must lie in 0 to {GRIDS - 1}, and it is {self.check_grid}")
        not_negative(self, "hessian_weight", "floor_weight")
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


# -- The settings of the table and of its measurement on one molecule --------------------------------------------------


State = Literal["fitted", "trained"]
"""Which functional: one that is only fitted, or one of less von Weizsäcker energy that was trained too."""

STATES: tuple[State, ...] = ("fitted", "trained")


WEIZSAECKER: dict[State, float] = {"fitted": 0.4, "trained": 0.05}

SPREAD: dict[State, float] = {"fitted": 0.1, "trained": 0.3}
"""Standard deviation of the weights of the enhancement factor's last layer."""

LEARNING_RATE = 3e-3

FELT = 0.05
"""The least share of the gradient that comes through a mode which is moved."""

TOLERANCE = 1e-8
"""Relative, of the residual, for the solvers that have one."""


@dataclass(frozen=True, kw_only=True)
class MoleculeGradientsConfig:
    """One molecule and one functional with random network weights, and every gradient at its minimum."""

    molecule: str = "H2"
    """By its formula: H2, H2O, NH3, CH4 and others that are known."""

    state: State = "fitted"
    """fitted: c = 0.4 times the von Weizsäcker energy and a network of small weights. trained: c = 0.05 and larger
    weights, then some steps of Adam, which leaves a wider spectrum."""

    seed: int = 0
    """Of the network's weights, of the geometry and of the directions."""

    sigma: float = 0.04
    """Standard deviation of the displacements of the nuclei, in angstrom; 0: the molecule's own geometry."""

    grid: int = 1
    """Level of the integration grid."""

    data_dir: Path | None = None
    """The folder of computed molecules. By default the user's cache; what is not there is computed by PySCF."""

    training_steps: int = 60
    """Of Adam, for the trained state."""

    tolerance: float = 1e-10
    """Of the minimizations: the norm of the projected gradient, in hartree, in coordinates of the overlap."""

    directions: int = 6
    """Random directions in all parameters, along which finite differences are taken."""

    step: float = 3e-3
    """Of the finite differences: the length of the smallest displacement of the parameters."""

    nudges: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4)
    """Of equilibrium propagation, relative to the cotangent's length."""

    loss_nudges: tuple[float, ...] = (0.1, 1e-2, 1e-3, 1e-4)
    """Weights of the loss in the energy, for propagation with the whole loss."""

    loose: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6, 1e-8)
    """Tolerances of the minimizations there."""

    beyond: tuple[float, ...] = (0.1, 0.5, 0.9, 1.1, 2.0, 5.0)
    """Weights of the loss over the least eigenvalue, for the symmetric difference."""

    damping: float = 0.25
    """Over the softest eigenvalue, where that is moved."""

    softness: tuple[float, ...] = (1.0, 0.1, 1e-2, 1e-3, 1e-4, -1e-3, -1e-2, -0.1, -0.4)
    """What the softest eigenvalue becomes, over what it was."""

    descent_steps: int = 2000
    """Of gradient descent and Adam on the least-squares form of the adjoint system."""

    most_steps: int = 40
    """Of a minimization that may have no minimum to find."""

    repeats: int = 5
    """How often each adjoint solver is timed, in turn with the others."""

    def __post_init__(self) -> None:
        positive(self, "tolerance", "directions", "step", "damping", "descent_steps", "most_steps", "repeats")
        not_negative(self, "seed", "sigma", "training_steps")
        for name in ("nudges", "loss_nudges", "loose", "beyond"):
            if len(getattr(self, name)) < 2 or not all(value > 0 for value in getattr(self, name)):
                raise UserError(f"{option(name)} must be positive numbers, two at least")
        if 1.0 not in self.softness:
            raise UserError(f"{option('softness')} must hold 1, the eigenvalue as it is")


def measurement() -> MoleculeGradientsConfig:
    """One molecule."""
    return MoleculeGradientsConfig()

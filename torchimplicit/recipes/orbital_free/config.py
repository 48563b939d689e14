"""The settings of the orbital-free recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.chemistry.settings import ChemistrySettings
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import OptimizerName, fraction, not_negative, positive

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

    chemistry: ChemistrySettings = field(default_factory=lambda: ChemistrySettings(grid=0))

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

    page: bool = True
    """Draw figures and a page at the end."""

    seed: int = 0
    """Of the initial weights and of what is drawn on the way."""

    processes: int = 1
    """Share the molecules among so many processes."""

    threads: int = 1
    """CPU threads of a process; 0 leaves the number to PyTorch."""

    def __post_init__(self) -> None:
        positive(self, "iterations", "seconds", "learning_rate", "inner_tolerance", "inner_steps", "inner_rate")
        positive(self, "measure_every", "floor", "nudge", "processes")
        not_negative(
            self, "weizsaecker", "penalty", "hidden", "decay", "energy_weight", "correction", "seed", "threads"
        )
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
        molecules=Molecules(sources=("qm9",), limit=30, held_out=6), optimizer="l-bfgs", iterations=60
    )

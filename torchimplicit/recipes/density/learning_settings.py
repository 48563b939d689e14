"""The settings of pre-training and of fine-tuning density functionals with a network of the coefficients."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from torchimplicit.recipes.density.settings import EstimatorName, Molecules, OrbitalFreeTraining
from torchimplicit.recipes.runtime.settings import not_negative, positive

Kind = Literal["potential", "functional", "density"]
"""What a network of the coefficients gives: an external potential, by the geometry and the superposition of atoms,
which leaves the functional convex; an energy of the density itself; or, to compare with, the density at once, with no
energy and nothing to minimize."""


@dataclass(frozen=True, kw_only=True)
class Stepping:
    """How weights are changed: AdamW with a cosine, some molecules a step."""

    steps: int = 2000
    """Of the optimizer, at most."""

    seconds: float | None = None
    """Stop after so much of the processor's time; the learning rate's cosine is over it."""

    batch: int = 4
    """Molecules a step."""

    learning_rate: float = 3e-3
    """The peak, after a tenth of it at first and a rise over the first 5 %."""

    decay: float = 1e-3
    """Of the weights, as AdamW has it."""

    clip: float = 5.0
    """The largest norm of a gradient that is followed in full."""

    measure_every: int = 200
    """Steps between two looks at the validation molecules."""

    def __post_init__(self) -> None:
        positive(self, "steps", "seconds", "batch", "learning_rate", "clip", "measure_every")
        not_negative(self, "decay")


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """Train a density functional on densities, energies and slopes of Kohn-Sham calculations, without minimizing it."""

    molecules: Molecules = field(
        default_factory=lambda: Molecules(train_copies=12, validation_copies=2, test_copies=4, distort=0.08)
    )

    kind: Kind = "potential"
    """A learned external potential, which needs the ground states alone; a functional of the density, which is trained
    on labels; or the density at once, to compare with."""

    labels: int = 16
    """Densities of each training molecule, for a functional; see 'torchimplicit molecules --labels'."""

    stepping: Stepping = field(default_factory=Stepping)

    width: int = 48
    """Features of an atom."""

    channels: int = 6
    """Combinations of an atom's shells of each l > 0."""

    rounds: int = 2
    """Of messages between atoms."""

    at_once: int = 4
    """Labels of a molecule in a step."""

    metric: Literal["hessian", "overlap"] = "hessian"
    """In which the error of a slope is measured: by how far the minimum would be away, or as it is."""

    energy_weight: float = 1.0
    """Of the error of the energy per electron, in 10 mHa, beside 2·10³ L."""

    noise: float = 3e-3
    """The largest L of random displacements of the labels' densities, where the slope that is missing is taken to be
    the same; 0: none."""

    policy: bool = True
    """Train a functional also at the densities where its minima seem to be, by its slopes so far."""

    weizsaecker: float = 0.4
    """The share of the von Weizsäcker kinetic energy in what is not learned."""

    penalty: float = 100.0
    """The factor of ∫ρ₋², which holds negative densities down."""

    pairs: bool = True
    """Let the linear terms, which are fitted first, know where an atom's neighbours are."""

    check_grid: int = 3
    """At the end every density is found on PySCF's grid of this level too; if it is no finer than that of training, it
    is not."""

    page: bool = True
    """Draw figures and a page at the end."""

    seed: int = 0
    """Of the initial weights and of what is drawn on the way."""

    threads: int = 1
    """CPU threads; 0 leaves the number to PyTorch."""

    def __post_init__(self) -> None:
        positive(self, "labels", "width", "channels", "at_once")
        not_negative(self, "rounds", "energy_weight", "noise", "weizsaecker", "penalty", "seed", "threads")
        self.training()

    def training(self) -> OrbitalFreeTraining:
        """How its densities are found and measured."""
        return OrbitalFreeTraining(
            molecules=self.molecules,
            hidden=0,
            weizsaecker=self.weizsaecker,
            penalty=self.penalty,
            check_grid=self.check_grid,
            inner_steps=100,
            tail_weight=0.0,
            optimizer="adam",
            page=False,
            seed=self.seed,
            threads=self.threads,
        )


@dataclass(frozen=True, kw_only=True)
class Finetuning:
    """Train a pre-trained density functional further, by the densities of its minima."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")] = Path()
    """The run of 'torchimplicit pretrain'."""

    only: tuple[str, ...] = ()
    """Train on these of its training molecules alone, by their names; without any on all."""

    gradient: EstimatorName = "implicit"
    """How a minimum is differentiated."""

    nudge: float | None = None
    """Of equilibrium propagation; without it, chosen by the least eigenvalue of the Hessian."""

    stepping: Stepping = field(
        default_factory=lambda: Stepping(steps=100, learning_rate=3e-4, measure_every=25, clip=1.0)
    )

    tail_weight: float = 0.0
    """Of ∫(ρ−ρ_gs)²/(ρ_gs+10⁻³)/(2N) in the loss beside ∫(ρ−ρ_gs)²/(2N)."""

    energy_weight: float = 0.0
    """Of the squared error of the energy per electron, in hartree, halved."""

    inner: Literal["l-bfgs", "descent"] = "l-bfgs"
    """How a density is found: by L-BFGS with a kept Hessian, or by gradient descent with momentum."""

    inner_tolerance: float = 1e-6
    """On the projected gradient's norm, in hartree, in coordinates in which lengths are those of densities."""

    inner_steps: int = 100
    """The most steps."""

    inner_rate: float = 3e-3
    """Of descent."""

    correction: int = 0
    """Iterates on the way to the density that are in the loss too, each as if it were the minimum; 0: none."""

    correction_random: bool = False
    """Draw the iterates at random rather than evenly."""

    floor_weight: float = 0.0
    """Of the penalty max(0, 1 − λ/floor)² on the Hessian's least eigenvalue λ."""

    floor: float = 0.5
    """See --floor-weight; in hartree."""

    spectrum: bool = True
    """Measure the Hessians' extreme eigenvalues before and after."""

    check_grid: int = 3
    """At the end every density is found on PySCF's grid of this level too; if it is no finer than that of training, it
    is not."""

    page: bool = True
    """Draw figures and a page at the end."""

    seed: int = 0
    """Of which molecules a step takes."""

    threads: int = 1
    """CPU threads; 0 leaves the number to PyTorch."""

    def __post_init__(self) -> None:
        not_negative(self, "tail_weight", "energy_weight", "seed", "threads")
        self.training(Molecules())

    def training(self, molecules: Molecules) -> OrbitalFreeTraining:
        """How its densities are found, differentiated and measured."""
        return OrbitalFreeTraining(
            molecules=molecules,
            optimizer="adam",
            decay=0.0,
            page=False,
            **{
                name: getattr(self, name)
                for name in (
                    "gradient",
                    "nudge",
                    "tail_weight",
                    "energy_weight",
                    "inner",
                    "inner_tolerance",
                    "inner_steps",
                    "inner_rate",
                    "correction",
                    "correction_random",
                    "floor_weight",
                    "floor",
                    "spectrum",
                    "check_grid",
                    "seed",
                    "threads",
                )
            },
        )


@dataclass(frozen=True, kw_only=True)
class Schooling:
    """A pre-training, and ways to go on from its weights."""

    pretraining: Pretraining = field(default_factory=Pretraining)

    ways: dict[str, Finetuning] = field(default_factory=dict)
    """By the names of their folders; the first one's time is what a longer pre-training is given too."""

    longer: bool = True
    """Also pre-train for as long as pre-training and the first way took together."""


def pretraining() -> Pretraining:
    """Of H2, H2O, NH3 and CH4 with distorted copies."""
    return Pretraining()


def finetuning() -> Finetuning:
    """From a run that is named."""
    return Finetuning()


def schooling() -> Schooling:
    """One run of the table."""
    return Schooling()

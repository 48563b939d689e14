"""Settings for pre-training and fine-tuning density functionals whose network sees the coefficients."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from torchimplicit.recipes.density.settings import ByMinima, Common, Molecules, OrbitalFreeTraining
from torchimplicit.recipes.runtime.settings import not_negative, own_first, positive

Kind = Literal["potential", "functional", "density"]
"""What the network predicts: an external potential from the geometry and the superposition of atoms (the functional
stays convex); an energy of the density; or, for comparison, the density itself without an energy to minimize."""


@dataclass(frozen=True, kw_only=True)
class Stepping:
    """Optimization by AdamW with cosine decay, on batches of molecules."""

    steps: int = 3000
    """Largest number of optimizer steps."""

    seconds: float | None = None
    """Stop after this much CPU time, in seconds. The learning rate's cosine decay is stretched over it."""

    batch: int = 4
    """Molecules per step."""

    learning_rate: float = 3e-3
    """Peak learning rate. It rises from a tenth of this over the first 5 % of the steps."""

    decay: float = 1e-3
    """Weight decay, as in AdamW."""

    clip: float = 5.0
    """Largest norm of a gradient; longer ones are scaled down to it."""

    measure_every: int = 200
    """Optimizer steps between two evaluations on the validation molecules."""

    def __post_init__(self) -> None:
        positive(self, "steps", "seconds", "batch", "learning_rate", "clip", "measure_every")
        not_negative(self, "decay")


@own_first
@dataclass(frozen=True, kw_only=True)
class Pretraining(Common):
    """Train a density functional on densities, energies and slopes of Kohn-Sham calculations, without minimizing it."""

    kind: Kind = "potential"
    """What the network predicts. potential: an external potential, trained on ground states alone. functional: an
    energy of the density, trained on labels. density: the density directly, for comparison."""

    labels: int = 16
    """Labelled densities per training molecule, for --kind functional; see 'torchimplicit molecules --labels'."""

    molecules: Molecules = field(
        default_factory=lambda: Molecules(train_copies=12, validation_copies=2, test_copies=4, distort=0.08)
    )

    stepping: Stepping = field(default_factory=Stepping)

    width: int = 48
    """Features per atom."""

    channels: int = 6
    """Learned combinations of an atom's shells, for each angular momentum l > 0."""

    rounds: int = 2
    """Rounds of message passing between atoms."""

    at_once: int = 4
    """Labels of a molecule in one step."""

    metric: Literal["hessian", "overlap"] = "hessian"
    """Norm in which errors of the slope are measured. hessian: estimated distance of the resulting minimum. overlap:
    the plain norm."""

    energy_weight: float = 1.0
    """Weight of the energy error per electron, in units of 10 mHa, relative to 2·10³ L."""

    noise: float = 3e-3
    """Largest L of random displacements of the labels' densities, at which the missing slope is assumed to be
    unchanged; 0 adds none."""

    policy: bool = True
    """Also train a functional at the densities where its current minima are estimated to be."""

    weizsaecker: float = 0.4
    """Share of the von Weizsäcker kinetic energy in the fixed part of the functional."""

    penalty: float = 100.0
    """Factor of ∫ρ₋² in the energy, which suppresses negative densities."""

    pairs: bool = True
    """Let the linear terms, which are fitted first, depend on the positions of an atom's neighbours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "labels", "width", "channels", "at_once")
        not_negative(self, "rounds", "energy_weight", "noise", "weizsaecker", "penalty")
        self.training()

    def training(self) -> OrbitalFreeTraining:
        """Settings with which densities are found and measured."""
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
            memory=self.memory,
            threads=self.threads,
        )


@own_first
@dataclass(frozen=True, kw_only=True)
class Finetuning(ByMinima):
    """Fine-tune a pre-trained density functional on the densities at its minima."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")] = Path()
    """Directory of a run of 'torchimplicit pretrain'."""

    only: tuple[str, ...] = ()
    """Names of the training molecules to train on. Default: all of them."""

    stepping: Stepping = field(
        default_factory=lambda: Stepping(steps=100, learning_rate=3e-4, measure_every=25, clip=1.0)
    )

    spectrum: bool = True
    """Measure the extreme eigenvalues of the Hessians before and after training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.training(Molecules())

    def training(self, molecules: Molecules) -> OrbitalFreeTraining:
        """Settings with which densities are found, differentiated and measured."""
        shared = {one.name for one in fields(self)} & {one.name for one in fields(OrbitalFreeTraining)} - {"page"}
        return OrbitalFreeTraining(
            molecules=molecules,
            optimizer="adam",
            decay=0.0,
            page=False,
            **{name: getattr(self, name) for name in shared},
        )


@dataclass(frozen=True, kw_only=True)
class Schooling:
    """A pre-training, and several fine-tunings from its weights."""

    pretraining: Pretraining = field(default_factory=Pretraining)

    ways: dict[str, Finetuning] = field(default_factory=dict)
    """The fine-tuning variants, by the names of their folders. The first one's time is also given to a longer
    pre-training."""

    longer: bool = True
    """Also pre-train for as long as pre-training and the first variant took together."""

"""The settings of the graph recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive


@dataclass(frozen=True, kw_only=True)
class MoleculesConfig:
    """Graph classification on one fold of a TU data set."""

    optimization: Optimization
    equilibria: Equilibria = field(default_factory=lambda: _equilibria())
    machine: Machine = field(default_factory=Machine)

    data: Literal["COX2", "PROTEINS"] = "COX2"
    """Which set."""

    data_dir: Path | None = None
    """The folder of its text files, or one above it; without it torch-geometric downloads them."""

    attributes: bool = False
    """Give each node its real-valued attributes beside its label, where the set has them."""

    folds: int = 10
    """Parts of the cross-validation."""

    fold: int = 0
    """The part to test on, counted from 0."""

    fold_seed: int = 42
    """Of the shuffle before the cut into parts."""

    validation_share: float = 0.1
    """Of the graphs outside the tested part: set apart to choose the epoch by."""

    layers: int = 3
    """Implicit layers."""

    width: int = 64
    """Features of a node in each."""

    kappa: float = 0.9
    """Bound of ‖W‖∞ · λ(A), below 1."""

    dropout: float = 0.5
    """In the head."""

    peek: bool = False
    """Also note the test accuracy at every validation. Nothing is chosen by it; published results are its best."""

    def __post_init__(self) -> None:
        positive(self, "layers", "width")
        not_negative(self, "fold", "fold_seed")
        _check_model(self.kappa, self.dropout)
        if self.folds < 2 or self.fold >= self.folds:
            raise UserError(f"--fold {self.fold} must lie below --folds {self.folds}, which must be at least 2")
        if not 0 < self.validation_share < 1:
            raise UserError(f"--validation-share must lie between 0 and 1, and it is {self.validation_share}")


@dataclass(frozen=True, kw_only=True)
class PPIConfig:
    """Node classification on PPI."""

    optimization: Optimization = field(
        default_factory=lambda: Optimization(
            steps=10_000, batch_size=2, learning_rate=0.005, schedule="constant", validate_every=50
        )
    )
    equilibria: Equilibria = field(default_factory=lambda: _equilibria())
    machine: Machine = field(default_factory=Machine)

    data_dir: Path | None = None
    """The folder with train_graph.json and the other files; without it torch-geometric downloads them."""

    widths: tuple[int, ...] = (1024, 512, 512, 256)
    """Of the implicit layers before the last, which gives the scores."""

    kappa: float = 0.98
    """Bound of ‖W‖∞ · λ(A), below 1."""

    def __post_init__(self) -> None:
        _check_model(self.kappa, 0.0)
        if any(width < 1 for width in self.widths):
            raise UserError(f"--widths must be positive, and they are {' '.join(map(str, self.widths))}")


@dataclass(frozen=True, kw_only=True)
class ChainsConfig:
    """Node classification on directed chains, in double precision."""

    optimization: Optimization = field(
        default_factory=lambda: Optimization(
            steps=100,
            batch_size=1,
            learning_rate=0.01,
            weight_decay=5e-4,
            schedule="constant",
            validate_every=10,
        )
    )
    equilibria: Equilibria = field(
        default_factory=lambda: Equilibria(
            solver="fixed-point",
            solver_steps=1000,
            tolerance=1e-14,
            backward_steps=1000,
            backward_tolerance=1e-14,
        )
    )
    machine: Machine = field(default_factory=lambda: Machine(device="cpu"))

    length: int = 100
    """Nodes of a chain."""

    start: Literal["identity", "uniform"] = "identity"
    """Where the recurrent weight begins: a multiple of the identity, or uniform as in the paper."""

    identity_scale: float = 0.8
    """That multiple."""

    width: int = 16
    """Features of a node's state."""

    kappa: float = 0.9
    """Bound of ‖W‖∞ · λ(A), below 1."""

    dropout: float = 0.5
    """In the head."""

    def __post_init__(self) -> None:
        positive(self, "length", "identity_scale", "width")
        _check_model(self.kappa, self.dropout)
        if self.machine.devices > 1:
            raise UserError("--devices: all chains are one graph, which one device solves; take --devices 1")
        if self.machine.precision != "32":
            raise UserError(
                "--precision: chains are solved in double precision, or the end of a long one would be lost to rounding"
            )


def cox2() -> MoleculesConfig:
    """COX2, with the published epochs and rates: 200 passes, the rate halved at the 51st."""
    return MoleculesConfig(data="COX2", optimization=_published(steps_per_pass=4))


def proteins() -> MoleculesConfig:
    """PROTEINS, likewise."""
    return MoleculesConfig(data="PROTEINS", optimization=_published(steps_per_pass=8))


def ppi() -> PPIConfig:
    """PPI."""
    return PPIConfig()


def chains() -> ChainsConfig:
    """Chains of 100 nodes."""
    return ChainsConfig()


def _published(steps_per_pass: int) -> Optimization:
    return Optimization(
        steps=200 * steps_per_pass,
        schedule="milestones",
        milestones=(50 * steps_per_pass,),
        validate_every=steps_per_pass,
    )


def _equilibria() -> Equilibria:
    # the map contracts by construction, so that plain iteration is enough, and the quickest
    return Equilibria(solver="fixed-point", solver_steps=300, backward_steps=300)


def _check_model(kappa: float, dropout: float) -> None:
    if not 0 < kappa < 1:
        raise UserError(f"--kappa must lie between 0 and 1 for the layers to be well-posed, and it is {kappa}")
    if not 0 <= dropout < 1:
        raise UserError(f"--dropout must lie in [0, 1), and it is {dropout}")

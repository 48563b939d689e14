"""The settings that every fit of a field has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Optimization, Trained, positive

FilterKind = Literal["siren", "fourier", "gabor"]
FILTERS: tuple[FilterKind, ...] = ("siren", "fourier", "gabor")

NAMES: dict[tuple[FilterKind, bool], str] = {
    ("siren", True): "iSIREN",
    ("siren", False): "SIREN",
    ("fourier", True): "Fourier-iMFN",
    ("fourier", False): "Fourier-MFN",
    ("gabor", True): "Gabor-iMFN",
    ("gabor", False): "Gabor-MFN",
}
"""Of a filter's implicit representation and of its explicit twin."""


@dataclass(frozen=True, kw_only=True)
class Representation:
    """The function that is fitted, and how much memory a step may take."""

    filter: FilterKind = "fourier"
    """siren: SIREN or iSIREN; fourier, gabor: multiplicative filter networks, or their implicit form."""

    implicit: bool = True
    """The fixed point of the cell. Otherwise its explicit twin of as many parameters, which applies the cell once."""

    width: int = 128
    """Of the state and the layers."""

    depth: int = 1
    """Layers of the cell."""

    frequencies: float | None = None
    """The scale of the frequencies; by default the recipe's, which grows with the signal's resolution."""

    window_alpha: float = 3.0
    """Of the Gabor filters' windows: a larger one makes them narrower."""

    amortize: Literal["refresh", "solve", "off"] = "refresh"
    """In training: carry the last state along by one evaluation a step; or solve from it; or solve from zero."""

    memory_mb: int = 1024
    """What the states, filters and gradients of a training step may take. Points beyond it go through in chunks, whose
    gradients are added up: the step stays the same."""

    def __post_init__(self) -> None:
        positive(self, "width", "depth", "frequencies", "window_alpha", "memory_mb")


class FieldSettings(Trained, Protocol):
    """The config of a recipe that fits a field."""

    @property
    def representation(self) -> Representation:
        """What is fitted."""


def truncated(terms: int = 2) -> Equilibria:
    """How amortized equilibria are trained (Huang et al. 2021): one evaluation a step from the last state, and the
    Neumann series after ``terms`` of its terms; 2 are one product with the Jacobian."""
    return Equilibria(
        solver="anderson",
        solver_steps=60,
        tolerance=1e-3,
        gradient="neumann-phantom",
        phantom_steps=terms,
        phantom_damping=1.0,
        backward_tolerance=1e-3,
        backward_steps=60,
    )


def full_batch(steps: int, validate_every: int, learning_rate: float = 1e-3) -> Optimization:
    """All points in every step, by Adam at a constant rate, as the paper trains."""
    return Optimization(
        steps=steps,
        batch_size=1 << 22,
        optimizer="adam",
        learning_rate=learning_rate,
        schedule="constant",
        validate_every=validate_every,
    )


def check_fit(config: FieldSettings) -> None:
    """Raise where settings of several groups do not go together."""
    chosen = config.representation
    if not chosen.implicit:
        return
    name = config.equilibria.gradient
    if chosen.amortize == "refresh" and name in ("unrolled-phantom", "unrolled"):
        raise UserError(
            f"--gradient {name} differentiates steps of a solve, and --amortize refresh takes none; use --amortize "
            "solve, or --gradient neumann-phantom"
        )
    if chosen.amortize != "off" and name == "unrolled":
        raise UserError("--gradient unrolled differentiates the steps of a solve from zero; add --amortize off")


def check_slopes(config: FieldSettings) -> None:
    """Raise where the settings cannot train by a loss that holds derivatives of the field: the weights' gradient is a
    second derivative then, which estimators of the adjoint do not have, nor states that were carried along."""
    chosen = config.representation
    if not chosen.implicit:
        return
    if config.equilibria.gradient not in ("implicit", "unrolled"):
        raise UserError(
            f"--gradient {config.equilibria.gradient} has no exact second derivative, and the loss holds slopes of the "
            "field; use --gradient implicit"
        )
    if chosen.amortize == "refresh":
        raise UserError(
            "--amortize refresh has no second derivative, and the loss holds slopes of the field; use --amortize solve"
        )

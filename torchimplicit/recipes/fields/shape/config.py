"""The settings of the recipes that fit shapes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torchimplicit.recipes.fields.settings import Representation, truncated
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Equilibria, Machine, Optimization, not_negative, positive

LARGEST_GRID = 1024


LONGEST = 1.8
"""The mesh's longest side in the field's coordinates."""


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """A field fitted to a mesh."""

    file: Path | None = None
    """Your own mesh: OBJ, PLY, STL or OFF."""

    shape: Literal["knot", "gyroid"] = "knot"
    """Where --file is not given: a tube around a torus knot, or a ball of gyroid walls."""

    most_faces: int = 1_000_000
    """A file of more faces is refused."""

    task: Literal["occupancy", "sdf"] = "occupancy"
    """occupancy: the field is the logit of being inside. sdf: it is the signed distance, trained with its slopes, which
    takes exact second derivatives: --gradient neumann-phantom and --amortize refresh, with which occupancy begins,
    become implicit and solve."""

    supervision: Literal["distance", "surface"] = "distance"
    """Of sdf. distance: the mesh's distances are given. surface: only points on it and their normals."""

    distance_weight: float = 10.0
    """Of sdf's misfit of values."""

    normal_weight: float = 1.0
    """Of sdf's misfit of normals on the surface."""

    eikonal_weight: float = 0.1
    """Of sdf's slopes whose length is not 1."""

    samples: int = 60_000
    """Points to train on: half of them near the surface, half anywhere."""

    held_out_samples: int = 20_000
    """Points to validate on, and as many to test on."""

    sample_seed: int = 0
    """Which points are drawn."""

    resolution: int = 96
    """Grid points of the longest side, for the surface by marching cubes."""

    up: Literal["y", "z"] = "y"
    """The mesh's axis that points up in the pictures."""

    representation: Representation = field(default_factory=Representation)
    optimization: Optimization = field(default_factory=Optimization)
    equilibria: Equilibria = field(default_factory=Equilibria)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        positive(self, "most_faces", "distance_weight", "samples", "held_out_samples", "resolution")
        not_negative(self, "normal_weight", "eikonal_weight", "sample_seed")
        check_grid("--resolution", self.resolution)
        if min(self.samples, self.held_out_samples) < 100:
            raise UserError("--samples and --held-out-samples must be 100 at least")
        if self.task == "sdf":
            self._become_exact()

    def _become_exact(self) -> None:
        """What occupancy begins with has no second derivative."""
        solve, chosen = self.equilibria, self.representation
        if solve == truncated():
            object.__setattr__(self, "equilibria", exact())
        elif solve.gradient == truncated().gradient:
            object.__setattr__(self, "equilibria", replace(solve, gradient="implicit"))
        if chosen.amortize == "refresh":
            object.__setattr__(self, "representation", replace(chosen, amortize="solve"))


def check_grid(option: str, longest: int) -> None:
    """Raise where a grid is too coarse for a surface, or not practical."""
    if not 8 <= longest <= LARGEST_GRID:
        raise UserError(f"{option} {longest} must lie between 8 and {LARGEST_GRID}")


def exact() -> Equilibria:
    """How equilibria are trained whose slopes are in the loss."""
    return Equilibria(
        solver="anderson",
        solver_steps=60,
        tolerance=1e-4,
        gradient="implicit",
        backward_tolerance=1e-3,
        backward_steps=60,
    )


def adam(steps: int, validate_every: int, learning_rate: float = 3e-3) -> Optimization:
    """Part of the points in every step."""
    return Optimization(
        steps=steps,
        batch_size=6000,
        optimizer="adam",
        learning_rate=learning_rate,
        schedule="cosine",
        validate_every=validate_every,
    )


def shape() -> ShapeConfig:
    """A shape of 60 000 points, some minutes on one core. The paper's occupancy: --samples 500000 --batch-size 50000
    --width 256 --steps 10000 --learning-rate 5e-4 --frequencies 256."""
    return ShapeConfig(optimization=adam(1000, 100), equilibria=truncated())

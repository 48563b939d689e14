"""How a molecule is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import positive

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

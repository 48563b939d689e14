"""Using a trained functional: the files that a run leaves for it, and the density of a molecule."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchimplicit.models.orbital_free import Domain, Molecule, OrbitalFree, OrbitalFreeConfig
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.chemistry import Geometry, symbol
from torchimplicit.recipes.density.compute import unsolved
from torchimplicit.recipes.density.forces import forces
from torchimplicit.recipes.density.integrals import need_pyscf
from torchimplicit.recipes.density.record import Record
from torchimplicit.recipes.density.settings import ChemistrySettings, OrbitalFreeTraining
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.fitting import read_checkpoint
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.settings import from_plain, to_plain
from torchimplicit.solution import Status

# -- A trained functional as a file: all that it takes to use it ------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A trained functional.

    Attributes:
        functional: with its elements' constants fitted to the training molecules' energies.
        domain: domain of the training molecules.
        chemistry: how they were computed.
    """

    functional: OrbitalFree
    domain: Domain
    chemistry: ChemistrySettings

    def save(self, run: Run) -> None:
        """Save into a run, as ``checkpoints/functional.ckpt``."""
        held = {
            "config": asdict(self.functional.config),
            "weights": self.functional.state_dict(),
            "domain": self.domain.state(),
            "chemistry": to_plain(self.chemistry),
        }
        files.save(held, _place(run))

    @staticmethod
    def there(run: Run) -> bool:
        """Return whether a run has saved one."""
        return _place(run).is_file()

    @classmethod
    def of(cls, run: Run | Path | str) -> Trained:
        """The functional that a run of an ``ofdft`` recipe saved.

        Raises:
            UserError: it has left none.
        """
        run = run if isinstance(run, Run) else Run(Path(run))
        run.read()  # which says what is wrong with the directory
        if not cls.there(run):
            raise UserError(
                f"{run} has no finished density functional: 'resume' an ofdft run that was stopped, and 'evaluate' "
                "one that an earlier version has trained"
            )
        held = read_checkpoint(_place(run))
        functional = OrbitalFree(from_plain(OrbitalFreeConfig, held["config"]))
        functional.load_state_dict(held["weights"])
        functional.requires_grad_(False)
        return cls(functional, Domain(**held["domain"]), from_plain(ChemistrySettings, held["chemistry"]))


def _place(run: Run) -> Path:
    return run.path / "checkpoints" / "functional.ckpt"


# -- A molecule's density by it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Density:
    """The density of least energy and quantities derived from it, in atomic units.

    Attributes:
        record: record of the molecule, without a Kohn-Sham calculation.
        coefficients: coefficients of the density, ``[n]``.
        energy: in hartree.
        parts: its terms by name. ``kinetic`` is that of Thomas, Fermi and von Weizsäcker with the learned factor; what
            it lacks of the non-interacting kinetic energy is in ``reference`` (the linear terms), ``network`` and
            ``constants``, which are learned.
        dipole: x, y and z, in atomic units (2.5417 debye), about the centre of the nuclei's charge.
        forces: on the nuclei, ``[atoms, 3]``, in hartree per bohr; ``None`` where they were not asked for.
        status: status of the minimization.
        steps: steps of the minimization.
        least: least eigenvalue of the Hessian on the constraint, in hartree, in the metric's coordinates.
        strangest: the atom that is least like those of training, from 0 on.
        distance: how far its surroundings are from the nearest there; see
            :class:`~torchimplicit.models.orbital_free.Domain`.
        limit: beyond which the functional is used outside what it was trained for.
        seconds: wall-clock time in seconds, for the integrals and the minimization.
    """

    record: Record
    coefficients: Tensor
    energy: float
    parts: Mapping[str, float]
    dipole: tuple[float, float, float]
    forces: Tensor | None
    status: Status
    steps: int
    least: float
    strangest: int
    distance: float
    limit: float
    seconds: float

    @property
    def strange(self) -> bool:
        """Return whether the molecule is outside what the functional was trained for."""
        return self.distance > self.limit + 1e-6  # a molecule that is turned is the same but for rounding

    @property
    def warning(self) -> str:
        """Reasons to doubt the density; empty if there are none."""
        geometry, warnings = self.record.geometry, []
        if self.status is not Status.CONVERGED:
            warnings.append(
                f"the minimization stopped with {self.status.name} after {self.steps} steps: the energy is not the "
                "least, and the forces are not its slopes"
            )
        if geometry.charge:
            warnings.append(f"{geometry.name} has the charge {geometry.charge:+d}, and training molecules have none")
        if self.strange:
            warnings.append(
                f"atom {self.strangest + 1} ({symbol(geometry.charges[self.strangest])}) of {geometry.name} has "
                f"surroundings unlike any in training: distance {self.distance:.2f}, and nine in ten of the training "
                f"molecules are within {self.limit:.2f} of the others; errors beyond it grow to hartrees"
            )
        if self.least < 0:
            warnings.append(
                f"the density is no minimum: the Hessian has an eigenvalue of {self.least:.3g} hartree, and the "
                "functional has a lower energy beside it, which a search does not find where the molecule's symmetry "
                "hides the way"
            )
        return "; ".join(warnings)


def density(trained: Trained, geometry: Geometry, *, grid: int | None = None, slopes: bool = True) -> Density:
    """The density that a trained functional gives a molecule.

    Args:
        trained: see :meth:`Trained.of`.
        geometry: the molecule.
        grid: level of PySCF's grid; ``None``: that of training.
        slopes: give the forces too.

    Raises:
        UserError: an element that training lacked; PySCF, which computes the integrals, is missing.
        NotComputedError: PySCF fails.
    """
    need_pyscf()
    known = set(trained.domain.elements.tolist())
    if lacking := sorted({*geometry.charges} - known):
        raise UserError(
            f"{geometry.name} has {', '.join(map(symbol, lacking))}, and this functional was trained on molecules of "
            f"{', '.join(map(symbol, sorted(known)))} alone: its density and energy would be wrong by hartrees; train "
            "one on molecules that have it"
        )
    began = time.monotonic()
    chemistry = trained.chemistry if grid is None else replace(trained.chemistry, grid=grid)
    record = unsolved(geometry, chemistry)
    molecule = record.molecule()
    case = Case.of(molecule)
    solution = case.solved(trained.functional, OrbitalFreeTraining(), cold=True)
    p = solution.value.detach()
    seconds = time.monotonic() - began
    away = trained.domain.distances(molecule)
    with torch.no_grad():
        parts = {name: float(part) for name, part in trained.functional.parts(p, molecule).items()}
    return Density(
        record=record,
        coefficients=p,
        energy=math.fsum(parts.values()),
        parts=parts,
        dipole=_dipole(p, molecule),
        forces=forces(trained.functional, p, record) if slopes else None,
        status=Status(int(solution.status)),
        steps=int(solution.steps),
        least=float(torch.linalg.eigvalsh(case.curvature(trained.functional, p))[0]),
        strangest=int(away.argmax()),
        distance=float(away.max()),
        limit=trained.domain.limit,
        seconds=seconds,
    )


def _dipole(p: Tensor, molecule: Molecule) -> tuple[float, float, float]:
    """Dipole moment about the centre of the nuclei's charge, to which they then contribute nothing. That of an ion
    depends on the place; that of a neutral molecule does not, but for what the grid gets wrong of its electrons."""
    charges = molecule.charges.to(p)
    centre = charges @ molecule.positions / charges.sum()
    x, y, z = (-(molecule.quadrature * molecule.density(p)) @ (molecule.points - centre)).tolist()
    return x, y, z


def told(result: Density) -> dict[str, Any]:
    """The result as plain values, for a JSON file."""
    geometry = result.record.geometry
    return {
        "molecule": geometry.name,
        "elements": [symbol(charge) for charge in geometry.charges],
        "positions_bohr": geometry.positions,
        "charge": geometry.charge,
        "energy_hartree": result.energy,
        "parts_hartree": dict(result.parts),
        "dipole_au": result.dipole,
        "forces_hartree_per_bohr": None if result.forces is None else result.forces.tolist(),
        "status": result.status.name,
        "steps": result.steps,
        "least_eigenvalue_hartree": result.least,
        "warning": result.warning,
        "domain": {"distance": result.distance, "limit": result.limit, "strange": result.strange},
        "grid": result.record.settings.grid,
        "basis_functions": len(result.coefficients),
        "coefficients": result.coefficients.tolist(),
        "seconds": result.seconds,
    }

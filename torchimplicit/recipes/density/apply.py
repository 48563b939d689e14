"""``torchimplicit density``: density and energy of a molecule from a trained functional."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.chemistry import Geometry, symbol
from torchimplicit.recipes.density.compute import NotComputedError, compute, kohn_sham, superposition
from torchimplicit.recipes.density.guess import density_matrix
from torchimplicit.recipes.density.integrals import made
from torchimplicit.recipes.density.places import line, plane
from torchimplicit.recipes.density.predict import Density, Trained, density, told
from torchimplicit.recipes.density.sources import gathered
from torchimplicit.recipes.runtime import files
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.page import axes, save_figure, styled
from torchimplicit.recipes.runtime.settings import positive
from torchimplicit.solution import Status

DEBYE = 2.541746
"""Debye per atomic unit of dipole moment."""

SPACING, MARGIN = 0.2, 4.0
"""Spacing of a cube file's grid, and its margin beyond the outermost atoms, both in bohr."""


@dataclass(frozen=True)
class Apply:
    """Find a molecule's density with a trained functional: energy, dipole, forces, a cube file and a picture.

    Exit codes: 0, found; 1, a minimization did not converge or PySCF failed; 2, bad input.
    """

    run_path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The directory of a finished run of an ofdft recipe."""

    molecules: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(name="molecules", metavar="MOLECULE [MOLECULE ...]")
    ]
    """Names (H2O, CH4, ...), .xyz files, folders or tar archives of them."""

    charge: int = 0
    """Charge of every molecule, in elementary charges."""

    output: Path = Path("densities")
    """Folder for the results: NAME.json, NAME.cube and NAME.png."""

    grid: int | None = None
    """Level of PySCF's integration grid, 0 (coarse) to 9. Default: the level used in training."""

    forces: bool = True
    """Compute the forces on the nuclei."""

    cube: bool = True
    """Write the density as a Gaussian cube file."""

    compare: bool = False
    """Also run the Kohn-Sham calculation and report the differences."""

    scf_guess: bool = False
    """Start a Kohn-Sham calculation from the density, and compare its number of iterations with a start from PySCF's
    MINAO guess."""

    limit: int | None = None
    """Take at most this many molecules from each folder or archive."""

    allow_large: bool = False
    """Also accept molecules with so many atoms that they are refused by default."""

    def run(self, console: Console) -> int:
        positive(self, "limit")
        if not self.molecules:
            raise UserError("density needs at least one molecule, such as H2O, water.xyz or a folder of xyz files")
        trained = Trained.of(self.run_path)
        geometries, refused = gathered(
            self.molecules, charge=self.charge, limit=self.limit, allow_large=self.allow_large
        )
        for one in refused:
            console.print(f"Refused: {one.name}: {one.reason}", highlight=False, soft_wrap=True)
        with files.writing(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
        failed = len(refused)
        for geometry in geometries:
            try:
                failed += not self._found(trained, geometry, console)
            except (UserError, NotComputedError) as error:
                if len(geometries) == 1 and isinstance(error, UserError):
                    raise
                failed += 1
                console.print(f"[bold]{geometry.name}[/bold]: {error}", highlight=False, soft_wrap=True)
        if failed < len(geometries) + len(refused):
            console.print(f"Written to {self.output}", highlight=False, soft_wrap=True)
        return int(failed > 0)

    def _found(self, trained: Trained, geometry: Geometry, console: Console) -> bool:
        """Find a density, report it and write it; return whether it was found."""

        def say(line: str) -> None:
            console.print(line, highlight=False, soft_wrap=True)

        with console.status(f"Minimizing the energy of {geometry.name}"):
            result = density(trained, geometry, grid=self.grid, slopes=self.forces)
        plain, dipole = told(result), sum(x * x for x in result.dipole) ** 0.5 * DEBYE
        say(
            f"[bold]{geometry.name}[/bold]: {result.energy:.5f} hartree, dipole {dipole:.3f} debye; "
            f"{result.status.name} in {result.steps} steps, {result.seconds:.1f} s"
        )
        for warning in filter(None, (geometry.doubt, result.warning)):
            say(f"  [yellow]Warning[/yellow]: {warning}")
        if self.compare:
            with console.status(f"Kohn-Sham calculation of {geometry.name}"):
                plain["kohn_sham"] = beside = compared(result)
            energy, dipole = 1e3 * beside["energy_error_hartree"], beside["dipole_error_au"] * DEBYE
            say(
                f"  beside Kohn-Sham ({beside['seconds']:.1f} s): energy {energy:+.2f} mHa, dipole {dipole:.3f} debye "
                f"off, L {1e3 * beside['loss']:.3f}e-3 (MINAO {1e3 * beside['minao_loss']:.3f}e-3), L1 per electron "
                f"{beside['l1']:.4f} (MINAO {beside['minao_l1']:.4f})"
            )
        if self.scf_guess:
            with console.status(f"Kohn-Sham calculations of {geometry.name}"):
                plain["scf_guess"] = cycles = saved(result)
            say(f"  Kohn-Sham iterations from this density {cycles['density']}, from MINAO {cycles['minao']}")
        files.write_json(self.output / f"{geometry.name}.json", plain)
        if self.cube:
            files.write_text(self.output / f"{geometry.name}.cube", cube_file(result))
        with styled():
            save_figure(picture(result), self.output / f"{geometry.name}.png", 130)
        return result.status is Status.CONVERGED


def compared(result: Density) -> dict[str, float]:
    """Differences to the Kohn-Sham calculation of the molecule, with the settings of training."""
    began = time.monotonic()
    exact = compute(result.record.geometry, result.record.settings)
    seconds = time.monotonic() - began
    case = Case.of(exact.molecule())
    dipole = [float(x) for x in _moment(result.coefficients - exact.reference, exact.molecule())]
    return {
        "energy_error_hartree": result.energy - exact.energy,
        "loss": float(case.loss(result.coefficients)),
        "l1": float(case.l1(result.coefficients)),
        "minao_loss": float(case.loss(exact.guess)),
        "minao_l1": float(case.l1(exact.guess)),
        "dipole_error_au": sum(x * x for x in dipole) ** 0.5,
        "seconds": seconds,
    }


def _moment(p: torch.Tensor, molecule: Any) -> torch.Tensor:
    moment: torch.Tensor = (molecule.quadrature * molecule.density(p)) @ molecule.points
    return moment


def saved(result: Density) -> dict[str, int]:
    """Numbers of Kohn-Sham iterations from the density, and from the superposition of atoms."""
    settings = result.record.settings
    mol = made(result.record.geometry, settings.orbital_basis)
    starts = {"density": density_matrix(result.coefficients, result.record), "minao": superposition(mol)}
    return {name: int(kohn_sham(mol, settings, start).cycles) for name, start in starts.items()}


def cube_file(result: Density) -> str:
    """The density in Gaussian's format: a box of points, electrons per cubic bohr."""
    record = result.record
    positions = record.basis.centres
    low, high = positions.amin(dim=0) - MARGIN, positions.amax(dim=0) + MARGIN
    counts = [int(n) for n in ((high - low) / SPACING).ceil() + 1]
    axis = [low[i] + SPACING * torch.arange(n, dtype=low.dtype) for i, n in enumerate(counts)]
    lines = [f"{record.geometry.name}: electron density by torchimplicit", "electrons per cubic bohr"]
    lines.append(f"{len(positions):5d}" + "".join(f"{float(x):12.6f}" for x in low))
    for i, n in enumerate(counts):
        lines.append(f"{n:5d}" + "".join(f"{SPACING if i == k else 0.0:12.6f}" for k in range(3)))
    for charge, place in zip(record.geometry.charges, positions.tolist(), strict=True):
        lines.append(f"{charge:5d}{float(charge):12.6f}" + "".join(f"{x:12.6f}" for x in place))
    for x in axis[0]:  # a plane at a time: the basis of the whole box would not fit
        y, z = torch.meshgrid(axis[1], axis[2], indexing="ij")
        points = torch.stack((x.expand_as(y), y, z), dim=-1).reshape(-1, 3)
        for row in (record.basis.values(points) @ result.coefficients).reshape(counts[1], counts[2]).tolist():
            lines += ["".join(f"{v:13.5E}" for v in row[start : start + 6]) for start in range(0, len(row), 6)]
    return "\n".join(lines) + "\n"


def picture(result: Density) -> Figure:
    """The density on the plane of three atoms, or along the axis of an atom."""
    geometry, basis = result.record.geometry, result.record.basis
    if len(geometry.charges) == 1:
        figure, (panel,) = axes(width=5.2)
        points, places, _ = line(basis.centres)
        panel.plot(places, basis.values(points) @ result.coefficients, linewidth=1.4)
        panel.set(xlabel="bohr", ylabel="electrons per cubic bohr", yscale="log", title=geometry.name)
        return figure
    figure, (panel,) = axes(width=5.6, height=4.6)
    points, (x, y), atoms = plane(basis.centres, count=161)
    values = (basis.values(points) @ result.coefficients).reshape(len(y), len(x)).clamp_min(1e-6).log10()
    levels = torch.arange(-4.0, 2.01, 0.25).tolist()
    image = panel.contourf(x, y, values, levels=levels, cmap="viridis", extend="both")
    panel.contour(x, y, values, levels=levels[::4], colors="white", linewidths=0.5)
    for place, charge in zip(atoms.tolist(), geometry.charges, strict=True):
        panel.annotate(symbol(charge), place, color="white", ha="center", va="center", fontsize=9, weight="bold")
    if result.forces is not None:
        _arrows(panel, result, atoms)
    figure.colorbar(image, ax=panel, label="log₁₀ of the density, electrons per cubic bohr")
    panel.set(xlabel="bohr", ylabel="bohr", aspect="equal", title=f"{geometry.name}: {result.energy:.4f} hartree")
    panel.grid(False)
    return figure


def _arrows(panel: Any, result: Density, atoms: torch.Tensor) -> None:
    """Draw the forces' components in the plane; the longest arrow is 1.5 bohr."""
    assert result.forces is not None
    centres = result.record.basis.centres
    frame = torch.linalg.lstsq(centres - centres[0], atoms - atoms[0]).solution  # space to plane
    arrows = result.forces @ frame
    longest = float(arrows.norm(dim=1).max())
    if longest > 1e-4:
        x, y = (1.5 / longest * arrows).T
        panel.quiver(*atoms.T, x, y, color="#ff7f50", angles="xy", scale_units="xy", scale=1, width=0.008)

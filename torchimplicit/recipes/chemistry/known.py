"""Small closed-shell molecules by name, at their experimental bond lengths and angles."""

from __future__ import annotations

import difflib
import math

from torchimplicit.recipes.chemistry.geometry import Geometry, from_angstrom
from torchimplicit.recipes.runtime.errors import UserError

Atom = tuple[str, tuple[float, float, float]]


def _diatomic(first: str, second: str, length: float) -> list[Atom]:
    return [(first, (0.0, 0.0, 0.0)), (second, (0.0, 0.0, length))]


def _linear(*chain: tuple[str, float]) -> list[Atom]:
    """Along z; every atom with its distance from the one before."""
    atoms, z = [], 0.0
    for element, step in chain:
        z += step
        atoms.append((element, (0.0, 0.0, z)))
    return atoms


def _bent(centre: str, ligand: str, length: float, angle: float) -> list[Atom]:
    half = math.radians(angle) / 2
    x, y = length * math.sin(half), length * math.cos(half)
    return [(centre, (0.0, 0.0, 0.0)), (ligand, (x, y, 0.0)), (ligand, (-x, y, 0.0))]


def _pyramid(centre: str, ligand: str, length: float, angle: float) -> list[Atom]:
    """Three ligands round the z axis, with ``angle`` between the bonds of any two."""
    radius = 2 * length * math.sin(math.radians(angle) / 2) / math.sqrt(3)
    height = math.sqrt(length**2 - radius**2)
    turns = [2 * math.pi * k / 3 for k in range(3)]
    return [
        (centre, (0.0, 0.0, 0.0)),
        *((ligand, (radius * math.cos(t), radius * math.sin(t), -height)) for t in turns),
    ]


def _tetrahedron(centre: str, ligand: str, length: float) -> list[Atom]:
    c = length / math.sqrt(3)
    corners = ((c, c, c), (-c, -c, c), (-c, c, -c), (c, -c, -c))
    return [(centre, (0.0, 0.0, 0.0)), *((ligand, corner) for corner in corners)]


def _ethene(double: float, single: float, angle: float) -> list[Atom]:
    """C2H4; ``angle`` is between the double bond and a bond to hydrogen."""
    z, x = double / 2, single * math.sin(math.radians(angle))
    outer = z - single * math.cos(math.radians(angle))
    hydrogens = [("H", (sx * x, 0.0, sz * outer)) for sz in (1, -1) for sx in (1, -1)]
    return [("C", (0.0, 0.0, z)), ("C", (0.0, 0.0, -z)), *hydrogens]


def _methanal(double: float, single: float, angle: float) -> list[Atom]:
    """H2CO; ``angle`` is between the two bonds to hydrogen."""
    half = math.radians(angle) / 2
    x, z = single * math.sin(half), -single * math.cos(half)
    return [("C", (0.0, 0.0, 0.0)), ("O", (0.0, 0.0, double)), ("H", (x, 0.0, z)), ("H", (-x, 0.0, z))]


# Diatomic molecules: Huber and Herzberg, Constants of Diatomic Molecules (1979); the others: Herzberg, Electronic
# Spectra of Polyatomic Molecules (1966). Rounded to what the measurements of either kind agree on.
ATOMS: dict[str, list[Atom]] = {
    "He": [("He", (0.0, 0.0, 0.0))],
    "H2": _diatomic("H", "H", 0.7414),
    "LiH": _diatomic("Li", "H", 1.5957),
    "HF": _diatomic("H", "F", 0.9168),
    "N2": _diatomic("N", "N", 1.0977),
    "CO": _diatomic("C", "O", 1.1283),
    "F2": _diatomic("F", "F", 1.4119),
    "HCl": _diatomic("H", "Cl", 1.2746),
    "H2O": _bent("O", "H", 0.9572, 104.52),
    "H2S": _bent("S", "H", 1.336, 92.1),
    "NH3": _pyramid("N", "H", 1.012, 106.7),
    "CH4": _tetrahedron("C", "H", 1.087),
    "HCN": _linear(("H", 0.0), ("C", 1.064), ("N", 1.156)),
    "CO2": _linear(("O", 0.0), ("C", 1.160), ("O", 1.160)),
    "C2H2": _linear(("H", 0.0), ("C", 1.060), ("C", 1.203), ("H", 1.060)),
    "C2H4": _ethene(1.339, 1.086, 121.2),
    "H2CO": _methanal(1.208, 1.116, 116.5),
}


def named(name: str, charge: int = 0, electrons: int | None = None) -> Geometry:
    """A molecule by its formula, such as ``H2O``.

    Raises:
        UserError: it is not among those that are known, or it is refused with this charge.
    """
    if name not in ATOMS:
        close = difflib.get_close_matches(name.upper(), [known.upper() for known in ATOMS], n=1, cutoff=0.99)
        meant = [f"; did you mean '{known}'?" for known in ATOMS if known.upper() in close]
        raise UserError(
            f"there is no molecule or file '{name}'{''.join(meant)}; the molecules known by name are "
            f"{', '.join(ATOMS)}; any other comes from an .xyz file, a folder or an archive of them"
        )
    return from_angstrom(name, ATOMS[name], charge, electrons)

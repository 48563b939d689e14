"""Molecules before any calculation: elements, geometries, and small molecules by name."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np

from torchimplicit.recipes.runtime.errors import UserError

# -- The periodic table: symbols and nuclear charges -------------------------------------------------------------------


_PERIODS = """
H He
Li Be B C N O F Ne
Na Mg Al Si P S Cl Ar
K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr
Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe
Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn
Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og
"""

SYMBOLS = tuple(_PERIODS.split())
"""Chemical symbols in the order of their nuclear charges, from 1."""

CHARGES = {symbol: charge for charge, symbol in enumerate(SYMBOLS, start=1)}
"""Nuclear charge by symbol."""

HEAVIEST = CHARGES["Kr"]
"""The heaviest element accepted. Beyond it the usual orbital bases replace the inner electrons by an effective core
potential: the density would lack these electrons, and the nuclei would not be point charges."""


def symbol(charge: int) -> str:
    """The element with this nuclear charge."""
    return SYMBOLS[charge - 1]


# -- Where a molecule's nuclei are, and how many electrons it has ------------------------------------------------------


BOHR = 0.529177210903
"""One bohr in angstrom (CODATA 2018)."""

TOO_CLOSE = 0.4
"""Least distance of two atoms, in angstrom. The shortest bond, that of H2, has 0.74."""

_RADII = """
0.31 0.28
1.28 0.96 0.84 0.76 0.71 0.66 0.57 0.58
1.66 1.41 1.21 1.11 1.07 1.05 1.02 1.06
2.03 1.76 1.70 1.60 1.53 1.39 1.39 1.32 1.26 1.24 1.32 1.22 1.22 1.20 1.19 1.20 1.20 1.16
"""

RADII = (0.0, *map(float, _RADII.split()))
"""Covalent radii in angstrom by nuclear charge, up to krypton (Cordero et al., Dalton Trans. 2008, 2832)."""

STRETCHED = (1.4, 2.4)
"""Distances of neighbours over the sum of their radii where a bond is long for angstrom, and usual if the positions are
in bohr: 1.89 times as much."""

MANY_ATOMS = 40
"""Molecules with more atoms are refused unless explicitly allowed: matrices grow with the square, grid and time with
the cube."""


@final
@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A closed-shell molecule before any calculation.

    Attributes:
        name: what it is called in files, tables and errors.
        charges: nuclear charges.
        positions: positions of the nuclei, x, y, z of each, in bohr.
        charge: charge of the molecule as a whole, in elementary charges.

    Raises:
        UserError: no atoms; an element that is not known or is heavier than krypton; a position that is not finite;
            atoms closer than :data:`TOO_CLOSE`; no electrons, or an odd number of them.
    """

    name: str
    charges: tuple[int, ...]
    positions: tuple[tuple[float, float, float], ...]
    charge: int = 0

    def __post_init__(self) -> None:
        if not self.charges:
            raise UserError(f"{self.name} has no atoms")
        if len(self.charges) != len(self.positions):
            raise UserError(f"{self.name} has {len(self.charges)} elements and {len(self.positions)} positions")
        self._check_elements()
        self._check_positions()
        who = f"{self.name} with charge {self.charge:+d}" if self.charge else self.name
        if self.electrons < 1:
            raise UserError(f"{who} has no electrons left: no density to speak of")
        if self.electrons % 2:
            raise UserError(
                f"{who} has {self.electrons} electrons, an odd number: a radical has an open shell, and only closed "
                "shells are supported; an ion needs its --charge"
            )

    @property
    def electrons(self) -> int:
        """Number of electrons: the sum of nuclear charges minus the molecule's charge."""
        return sum(self.charges) - self.charge

    @property
    def formula(self) -> str:
        """Chemical formula in Hill's order: carbon, hydrogen, then alphabetically."""
        counts = Counter(map(symbol, self.charges))
        first = [s for s in ("C", "H") if s in counts] if "C" in counts else []
        order = [*first, *sorted(set(counts) - set(first))]
        return "".join(s + (str(counts[s]) if counts[s] > 1 else "") for s in order)

    @property
    def doubt(self) -> str:
        """What is odd about the positions, which are computed all the same; empty if nothing is."""
        if len(self.charges) < 2:
            return ""
        places, radii = np.array(self.positions) * BOHR, np.array([RADII[charge] for charge in self.charges])
        apart = np.linalg.norm(places[:, None] - places, axis=-1) / (radii[:, None] + radii)
        np.fill_diagonal(apart, math.inf)
        nearest = apart.min(axis=1)
        if not (STRETCHED[0] < nearest).all() or not (nearest < STRETCHED[1]).all():
            return ""
        return (
            f"every bond of {self.name} is at least {nearest.min():.1f} times as long as usual: positions must be in "
            "angstrom, and these look like bohr"
        )

    def _check_elements(self) -> None:
        for number, charge in enumerate(self.charges, start=1):
            if not 1 <= charge <= len(SYMBOLS):
                raise UserError(f"{self.name}: atom {number} has the nuclear charge {charge}, and no element has")
            if charge > HEAVIEST:
                raise UserError(
                    f"{self.name}: atom {number} is {symbol(charge)}; elements beyond {symbol(HEAVIEST)} are not "
                    "supported, because their bases leave out the inner electrons"
                )

    def _check_positions(self) -> None:
        places = np.array(self.positions, dtype=float).reshape(-1, 3)
        for number, place in enumerate(places, start=1):
            if not np.isfinite(place).all():
                raise UserError(f"{self.name}: the position of atom {number} is not finite ({place.tolist()})")
        distance = np.linalg.norm(places[:, None] - places[None], axis=-1) * BOHR
        distance[np.tril_indices(len(places))] = math.inf
        a, b = divmod(int(distance.argmin()), len(places))
        if distance[a, b] < TOO_CLOSE:
            raise UserError(
                f"{self.name}: atoms {a + 1} ({symbol(self.charges[a])}) and {b + 1} ({symbol(self.charges[b])}) are "
                f"{distance[a, b]:.3f} angstrom apart, and overlap below {TOO_CLOSE}; positions must be in angstrom"
            )


def from_angstrom(
    name: str, atoms: Iterable[tuple[str, Sequence[float]]], charge: int = 0, electrons: int | None = None
) -> Geometry:
    """A geometry from symbols and positions in angstrom.

    Args:
        name: see :class:`Geometry`.
        atoms: symbol and position of each.
        charge: see :class:`Geometry`.
        electrons: how many the caller expects; ``None``: whatever follows from the charge.

    Raises:
        UserError: an unknown symbol, ``electrons`` that do not fit, and all that :class:`Geometry` refuses.
    """
    charges, positions = [], []
    for number, (element, place) in enumerate(atoms, start=1):
        if element not in CHARGES:
            raise UserError(f"{name}: atom {number} is '{element}', and there is no such element")
        x, y, z = (float(value) / BOHR for value in place)
        charges.append(CHARGES[element])
        positions.append((x, y, z))
    if electrons is not None and sum(charges) - charge != electrons:
        raise UserError(
            f"{name} has nuclei of charge {sum(charges)} in all and the charge {charge:+d}, hence "
            f"{sum(charges) - charge} electrons, and {electrons} were asked for: one of --charge and "
            "--electrons is wrong"
        )
    return Geometry(name=name, charges=tuple(charges), positions=tuple(positions), charge=charge)


def distorted(geometry: Geometry, sigma: float, seed: int, copy: int) -> Geometry:
    """The same molecule with every nuclear coordinate displaced at random, independently.

    A copy depends on its own number, the seed and the molecule's name only, not on what else is drawn.

    Args:
        geometry: the middle of the distribution.
        sigma: its standard deviation, in angstrom.
        seed: seed of the draw.
        copy: its number, which goes into the name.

    Raises:
        UserError: the atoms overlap after it: ``sigma`` is too large.
    """
    digest = hashlib.sha256(geometry.name.encode()).digest()
    draw = np.random.default_rng([seed, copy, int.from_bytes(digest[:4], "little")])
    moved = np.array(geometry.positions) + draw.normal(scale=sigma / BOHR, size=(len(geometry.positions), 3))
    places = tuple((float(x), float(y), float(z)) for x, y, z in moved)
    return replace(geometry, name=f"{geometry.name}-d{copy}", positions=places)


# -- Small closed-shell molecules by name, at their experimental bond lengths and angles -------------------------------


Atom = tuple[str, tuple[float, float, float]]


def _diatomic(first: str, second: str, length: float) -> list[Atom]:
    return [(first, (0.0, 0.0, 0.0)), (second, (0.0, 0.0, length))]


def _linear(*chain: tuple[str, float]) -> list[Atom]:
    """Atoms along z, each with its distance from the previous one."""
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
        if Path(name).suffix or len(Path(name).parts) > 1:
            raise UserError(f"there is no file or folder '{name}'")
        close = difflib.get_close_matches(name.upper(), [known.upper() for known in ATOMS], n=1, cutoff=0.99)
        meant = [f" (did you mean '{known}'?)" for known in ATOMS if known.upper() in close]
        raise UserError(
            f"there is no molecule or file '{name}'{''.join(meant)}; the molecules known by name are "
            f"{', '.join(ATOMS)}; any other comes from an .xyz file, a folder or an archive of them"
        )
    return from_angstrom(name, ATOMS[name], charge, electrons)

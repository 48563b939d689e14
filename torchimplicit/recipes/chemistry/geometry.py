"""Where a molecule's nuclei are, and how many electrons it has."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from torchimplicit.recipes.chemistry.elements import CHARGES, HEAVIEST, SYMBOLS, symbol
from torchimplicit.recipes.runtime.errors import UserError

BOHR = 0.529177210903
"""Angstrom in a bohr (CODATA 2018)."""

TOO_CLOSE = 0.4
"""Angstrom. Atoms nearer than this overlap: the shortest bond there is, that of H2, has 0.74."""

MANY_ATOMS = 40
"""A molecule with more is refused unless it is allowed: matrices, grid and time grow with the square and the cube."""


@final
@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A closed-shell molecule before anything is computed of it.

    Attributes:
        name: what it is called in files, tables and errors.
        charges: nuclear charges.
        positions: of the nuclei, x, y, z of each, in bohr.
        charge: of the molecule as a whole, in elementary charges.

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
        if self.electrons < 1:
            raise UserError(f"{self.name} with charge {self.charge:+d} has no electrons left: no density to speak of")
        if self.electrons % 2:
            raise UserError(
                f"{self.name} with charge {self.charge:+d} has {self.electrons} electrons, an odd number: it has an "
                "open shell, and only closed shells are supported; give another --charge"
            )

    @property
    def electrons(self) -> int:
        """The nuclear charge minus the molecule's."""
        return sum(self.charges) - self.charge

    @property
    def formula(self) -> str:
        """In Hill's order: carbon, hydrogen, then the alphabet."""
        counts = Counter(map(symbol, self.charges))
        first = [s for s in ("C", "H") if s in counts] if "C" in counts else []
        order = [*first, *sorted(set(counts) - set(first))]
        return "".join(s + (str(counts[s]) if counts[s] > 1 else "") for s in order)

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


def check_size(geometry: Geometry) -> None:
    """Refuse what takes long.

    Raises:
        UserError: more than :data:`MANY_ATOMS` atoms.
    """
    if len(geometry.charges) > MANY_ATOMS:
        raise UserError(
            f"{geometry.name} has {len(geometry.charges)} atoms; more than {MANY_ATOMS} take hours and gigabytes: "
            "--allow-large takes them all the same"
        )


def distorted(geometry: Geometry, sigma: float, seed: int, copy: int) -> Geometry:
    """The same molecule with every coordinate of every nucleus moved at random, independently.

    A copy depends on its own number, the seed and the molecule's name only, not on what else is drawn.

    Args:
        geometry: the middle of the distribution.
        sigma: its standard deviation, in angstrom.
        seed: of the draw.
        copy: its number, which goes into the name.

    Raises:
        UserError: the atoms overlap after it: ``sigma`` is too large.
    """
    digest = hashlib.sha256(geometry.name.encode()).digest()
    draw = np.random.default_rng([seed, copy, int.from_bytes(digest[:4], "little")])
    moved = np.array(geometry.positions) + draw.normal(scale=sigma / BOHR, size=(len(geometry.positions), 3))
    places = tuple((float(x), float(y), float(z)) for x, y, z in moved)
    return replace(geometry, name=f"{geometry.name}-d{copy}", positions=places)

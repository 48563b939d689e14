"""The xyz format: a count, a comment, and an element with its position in angstrom a line.

Read in two forms: as programs write it, and as the QM9 data set has it (Ramakrishnan et al. 2014), which writes
exponents as ``*^``, appends a partial charge to every atom, and frequencies and identifiers to the atoms.
"""

from __future__ import annotations

import math
import re

from torchimplicit.recipes.chemistry.elements import CHARGES, SYMBOLS
from torchimplicit.recipes.chemistry.geometry import Geometry, from_angstrom
from torchimplicit.recipes.runtime.errors import UserError

MOST_ATOMS = 1000
"""Of a structure that is read: all pairs of atoms are looked at, and a functional of so many is out of reach."""

FARTHEST = 1e5
"""The largest coordinate, in angstrom: ten microns from the origin is no molecule."""


def parse(text: str, where: str, name: str, charge: int = 0, electrons: int | None = None) -> Geometry:
    """The molecule that ``text`` describes.

    Args:
        text: of the file.
        where: the file, for errors.
        name: to give to the molecule.
        charge: of the molecule; the format does not hold it.
        electrons: how many the caller expects; see :func:`~torchimplicit.recipes.chemistry.geometry.from_angstrom`.

    Raises:
        UserError: with the line's number, where it is empty or malformed; and all that a geometry is refused for.
    """
    lines = text.splitlines()
    if not any(line.strip() for line in lines):
        raise UserError(f"{where} is empty; an xyz file begins with the number of atoms")
    count = _count(lines[0], where)
    if count > MOST_ATOMS:
        raise UserError(
            f"{where} announces {count} atoms in line 1, and {MOST_ATOMS} at most are read; cut a piece out of it"
        )
    if len(lines) < count + 2:
        raise UserError(
            f"{where} announces {count} atoms in line 1 and ends after line {len(lines)}: it is cut short, or the "
            "comment in line 2 is missing"
        )
    atoms = [_atom(line, f"{where}, line {number}") for number, line in enumerate(lines[2 : count + 2], start=3)]
    if not lines[1].startswith("gdb"):  # QM9 goes on with frequencies and identifiers
        for number, line in enumerate(lines[count + 2 :], start=count + 3):
            if line.strip():
                raise UserError(
                    f"{where}, line {number}: there is more after the {count} atoms of line 1; a file must hold one "
                    "structure, so cut a trajectory into files"
                )
    try:
        return from_angstrom(name, atoms, charge, electrons)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _count(line: str, where: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", line.strip(), re.ASCII):  # Python's int takes 1_000, and other digits
        raise UserError(f"{where}, line 1: '{_short(line)}' is no number of atoms")
    count = int(line)
    if count < 1:
        raise UserError(f"{where}, line 1: a molecule of {count} atoms is none")
    return count


def _atom(line: str, where: str) -> tuple[str, list[float]]:
    words = line.split()
    if len(words) < 4:
        raise UserError(f"{where}: '{_short(line)}' must be an element and three coordinates")
    element = words[0]
    if element.isdecimal() and 1 <= int(element) <= len(SYMBOLS):
        element = SYMBOLS[int(element) - 1]
    element = element.capitalize()
    if element not in CHARGES:
        raise UserError(f"{where}: there is no element '{_short(words[0])}'")
    place = []
    for word in words[1:4]:
        try:
            if not word.isascii() or "_" in word:
                raise ValueError
            value = float(word.replace("*^", "e"))
        except ValueError:
            raise UserError(f"{where}: '{_short(word)}' is no coordinate") from None
        if not math.isfinite(value):
            raise UserError(f"{where}: the coordinate {_short(word)} is not finite")
        if abs(value) > FARTHEST:
            raise UserError(
                f"{where}: the coordinate {_short(word)} is beyond {FARTHEST:g}; positions must be in angstrom"
            )
        place.append(value)
    return element, place


def _short(text: str) -> str:
    """For an error: on one line, and not too much of it."""
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:40] + "…"

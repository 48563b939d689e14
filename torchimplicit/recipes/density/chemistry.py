"""Molecules: elements, geometries and their sources."""

from __future__ import annotations

import difflib
import hashlib
import lzma
import math
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import final

import numpy as np

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download, cache_folder, fetch, inside

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
        if self.electrons < 1:
            raise UserError(f"{self.name} with charge {self.charge:+d} has no electrons left: no density to speak of")
        if self.electrons % 2:
            raise UserError(
                f"{self.name} with charge {self.charge:+d} has {self.electrons} electrons, an odd number: a radical "
                "has an open shell, and only closed shells are supported; an ion needs its --charge"
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
        meant = [f"; did you mean '{known}'?" for known in ATOMS if known.upper() in close]
        raise UserError(
            f"there is no molecule or file '{name}'{''.join(meant)}; the molecules known by name are "
            f"{', '.join(ATOMS)}; any other comes from an .xyz file, a folder or an archive of them"
        )
    return from_angstrom(name, ATOMS[name], charge, electrons)


# -- The xyz format: a count, a comment, and an element with its position in angstrom a line ---------------------------
#
# Read in two forms: as programs write it, and as the QM9 data set has it (Ramakrishnan et al. 2014), which writes
# exponents as ``*^``, appends a partial charge to every atom, and frequencies and identifiers to the atoms.


MOST_ATOMS = 1000
"""Largest number of atoms in a structure file: all pairs are checked, and functionals are out of reach for more."""

FARTHEST = 1e5
"""The largest coordinate accepted, in angstrom (ten microns)."""


def parse(text: str, where: str, name: str, charge: int = 0, electrons: int | None = None) -> Geometry:
    """The molecule that ``text`` describes.

    Args:
        text: text of the file.
        where: the file, for errors.
        name: to give to the molecule.
        charge: charge of the molecule; the format does not hold it.
        electrons: how many the caller expects; see :func:`~torchimplicit.recipes.density.chemistry.from_angstrom`.

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
    _check_comment(lines[1], f"{where}, line 2", charge)
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
        raise UserError(f"{where}, line 1: '{_short(line)}' is not a number of atoms")
    count = int(line)
    if count < 1:
        raise UserError(f"{where}, line 1: a molecule of {count} atoms is none")
    return count


def _check_comment(comment: str, where: str, charge: int) -> None:
    """Refuse what a comment says of the atoms that is not what is read: other units or columns (as the extended xyz
    format has them), a periodic cell, or another charge."""
    other = re.search(r"\bbohrs?\b|\bunits?\s*[:=]\s*\W?(pm|nm|au|a\.u\.)", comment, re.IGNORECASE)
    if other and not re.search("angstr|Å", comment, re.IGNORECASE):
        raise UserError(f"{where} says '{other[0]}'; positions must be in angstrom")
    columns = re.search(r"\bProperties=\W?([\w:]+)", comment, re.IGNORECASE)
    if columns and not columns[1].startswith("species:S:1:pos:R:3"):
        raise UserError(f"{where}: the columns are '{_short(columns[1])}', and must begin with species:S:1:pos:R:3")
    cell, periodic = re.search(r"\bLattice=", comment), re.search(r"\bpbc=\W?([TF01 ]+)", comment)
    if cell and not (periodic and set(periodic[1]) <= set("F0 ")):
        raise UserError(f"{where}: the atoms repeat in a cell (Lattice=), and only molecules are computed; remove it")
    stated = re.search(r"\bcharge\s*=\s*\W?([+-]?[0-9]+)", comment, re.IGNORECASE)
    if stated and int(stated[1]) != charge:
        raise UserError(f"{where} says '{stated[0]}', and the charge asked for is {charge}; give --charge {stated[1]}")


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
            raise UserError(f"{where}: '{_short(word)}' is not a coordinate") from None
        if not math.isfinite(value):
            raise UserError(f"{where}: the coordinate {_short(word)} is not finite")
        if abs(value) > FARTHEST:
            raise UserError(
                f"{where}: the coordinate {_short(word)} is beyond {FARTHEST:g}; positions must be in angstrom"
            )
        place.append(value)
    return element, place


def _short(text: str) -> str:
    """Shorten a text to one line for an error message."""
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:40] + "…"


# -- Geometries from what a person names: a molecule, an xyz file, a folder or an archive of them, or QM9 --------------


QM9 = Download(
    name="dsgdb9nsd.xyz.tar.bz2",
    url="https://ndownloader.figshare.com/files/3195389",
    md5="ad1ebd51ee7f5b3a6e32e974e5d54012",
)
"""133,885 small organic molecules (Ramakrishnan, Dral, Rupp, von Lilienfeld, Scientific Data 1, 140022 (2014))."""

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LARGEST_FILE = 1 << 20
"""Largest xyz file accepted, in bytes."""


@dataclass(frozen=True)
class Refused:
    """A molecule of a folder or archive that cannot be used.

    Attributes:
        name: name of its file, without the suffix.
        reason: in one line.
    """

    name: str
    reason: str


def read(
    source: str, *, charge: int = 0, electrons: int | None = None, limit: int | None = None
) -> list[Geometry | Refused]:
    """The molecules of a source, those of a folder in the order of their names and those of an archive in its own.

    Args:
        source: a name (:data:`ATOMS`), ``qm9``, which is downloaded, or the path of an xyz file, a folder of xyz files,
            or a tar archive of them.
        charge: charge of every molecule.
        electrons: how many each is expected to have; ``None``: whatever follows from the charge.
        limit: how many to take of a folder or an archive, the refused ones included; ``None``: all.

    Raises:
        UserError: an unknown name, a file that is refused, or a folder or an archive without xyz files.
    """
    if source in ATOMS:
        return [named(source, charge, electrons)]
    path = fetch(QM9, cache_folder("qm9"), instead="as the source") if source == "qm9" else Path(source)
    if path.is_dir():
        texts = _folder(path)
    elif path.name.lower().endswith(ARCHIVES) and path.is_file():
        texts = _archive(path)
    elif path.is_file():
        if path.suffix.lower() != ".xyz":
            raise UserError(f"{path} must be an .xyz file, a folder of them, or one of {', '.join(ARCHIVES)} of them")
        return [parse(_text(_content(path), str(path)), str(path), path.stem, charge, electrons)]
    else:
        return [named(source, charge, electrons)]  # which says what is known
    geometries: list[Geometry | Refused] = []
    for name, where, content in islice(texts, limit):
        try:
            geometries.append(parse(_text(content, where), where, name, charge, electrons))
        except UserError as error:
            geometries.append(Refused(name, str(error)))
    if not geometries:
        raise UserError(f"{path} holds no .xyz file")
    return geometries


def gathered(
    sources: Iterable[str],
    *,
    charge: int = 0,
    electrons: int | None = None,
    limit: int | None = None,
    smallest: bool = False,
    allow_large: bool | None = None,
    by_name: bool = True,
) -> tuple[list[Geometry], list[Refused]]:
    """The molecules of several sources, each once, and those that cannot be used.

    Args:
        sources, charge, electrons, limit: see :func:`read`.
        smallest: ``limit`` takes the molecules with the fewest atoms, instead of the first.
        allow_large: accept molecules of more than :data:`MANY_ATOMS` atoms; ``None``: no, and the command has no option
            for it.
        by_name: refuse a molecule that has the name of another one: what is made of them is told apart by names.

    Raises:
        UserError: a source that cannot be read, or a source of one molecule that is refused.
    """
    every: dict[Geometry, None] = {}
    names: set[str] = set()
    refused: list[Refused] = []
    for source in sources:
        found = read(source, charge=charge, electrons=electrons, limit=None if smallest else limit)
        refused += [one for one in found if isinstance(one, Refused)]
        taken = [one for one in found if isinstance(one, Geometry)]
        if smallest and len(taken) > 1:
            taken = sorted(taken, key=lambda one: len(one.charges))[:limit]
        for geometry in taken:
            reason = ""
            if not allow_large and len(geometry.charges) > MANY_ATOMS:
                reason = f"{len(geometry.charges)} atoms; more than {MANY_ATOMS} take hours and gigabytes"
                reason += "" if allow_large is None else ": --allow-large accepts them anyway"
            elif by_name and geometry.name in names and geometry not in every:
                reason = "another molecule has this name; rename its file"
            if not reason:
                every[geometry] = None
                names.add(geometry.name)
            elif len(found) == 1:
                raise UserError(f"{geometry.name}: {reason}")
            else:
                refused.append(Refused(geometry.name, reason))
    return list(every), refused


def _folder(path: Path) -> Iterator[tuple[str, str, bytes]]:
    for file in sorted(path.rglob("*.xyz")):
        if file.is_file():
            yield file.stem, str(file), _content(file)


def _content(path: Path) -> bytes:
    """A file's content up to the size limit, plus one byte that shows if there is more."""
    try:
        with path.open("rb") as file:
            return file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None


def _archive(path: Path) -> Iterator[tuple[str, str, bytes]]:
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                inside(path, member.name)
                place = PurePosixPath(member.name)
                if not member.isfile() or place.suffix.lower() != ".xyz":
                    continue
                file = archive.extractfile(member)
                assert file is not None  # it is a regular file
                yield place.stem, f"{path.name}: {member.name}", file.read(LARGEST_FILE + 1)
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be unpacked ({reason}): it is damaged or no tar archive; get it again"
        ) from None


def _text(content: bytes, where: str) -> str:
    if len(content) > LARGEST_FILE:
        raise UserError(f"{where} has more than {LARGEST_FILE} bytes: no molecule that could be computed")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where} is not text") from None

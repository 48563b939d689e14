"""Molecules from xyz files, folders and archives of them, names and QM9."""

from __future__ import annotations

import lzma
import math
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from torchimplicit.recipes.density.chemistry import (
    ATOMS,
    CHARGES,
    MANY_ATOMS,
    SYMBOLS,
    Geometry,
    from_angstrom,
    named,
)
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download, cache_folder, fetch, inside

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

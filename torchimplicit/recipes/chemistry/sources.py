"""Geometries from what a person names: a molecule, an xyz file, a folder or an archive of them, or QM9."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from torchimplicit.recipes.chemistry import xyz
from torchimplicit.recipes.chemistry.geometry import Geometry
from torchimplicit.recipes.chemistry.known import ATOMS, named
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download, cache_folder, fetch, inside

QM9 = Download(
    name="dsgdb9nsd.xyz.tar.bz2",
    url="https://ndownloader.figshare.com/files/3195389",
    md5="ad1ebd51ee7f5b3a6e32e974e5d54012",
)
"""133,885 small organic molecules (Ramakrishnan, Dral, Rupp, von Lilienfeld, Scientific Data 1, 140022 (2014))."""

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LARGEST_FILE = 1 << 20
"""Bytes of an xyz file; one with more describes no molecule that could be computed."""


@dataclass(frozen=True)
class Refused:
    """A molecule of a folder or an archive that cannot be taken.

    Attributes:
        name: of its file, without the ending.
        reason: in one line.
    """

    name: str
    reason: str


def read(
    source: str, *, charge: int = 0, electrons: int | None = None, limit: int | None = None
) -> list[Geometry | Refused]:
    """The molecules of a source, those of a folder in the order of their names and those of an archive in its own.

    Args:
        source: a name (:data:`~torchimplicit.recipes.chemistry.known.ATOMS`), ``qm9``, which is downloaded, or the path
            of an xyz file, a folder of xyz files, or a tar archive of them.
        charge: of every molecule.
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
        return [xyz.parse(_text(_content(path), str(path)), str(path), path.stem, charge, electrons)]
    else:
        return [named(source, charge, electrons)]  # which says what is known
    found: list[Geometry | Refused] = []
    for name, where, content in islice(texts, limit):
        try:
            found.append(xyz.parse(_text(content, where), where, name, charge, electrons))
        except UserError as error:
            found.append(Refused(name, str(error)))
    if not found:
        raise UserError(f"{path} holds no .xyz file")
    return found


def _folder(path: Path) -> Iterator[tuple[str, str, bytes]]:
    for file in sorted(path.rglob("*.xyz")):
        if file.is_file():
            yield file.stem, str(file), _content(file)


def _content(path: Path) -> bytes:
    """As much of a file as is read at most, and a byte that tells if there is more."""
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
        raise UserError(f"{where} is no text") from None

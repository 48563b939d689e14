"""Files of computed dataclasses, such as a molecule's: numpy's .npz without pickles, with a checksum of the content."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar, final, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchimplicit.models.orbital_free.basis import DensityBasis
from torchimplicit.models.orbital_free.molecule import Molecule
from torchimplicit.recipes.density.chemistry import Geometry
from torchimplicit.recipes.density.record import Record
from torchimplicit.recipes.density.settings import ChemistrySettings
from torchimplicit.recipes.runtime.errors import DamagedFileError, UserError
from torchimplicit.recipes.runtime.files import replacing
from torchimplicit.recipes.runtime.settings import from_plain, to_plain

T = TypeVar("T")

LARGEST_GROWTH = 200
"""Largest ratio of unpacked to packed size: floating-point numbers hardly compress, apart from a symmetric molecule's
zeros."""


class BrokenFileError(DamagedFileError):
    """A file that cannot be used: it is damaged, of another version, or no molecule at all."""


def readable(name: str) -> str:
    """A molecule's name, made safe for file names."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", name)


# -- The format --------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Format(Generic[T]):
    """Files of one kind of dataclass: each tensor is an array, everything else a description in JSON.

    Attributes:
        name: what a file is of, for its description and for errors.
        version: version of the file's layout and of the meaning of its numbers.
        kind: the dataclass.
    """

    name: str
    version: int
    kind: type[T]

    def write(self, path: Path, value: Any, **more: Tensor) -> None:
        """Write a file atomically: concurrent readers see the old or the new file, never a part.

        Args:
            path: path of the file.
            value: the dataclass.
            more: further arrays.

        Raises:
            OSError: it cannot be written.
        """
        every = {one.name: getattr(value, one.name) for one in fields(value)}
        arrays: dict[str, Any] = {k: one.numpy() for k, one in (every | more).items() if isinstance(one, Tensor)}
        plain = {name: to_plain(one) for name, one in every.items() if not isinstance(one, Tensor | DensityBasis)}
        about = {"format": f"torchimplicit {self.name}", "version": self.version, **plain}
        text = np.frombuffer(json.dumps(about, sort_keys=True).encode(), dtype=np.uint8)
        digest = np.frombuffer(bytes.fromhex(_digest(text, arrays)), dtype=np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, part.open("wb") as file:
            np.savez_compressed(file, about=text, sha256=digest, **arrays)

    def read(self, path: Path) -> dict[str, Any]:
        """The fields in a file, by name, and the further arrays.

        Raises:
            BrokenFileError: it is damaged, of another version, or was not written by :meth:`write`.
            UserError: there is no such file, or it may not be read.
        """
        if not path.is_file():
            raise UserError(f"{path} is no file: a {self.name}'s data file is made by torchimplicit molecules")
        try:
            return self._read(path)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
        except Exception as error:  # a damaged archive, or what is damaged in it, raises nearly everything
            raise BrokenFileError(_damaged(path, " ".join(str(error).split()) or type(error).__name__)) from None

    def _read(self, path: Path) -> dict[str, Any]:
        # opened here: numpy alone would take any bytes for a pickle, and say so
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            size = sum(one.file_size for one in archive.infolist())
        if size > LARGEST_GROWTH * (path.stat().st_size + 1024):
            raise BrokenFileError(_damaged(path, f"it would grow to {size} bytes"))
        if not {"about.npy", "sha256.npy"} <= names:
            holds = ", ".join(sorted(names)[:4]) or "nothing"
            raise BrokenFileError(f"{path} is no {self.name}'s data file (it holds {holds})")
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        text, digest = arrays.pop("about"), arrays.pop("sha256")
        about = json.loads(text.tobytes().decode())
        if about.get("format") != f"torchimplicit {self.name}":
            raise BrokenFileError(f"{path} is no {self.name}'s data file, but '{about.get('format')}'")
        if about["version"] != self.version:
            raise BrokenFileError(
                f"{path} has version {about['version']} of the format, and this program reads version {self.version}; "
                "compute it again: torchimplicit molecules"
            )
        if digest.tobytes().hex() != _digest(text, arrays):
            raise BrokenFileError(_damaged(path, "its content does not have the checksum inside"))
        hints = get_type_hints(self.kind)
        plain = {name: from_plain(hints[name], one) for name, one in about.items() if name in hints}
        return plain | {name: torch.from_numpy(array) for name, array in arrays.items()}


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}): delete it and compute it again with torchimplicit molecules"


def _digest(text: NDArray[np.uint8], arrays: dict[str, NDArray[Any]]) -> str:
    """Checksum of the description and of every array with its name, type and shape."""
    digest = hashlib.sha256(text.tobytes())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# -- Files of molecules ------------------------------------------------------------------------------------------------


MOLECULES = Format("molecule", 2, Record)

_BASIS = ("atom", "angular", "exponent")


def key(geometry: Geometry, settings: ChemistrySettings, **more: Any) -> str:
    """Key of a calculation, 12 hexadecimal digits: the same for the same nuclei, charge, settings and format.

    Args:
        more: what else it depends on.
    """
    nuclei = {"charges": geometry.charges, "positions": geometry.positions, "charge": geometry.charge}
    asked = to_plain({"version": MOLECULES.version, "geometry": nuclei, "settings": settings, **more})
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def file_name(geometry: Geometry, settings: ChemistrySettings) -> str:
    """File name of the calculation."""
    return f"{readable(geometry.name)}-{key(geometry, settings)}.npz"


def write(path: Path, record: Record) -> None:
    """Write a molecule's file; see :meth:`Format.write`."""
    MOLECULES.write(path, record, **{name: getattr(record.basis, name) for name in _BASIS})


def read(path: Path) -> Record:
    """Read a molecule's file; see :meth:`Format.read`."""
    held = MOLECULES.read(path)
    centres = torch.tensor(held["geometry"].positions, dtype=torch.float64)
    try:
        basis = DensityBasis(centres=centres, **{name: held.pop(name) for name in _BASIS})
        return Record(basis=basis, **held)
    except (KeyError, TypeError) as error:
        raise BrokenFileError(_damaged(path, f"{error}")) from None


def load(path: Path) -> Molecule:
    """The molecule in a file, float64; see :meth:`Format.read`."""
    return read(path).molecule()

"""A file of a computed molecule: numpy's .npz without pickles, with a checksum of its content."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from torchimplicit.models.orbital_free.basis import DensityBasis
from torchimplicit.models.orbital_free.molecule import Molecule
from torchimplicit.recipes.density.chemistry import Geometry
from torchimplicit.recipes.density.record import Record
from torchimplicit.recipes.density.settings import ChemistrySettings
from torchimplicit.recipes.runtime.errors import DamagedFileError, UserError
from torchimplicit.recipes.runtime.files import replacing
from torchimplicit.recipes.runtime.settings import to_plain

T = TypeVar("T")

FORMAT = "torchimplicit molecule"
VERSION = 2
"""Version of the file's layout and of the meaning of its numbers."""

LARGEST_GROWTH = 200
"""Largest ratio of unpacked to packed size: floating-point numbers hardly compress, apart from a symmetric molecule's
zeros."""

_BASIS = ("atom", "angular", "exponent")
_ARRAYS = ("overlap", "coulomb", "external", "reference", "guess", "points", "quadrature")
_FIGURES = ("energy", "repulsion", "kinetic", "exchange_correlation", "attraction", "hartree", "software", "seconds")


class BrokenFileError(DamagedFileError):
    """A file that cannot be used: it is damaged, of another version, or no molecule at all."""


def key(geometry: Geometry, settings: ChemistrySettings, **more: Any) -> str:
    """Key of a calculation, 12 hexadecimal digits: the same for the same nuclei, charge, settings and format.

    Args:
        more: what else it depends on.
    """
    nuclei = {"charges": geometry.charges, "positions": geometry.positions, "charge": geometry.charge}
    asked = to_plain({"version": VERSION, "geometry": nuclei, "settings": settings, **more})
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def file_name(geometry: Geometry, settings: ChemistrySettings) -> str:
    """File name of the calculation."""
    return f"{readable(geometry.name)}-{key(geometry, settings)}.npz"


def readable(name: str) -> str:
    """A molecule's name, made safe for file names."""
    return re.sub(r"[^A-Za-z0-9._+-]", "_", name)


def write(path: Path, record: Record) -> None:
    """Write the file atomically: concurrent readers see the old or the new file, never a part.

    Raises:
        OSError: it cannot be written.
    """
    tensors = record.tensors() | {name: getattr(record.basis, name) for name in _BASIS}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    about = {
        "format": FORMAT,
        "version": VERSION,
        "geometry": to_plain(record.geometry),
        "settings": to_plain(record.settings),
        **{name: getattr(record, name) for name in _FIGURES},
    }
    write_arrays(path, about, arrays)


def read(path: Path) -> Record:
    """Read a file.

    Raises:
        BrokenFileError: it is damaged, of another version, or was not written by :func:`write`.
        UserError: there is no such file, or it may not be read.
    """
    return read_arrays(path, FORMAT, VERSION, _record)


def write_arrays(path: Path, about: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Write a file of arrays with a description, which has its ``format`` and ``version``.

    Raises:
        OSError: it cannot be written.
    """
    text = np.frombuffer(json.dumps(about, sort_keys=True).encode(), dtype=np.uint8)
    digest = np.frombuffer(bytes.fromhex(_digest(text, arrays)), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(file, about=text, sha256=digest, **arrays)


def read_arrays(
    path: Path, form: str, version: int, build: Callable[[dict[str, Any], dict[str, NDArray[Any]]], T]
) -> T:
    """Read a file of :func:`write_arrays`.

    Args:
        path: path of the file.
        form, version: that it must have.
        build: makes the result from the description and the arrays.

    Raises:
        BrokenFileError, UserError: see :func:`read`.
    """
    what = form.removeprefix("torchimplicit ")
    if not path.is_file():
        raise UserError(f"{path} is no file: a {what}'s data file is made by torchimplicit molecules")
    try:
        # opened here: numpy alone would take any bytes for a pickle, and say so
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            size = sum(one.file_size for one in archive.infolist())
        if size > LARGEST_GROWTH * (path.stat().st_size + 1024):
            raise BrokenFileError(_damaged(path, f"it would grow to {size} bytes"))
        if not {"about.npy", "sha256.npy"} <= names:
            raise BrokenFileError(
                f"{path} is no {what}'s data file (it holds {', '.join(sorted(names)[:4]) or 'nothing'})"
            )
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        text, digest = arrays.pop("about"), arrays.pop("sha256")
        about = json.loads(text.tobytes().decode())
        if about.get("format") != form:
            raise BrokenFileError(f"{path} is no {what}'s data file, but '{about.get('format')}'")
        if about["version"] != version:
            raise BrokenFileError(
                f"{path} has version {about['version']} of the format, and this program reads version {version}; "
                "compute it again: torchimplicit molecules"
            )
        if digest.tobytes().hex() != _digest(text, arrays):
            raise BrokenFileError(_damaged(path, "its content does not have the checksum inside"))
        return build(about, arrays)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged archive, or what is damaged in it, raises nearly everything
        raise BrokenFileError(_damaged(path, " ".join(str(error).split()) or type(error).__name__)) from None


def load(path: Path) -> Molecule:
    """The molecule in a file, float64.

    Raises:
        UserError: see :func:`read`.
    """
    return read(path).molecule()


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged ({why}): delete it and compute it again with torchimplicit molecules"


def geometry_of(about: dict[str, Any]) -> Geometry:
    """The geometry in a file's description."""
    return Geometry(
        name=about["geometry"]["name"],
        charges=tuple(about["geometry"]["charges"]),
        positions=tuple((x, y, z) for x, y, z in about["geometry"]["positions"]),
        charge=about["geometry"]["charge"],
    )


def _record(about: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Record:
    geometry = geometry_of(about)
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Record(
        geometry=geometry,
        settings=ChemistrySettings(**about["settings"]),
        basis=DensityBasis(
            centres=torch.tensor(geometry.positions, dtype=torch.float64), **{name: tensors[name] for name in _BASIS}
        ),
        **{name: tensors[name] for name in _ARRAYS},
        **{name: about[name] for name in _FIGURES},
    )


def _digest(text: NDArray[np.uint8], arrays: dict[str, NDArray[Any]]) -> str:
    """Checksum of the description and of every array with its name, type and shape."""
    digest = hashlib.sha256(text.tobytes())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()

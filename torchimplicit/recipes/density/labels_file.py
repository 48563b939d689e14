"""Files of a molecule's labels, in the format of :mod:`torchimplicit.recipes.density.storage`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from torchimplicit.recipes.density.chemistry import Geometry
from torchimplicit.recipes.density.labels import Labels
from torchimplicit.recipes.density.settings import ChemistrySettings, LabelSettings
from torchimplicit.recipes.density.storage import geometry_of, key, read_arrays, readable, write_arrays
from torchimplicit.recipes.runtime.settings import from_plain, to_plain

FORMAT = "torchimplicit labels"
VERSION = 1
"""Version of the file's layout and of the meaning of its numbers."""


def file_name(geometry: Geometry, chemistry: ChemistrySettings, settings: LabelSettings) -> str:
    """Name of a file of labels, which lies beside the molecule's own file."""
    asked = key(geometry, chemistry, labels=to_plain(settings), labels_version=VERSION)
    return f"{readable(geometry.name)}-{asked}.labels.npz"


def write(path: Path, labels: Labels) -> None:
    """Write the file atomically: concurrent readers see the old or the new file, never a part.

    Raises:
        OSError: it cannot be written.
    """
    about = {
        "format": FORMAT,
        "version": VERSION,
        "seconds": labels.seconds,
        **{name: to_plain(getattr(labels, name)) for name in ("geometry", "chemistry", "settings")},
    }
    write_arrays(path, about, {name: tensor.numpy() for name, tensor in labels.tensors().items()})


def read(path: Path) -> Labels:
    """Read a file.

    Raises:
        BrokenFileError: it is damaged, of another version, or was not written by :func:`write`.
        UserError: there is no such file, or it may not be read.
    """
    return read_arrays(path, FORMAT, VERSION, _labels)


def _labels(about: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> Labels:
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Labels(
        geometry=geometry_of(about),
        chemistry=ChemistrySettings(**about["chemistry"]),
        settings=from_plain(LabelSettings, about["settings"]),
        seconds=about["seconds"],
        **tensors,
    )

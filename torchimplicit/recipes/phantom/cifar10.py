"""CIFAR-10: the published pickles, or mosaics of PNG tiles."""

from __future__ import annotations

import io
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from torchimplicit.recipes.phantom.image_data import Labelled
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download, cache_folder, fetch, no_larger

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SIDE, CLASSES = 32, 10

ARCHIVE = Download(
    name="cifar-10-python.tar.gz",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)
LARGEST_FILE = 1 << 28
"""Bytes: eight times a batch."""

BATCHES = "cifar-10-batches-py"
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_MOSAIC = re.compile(r"(train|test)_(\d)_\w+\.png")

# What numpy's own pickles call, in the old form and in the new; nothing else may be called.
_ADMITTED: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy._core.multiarray._reconstruct": np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    "numpy._core.numeric._frombuffer": np._core.numeric._frombuffer,  # type: ignore[attr-defined]
}


def load(folder: Path | None) -> tuple[Labelled, Labelled]:
    """The published training and test images, ``[n, 3, 32, 32]``, or those of them that ``folder`` holds.

    Args:
        folder: holds ``cifar-10-batches-py`` (or its files, or ``cifar-10-python.tar.gz``), or mosaics
            ``<train|test>_<label>_<class>.png`` of 32×32 tiles; ``None``: the archive is downloaded.

    Raises:
        UserError: a file is missing, cut short, or something else.
    """
    if folder is None:
        return _from_archive(fetch(ARCHIVE, cache_folder("cifar10")))
    for place in (folder, folder / BATCHES):
        if (place / "test_batch").is_file() or any((place / name).is_file() for name in _TRAIN):
            return _from_batches(lambda name, place=place: _read(place / name), str(place))  # type: ignore[misc]
    if (folder / ARCHIVE.name).is_file():
        return _from_archive(folder / ARCHIVE.name)
    mosaics = sorted(path for path in folder.glob("*.png") if _MOSAIC.fullmatch(path.name))
    if mosaics:
        return _from_mosaics(folder, mosaics)
    raise UserError(
        f"{folder} holds no CIFAR-10: --data-dir must hold {BATCHES}, {ARCHIVE.name}, or mosaics such as "
        "train_0_airplane.png"
    )


def _from_archive(path: Path) -> tuple[Labelled, Labelled]:
    try:
        with tarfile.open(path) as archive:

            def read(name: str) -> bytes:
                member = archive.extractfile(f"{BATCHES}/{name}")
                if member is None:
                    raise UserError(f"{path} holds no file {BATCHES}/{name}: it is another archive")
                return member.read(LARGEST_FILE)

            return _from_batches(read, str(path))
    except KeyError as error:
        raise UserError(f"{path} is another archive ({error.args[0]})") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} is no tar archive, or is cut short ({error}); fetch it again") from None


def _from_batches(read: Callable[[str], bytes], where: str) -> tuple[Labelled, Labelled]:
    train = [read_batch(read(name), f"{where}/{name}") for name in _TRAIN]
    whole = Labelled(torch.cat([part.images for part in train]), torch.cat([part.labels for part in train]))
    return whole, read_batch(read("test_batch"), f"{where}/test_batch")


def _read(path: Path) -> bytes:
    no_larger(path, LARGEST_FILE)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def read_batch(content: bytes, where: str) -> Labelled:
    """One of the published pickles, of which only numpy arrays and plain values are read.

    Raises:
        UserError: it is not one, or not whole.
    """
    try:
        batch = _Restricted(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{where} is no batch of CIFAR-10, or is damaged ({error})") from None
    except Exception as error:  # damaged pickles raise nearly everything
        raise UserError(f"{where} is no batch of CIFAR-10, or is cut short ({error!r}); fetch it again") from None
    data, labels = (batch.get(b"data"), batch.get(b"labels")) if isinstance(batch, dict) else (None, None)
    if (
        not isinstance(data, np.ndarray)
        or not isinstance(labels, list)
        or data.dtype != np.uint8
        or data.shape != (len(labels), 3 * SIDE * SIDE)
    ):
        raise UserError(f"{where} is no batch of CIFAR-10: it must hold data, n×3072 bytes, and n labels")
    if not all(isinstance(label, int) and 0 <= label < CLASSES for label in labels):
        raise UserError(f"{where} is no batch of CIFAR-10: a label is none of 0 to {CLASSES - 1}")
    return Labelled(torch.from_numpy(data.copy()).reshape(-1, 3, SIDE, SIDE), torch.tensor(labels, dtype=torch.int64))


class _Restricted(pickle.Unpickler):
    """Makes numpy arrays and plain values, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module.replace('numpy.core.', 'numpy._core.')}.{name}"  # as it was called before numpy 2
        if path in _ADMITTED:
            return _ADMITTED[path]
        if path == "_codecs.encode":
            return _latin
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a file has no use for")


def _latin(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into a pickle that Python 2 can read."""
    return text.encode("latin-1")


def _from_mosaics(folder: Path, paths: list[Path]) -> tuple[Labelled, Labelled]:
    parts: dict[str, list[Labelled]] = {"train": [], "test": []}
    for path in paths:
        part, label = path.name.split("_")[:2]
        tiles = read_mosaic(path)
        parts[part].append(Labelled(tiles, torch.full((len(tiles),), int(label))))
    for part, found in parts.items():
        missing = set(range(CLASSES)) - {int(one.labels[0]) for one in found}
        if missing:
            raise UserError(f"{folder} has no mosaic {part}_<label>_<class>.png for the labels {sorted(missing)}")
    train, test = (
        Labelled(torch.cat([one.images for one in found]), torch.cat([one.labels for one in found]))
        for found in parts.values()
    )
    return train, test


def read_mosaic(path: Path) -> torch.Tensor:
    """The tiles of a mosaic row by row, ``[n, 3, 32, 32]``.

    Raises:
        UserError: it is no image, not whole, or not made of such tiles.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no image, or is cut short ({error}); fetch it again") from None
    height, width = pixels.shape[:2]
    if height % SIDE or width % SIDE:
        raise UserError(f"{path} has {width}×{height} pixels, and must be made of {SIDE}×{SIDE} tiles")
    tiles = torch.from_numpy(pixels.copy()).reshape(height // SIDE, SIDE, width // SIDE, SIDE, 3)
    return tiles.permute(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)

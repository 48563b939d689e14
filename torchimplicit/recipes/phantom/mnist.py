"""MNIST, in its usual four files."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from torchimplicit.recipes.phantom.image_data import Labelled
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download, cache_folder, fetch

MEAN, DEVIATION = (0.1307,), (0.3081,)
LARGEST_FILE = 1 << 28
"""Bytes: several times the largest of the four."""

_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_SUMS = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
FILES = tuple(Download(name=name, url=_URL + name, sha256=digest) for name, digest in _SUMS.items())


def load(folder: Path | None) -> tuple[Labelled, Labelled]:
    """The published training and test images, ``[n, 1, 28, 28]``.

    Args:
        folder: where the files are, compressed or not; ``None``: they are downloaded.

    Raises:
        UserError: a file is missing, cut short, or something else.
    """
    if folder is None:
        folder = cache_folder("mnist")
        for file in FILES:
            fetch(file, folder)
    return _labelled(folder, "train"), _labelled(folder, "t10k")


def _labelled(folder: Path, part: str) -> Labelled:
    images_file, labels_file = (_find(folder, f"{part}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1).long()
    if len(images) != len(labels):
        raise UserError(f"{images_file} holds {len(images)} images, and {labels_file} {len(labels)} labels")
    return Labelled(images[:, None], labels)


def _find(folder: Path, name: str) -> Path:
    for place in (folder, folder / "MNIST" / "raw"):
        for candidate in (place / f"{name}.gz", place / name):
            if candidate.is_file():
                return candidate
    raise UserError(f"{folder} has no {name}.gz: --data-dir must be the folder with MNIST's four idx files")


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of an idx file, as a uint8 tensor.

    Raises:
        UserError: it is not an idx file of bytes with so many dimensions, or not whole.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except EOFError:
        raise UserError(f"{path} is cut short; fetch it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is no gzip file, or is damaged ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if len(content) > LARGEST_FILE:
        raise UserError(
            f"{path} has more than {LARGEST_FILE >> 20} MB, unpacked: it is no file of MNIST's; fetch it again"
        )
    start = 4 + 4 * dimensions
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic:
        raise UserError(
            f"{path} begins with {content[:4].hex() or 'nothing'} where an idx file of bytes in {dimensions} "
            f"dimension{'s' if dimensions > 1 else ''} begins with {magic.hex()}: it is another kind of file"
        )
    shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise UserError(
            f"{path} announces {'×'.join(map(str, shape))} bytes and holds {max(len(content) - start, 0)}: it is cut "
            "short or damaged; fetch it again"
        )
    return (
        torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)
        if math.prod(shape)
        else (torch.zeros(shape, dtype=torch.uint8))
    )

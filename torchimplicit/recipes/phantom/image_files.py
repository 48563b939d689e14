"""Published image data sets, read from a folder or downloaded: scikit-learn's digits, MNIST, CIFAR-10, the Olivetti
faces.

Every reader gives the training and the test images. ``None`` for a folder means that the files are downloaded; where
one is missing, cut short or something else, it raises :class:`UserError`.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import Download, cache_folder, fetch, no_larger, unchanged


class Labelled(NamedTuple):
    """Images ``[n, channels, height, width]`` (uint8) and their labels ``[n]`` (int64)."""

    images: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> Labelled:
        """The entries with these indices."""
        return Labelled(self.images[indices], self.labels[indices])


class _Part(Protocol):
    """Some images of a data set; see :class:`Labelled`."""

    @property
    def labels(self) -> Tensor: ...
    def take(self, indices: Tensor) -> Any: ...


T = TypeVar("T", bound=_Part)


def set_apart(labels: Tensor, count: int, seed: int, what: str) -> tuple[Tensor, Tensor]:
    """Stratified indices of ``count`` samples, and of all others, both in random order.

    Args:
        labels: ``[n]``.
        count: how many.
        seed: which; the first of two counts are the same for both.
        what: names the samples in the error.

    Raises:
        UserError: there are not so many.
    """
    if count > len(labels):
        raise UserError(f"{count} images were asked for, and {what} has {len(labels)}; ask for fewer")
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    # By class, keeping the random order within; then each sample's place in its class as a share of the class.
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    _, sizes = torch.unique_consecutive(labels[by_class], return_counts=True)
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    place = torch.arange(len(labels)) - starts
    share = (place.double() + 0.5) / torch.repeat_interleave(sizes, sizes)
    chosen = by_class[torch.argsort(share, stable=True)]
    return chosen[:count], chosen[count:]


def parted(
    published: T, tested: T, validation: int, train: int | None, test: int | None, seed: int, names: tuple[str, str]
) -> tuple[T, T, T]:
    """Training, validation and test images: validation from the published training images, the others in full or up to
    a count. ``names`` name the two sets in errors.

    Raises:
        UserError: there are not so many.
    """
    where, where_tested = names
    kept, rest = set_apart(published.labels, validation, seed, where)
    if not len(rest):
        raise UserError(f"{where} has {len(published.labels)} images, and all are set apart for validation; set fewer")
    learned = published.take(rest)
    if train is not None:
        learned = learned.take(set_apart(learned.labels, train, seed, f"{where}, less validation,")[0])
    if test is not None:
        tested = tested.take(set_apart(tested.labels, test, seed, where_tested)[0])
    return learned, published.take(kept), tested


LARGEST_FILE = 1 << 28
"""Largest file accepted, in bytes: several times the largest of these data sets."""

# scikit-learn's bundled digits: 1797 real handwritten digits of 8×8 pixels


def digits(folder: Path | None) -> tuple[Labelled, Labelled]:
    """Digits ``[n, 1, 8, 8]``. No test set was published: every class contributes a fixed share."""
    from sklearn.datasets import load_digits

    if folder is not None:
        raise UserError("the digits come with scikit-learn and are not read from elsewhere: omit --data-dir")
    read = load_digits()
    images = torch.as_tensor(read.images * (255 / 16)).round().to(torch.uint8)[:, None]
    everything = Labelled(images, torch.as_tensor(read.target, dtype=torch.int64))
    test, train = set_apart(everything.labels, 360, 0, "the digits")
    return everything.take(train), everything.take(test)


# MNIST, in its usual four files

_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_SUMS = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MNIST = tuple(Download(name=name, url=_URL + name, sha256=digest) for name, digest in _SUMS.items())


def mnist(folder: Path | None) -> tuple[Labelled, Labelled]:
    """MNIST ``[n, 1, 28, 28]``, from compressed or plain files."""
    if folder is None:
        folder = cache_folder("mnist")
        for file in MNIST:
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
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


# CIFAR-10, in the published pickles

CIFAR10 = Download(
    name="cifar-10-python.tar.gz",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)
BATCHES, BINARY = "cifar-10-batches-py", "cifar-10-batches-bin"
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))

# What numpy's own pickles call, in the old form and in the new; nothing else may be called.
_ADMITTED: dict[str, Any] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy._core.multiarray._reconstruct": np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    "numpy._core.numeric._frombuffer": np._core.numeric._frombuffer,  # type: ignore[attr-defined]
}


def cifar10(folder: Path | None) -> tuple[Labelled, Labelled]:
    """CIFAR-10 ``[n, 3, 32, 32]``, from ``cifar-10-batches-py``, its files, or the archive that holds it."""
    if folder is None:
        return _from_archive(fetch(CIFAR10, cache_folder("cifar10")))
    for place in (folder, folder / BINARY):
        if (place / "test_batch.bin").is_file():
            return _from_binary(place)
    for place in (folder, folder / BATCHES):
        if (place / "test_batch").is_file() or any((place / name).is_file() for name in _TRAIN):
            return _from_batches(lambda name, place=place: _read(place / name), str(place))  # type: ignore[misc]
    if (folder / CIFAR10.name).is_file():
        return _from_archive(folder / CIFAR10.name)
    raise UserError(f"{folder} holds no CIFAR-10: --data-dir must hold {BATCHES}, {BINARY}, or {CIFAR10.name}")


ROW = 1 + 3 * 32 * 32
"""Bytes per image in the binary version: its label, then its pixels channel by channel."""


def _from_binary(folder: Path) -> tuple[Labelled, Labelled]:
    """The binary version, possibly with fewer than five training files."""
    train = sorted(folder.glob("data_batch_*.bin"))
    if not train:
        raise UserError(f"{folder} holds no data_batch_1.bin: the binary version of CIFAR-10 is not whole")
    parts = [_rows_of(path) for path in train]
    whole = Labelled(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
    return whole, _rows_of(folder / "test_batch.bin")


def _rows_of(path: Path) -> Labelled:
    content = _read(path)
    if not content or len(content) % ROW:
        raise UserError(f"{path} has {len(content)} bytes, and images have {ROW} each: it is cut short; fetch it again")
    rows = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, ROW).copy())
    if int(rows[:, 0].max()) > 9:
        raise UserError(f"{path} is no batch of CIFAR-10: a label is none of 0 to 9")
    return Labelled(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long())


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
        raise UserError(f"{path} is not a tar archive, or is cut short ({error}); fetch it again") from None


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
    """Read one of the published pickles, accepting only numpy arrays and plain values.

    Raises:
        UserError: it is not one, or not whole.
    """
    try:
        batch = _Restricted(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{where} is no batch of CIFAR-10, or is damaged ({error})") from None
    except Exception as error:  # damaged pickles raise nearly everything
        raise UserError(f"{where} is no batch of CIFAR-10, or is cut short ({error!r}); fetch it again") from None
    entries: dict[bytes, Any] = batch if isinstance(batch, dict) else {}
    data, labels = entries.get(b"data"), entries.get(b"labels", ())
    known = isinstance(data, np.ndarray) and isinstance(labels, list)
    if data is None or not known or data.dtype != np.uint8 or data.shape != (len(labels), 3072):
        raise UserError(f"{where} is no batch of CIFAR-10: it must hold data, n×3072 bytes, and n labels")
    if not all(isinstance(label, int) and 0 <= label < 10 for label in labels):
        raise UserError(f"{where} is no batch of CIFAR-10: a label is none of 0 to 9")
    return Labelled(torch.from_numpy(data.copy()).reshape(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64))


class _Restricted(pickle.Unpickler):
    """Unpickles numpy arrays and plain values, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module.replace('numpy.core.', 'numpy._core.')}.{name}"  # as it was called before numpy 2
        if path in _ADMITTED:
            return _ADMITTED[path]
        if path == "_codecs.encode":
            return _latin
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which such a file has no use for")


def _latin(text: str, encoding: str) -> bytes:
    """Decode bytes as Python 3 writes them into a pickle that Python 2 can read."""
    return text.encode("latin-1")


# The Olivetti faces: 400 photographs, ten of each of 40 people, at half their resolution

FACES, SHAPE = "olivettifaces.mat", (4096, 400)


def olivetti(folder: Path | None) -> tuple[Labelled, Labelled]:
    """Olivetti faces ``[n, 1, 32, 32]``. No test set was published: two fixed images of every person are used."""
    faces = _published(folder / FACES) if folder is not None else _fetched()
    images = functional.avg_pool2d(faces[:, None], 2).round().to(torch.uint8)
    everything = Labelled(images, torch.arange(400) // 10)
    test, train = set_apart(everything.labels, 80, 0, "the Olivetti faces")
    return everything.take(train), everything.take(test)


def _published(path: Path) -> Tensor:
    """The published pictures, ``[400, 64, 64]``, 0 to 255."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {FACES}: --data-dir must be the folder that holds it")
    from scipy.io import loadmat, whosmat

    no_larger(path, 64 * SHAPE[0] * SHAPE[1])
    try:
        shapes = {name: shape for name, shape, _ in whosmat(path)}
        faces = loadmat(path, variable_names=["faces"]).get("faces") if shapes.get("faces") == SHAPE else None
    except Exception as error:  # a file that is something else fails in the reader in many ways
        raise UserError(f"{path} is no readable MATLAB file ({error}); fetch it again") from None
    if not isinstance(faces, np.ndarray) or faces.shape != SHAPE:
        raise UserError(f"{path} holds no matrix 'faces' of 4096 pixels × 400 images: it is another file")
    if not np.isfinite(faces).all():
        raise UserError(f"{path} holds NaN or infinity: it is damaged; fetch it again")
    return torch.as_tensor(faces.T.astype(np.float32)).unflatten(1, (64, 64)).mT.contiguous()


def _fetched() -> Tensor:
    from sklearn.datasets import fetch_olivetti_faces

    folder = cache_folder("olivetti")

    def verify() -> None:
        if kept := [path.name for path in folder.glob("*.pkz")]:
            unchanged(folder, kept)

    verify()  # before anything in it is unpickled
    try:
        images = fetch_olivetti_faces(data_home=str(folder)).images
    except Exception as error:  # of the network, the file system or what is there already
        raise UserError(
            f"scikit-learn cannot download the Olivetti faces ({error}); give the folder that holds {FACES} with "
            "--data-dir"
        ) from None
    verify()
    return 255 * torch.as_tensor(images).float()


READERS: dict[str, Callable[[Path | None], tuple[Labelled, Labelled]]] = {
    "digits": digits,
    "mnist": mnist,
    "cifar10": cifar10,
    "olivetti": olivetti,
}

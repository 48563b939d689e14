"""The data sets that fit into memory, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol, get_args

from torchimplicit.recipes.images.split import Labelled, Splits, set_apart
from torchimplicit.recipes.runtime.errors import UserError

DataSet = Literal["digits", "mnist", "cifar10", "olivetti"]


@dataclass(frozen=True)
class Kind:
    """What is known of a data set before it is read.

    Attributes:
        channels: of the images.
        size: their height and width in pixels.
        classes: how many labels there are.
    """

    channels: int
    size: int
    classes: int = 10


KINDS: dict[str, Kind] = {
    "digits": Kind(1, 8),
    "mnist": Kind(1, 28),
    "cifar10": Kind(3, 32),
    "olivetti": Kind(1, 32, 40),
}


def load(
    name: DataSet,
    data_dir: Path | None = None,
    *,
    validation: int,
    train: int | None = None,
    test: int | None = None,
    split_seed: int = 0,
) -> Splits:
    """A data set, with a validation split taken from the published training images, every class with its share.

    The test images are the published ones; none of them is ever in another split.

    Args:
        name: which.
        data_dir: the folder that holds it; ``None``: downloaded into the cache. The digits come with scikit-learn.
        validation: how many images to set apart.
        train, test: how many to keep of the others; ``None``: all.
        split_seed: which.

    Raises:
        UserError: the folder or a file is missing or of the wrong kind, or has too few images.
    """
    assert name in get_args(DataSet), name
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"{data_dir} is no folder: --data-dir must be the folder that holds {name}")
    source = import_module(f"torchimplicit.recipes.images.{name}")  # each brings imports of its own
    read: Callable[[Path | None], tuple[Labelled, Labelled]] = source.load
    published, tested = read(data_dir)
    where = f"the training part of {name}" + (f" in {data_dir}" if data_dir is not None else "")
    for part, images in ((where, published), (where.replace("training", "test"), tested)):
        _check(images, KINDS[name], part)
    kept, rest = set_apart(published.labels, validation, split_seed, where)
    if not len(rest):
        raise UserError(f"{where} has {len(published.labels)} images, and all are set apart for validation; set fewer")
    learned = published.take(rest)
    if train is not None:
        learned = learned.take(set_apart(learned.labels, train, split_seed, f"{where}, less validation,")[0])
    if test is not None:
        tested = tested.take(set_apart(tested.labels, test, split_seed, where.replace("training", "test"))[0])
    return Splits(learned, published.take(kept), tested, source.MEAN, source.DEVIATION)


def _check(images: Labelled, kind: Kind, where: str) -> None:
    shape, wanted = tuple(images.images.shape[1:]), (kind.channels, kind.size, kind.size)
    if shape != wanted:
        raise UserError(
            f"{where} has images of {_text(shape)}, and they must be {_text(wanted)} (channels×height×width)"
        )
    if not len(images.labels):
        raise UserError(f"{where} has no images")
    if int(images.labels.max()) >= kind.classes:
        raise UserError(f"{where} has the label {int(images.labels.max())}, and there are {kind.classes} classes")


def _text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


class Selection(Protocol):
    """Settings that say which images are taken."""

    @property
    def data_dir(self) -> Path | None: ...
    @property
    def validation_images(self) -> int: ...
    @property
    def train_images(self) -> int | None: ...
    @property
    def test_images(self) -> int | None: ...
    @property
    def split_seed(self) -> int: ...


def selected(name: DataSet, config: Selection) -> Splits:
    """What the settings take of a data set; kept, for it is asked for when they are checked, and when
    the model is made."""
    return _kept(
        name,
        config.data_dir,
        config.validation_images,
        config.train_images,
        config.test_images,
        config.split_seed,
    )


@lru_cache(maxsize=1)
def _kept(
    name: DataSet, folder: Path | None, validation: int, train: int | None, test: int | None, seed: int
) -> Splits:
    return load(name, folder, validation=validation, train=train, test=test, split_seed=seed)

"""scikit-learn's bundled digits: 1797 real handwritten digits of 8×8 pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits

from torchimplicit.recipes.phantom.image_data import Labelled, set_apart
from torchimplicit.recipes.runtime.errors import UserError

MEAN, DEVIATION = (0.3052,), (0.3761,)
TEST_IMAGES = 360


def load(folder: Path | None) -> tuple[Labelled, Labelled]:
    """Training and test images, ``[n, 1, 8, 8]``. No test set was published: every class gives its share, always the
    same images.

    Raises:
        UserError: a folder is given.
    """
    if folder is not None:
        raise UserError("the digits come with scikit-learn and are read from nowhere else: leave --data-dir away")
    digits = load_digits()
    images = torch.as_tensor(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    everything = Labelled(images, torch.as_tensor(digits.target, dtype=torch.int64))
    test, train = set_apart(everything.labels, TEST_IMAGES, 0, "the digits")
    return everything.take(train), everything.take(test)

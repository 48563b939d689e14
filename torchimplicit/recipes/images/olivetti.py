"""The Olivetti faces: 400 photographs, ten of each of 40 people, at half their resolution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from sklearn.datasets import fetch_olivetti_faces
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.fetch import cache_folder
from torchimplicit.recipes.images.split import Labelled, set_apart

MEAN, DEVIATION = (0.5195,), (0.1596,)
TEST_IMAGES = 80
FILE = "olivettifaces.mat"


def load(folder: Path | None) -> tuple[Labelled, Labelled]:
    """Training and test images, ``[n, 1, 32, 32]``. No test set was published: every person gives two images, always
    the same ones.

    Args:
        folder: where ``olivettifaces.mat`` is; ``None``: scikit-learn downloads it.

    Raises:
        UserError: the file is missing, cannot be downloaded, or is something else.
    """
    faces = _published(folder / FILE) if folder is not None else _fetched()
    images = functional.avg_pool2d(faces[:, None], 2).round().to(torch.uint8)
    everything = Labelled(images, torch.arange(400) // 10)
    test, train = set_apart(everything.labels, TEST_IMAGES, 0, "the Olivetti faces")
    return everything.take(train), everything.take(test)


def _published(path: Path) -> Tensor:
    """``[400, 64, 64]``, 0 to 255."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {FILE}: --data-dir must be the folder that holds it")
    try:
        faces = loadmat(path).get("faces")
    except Exception as error:  # a file that is something else fails in the reader in many ways
        raise UserError(f"{path} is no readable MATLAB file ({error}); fetch it again") from None
    if not isinstance(faces, np.ndarray) or faces.shape != (4096, 400):
        raise UserError(f"{path} holds no matrix 'faces' of 4096 pixels × 400 images: it is another file")
    return torch.as_tensor(faces.T.astype(np.float32)).unflatten(1, (64, 64)).mT.contiguous()


def _fetched() -> Tensor:
    try:
        return 255 * torch.as_tensor(fetch_olivetti_faces(data_home=str(cache_folder("olivetti"))).images).float()
    except OSError as error:
        raise UserError(
            f"scikit-learn cannot download the Olivetti faces ({error}); give the folder that holds {FILE} with "
            "--data-dir"
        ) from None

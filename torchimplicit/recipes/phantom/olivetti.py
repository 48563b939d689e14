"""The Olivetti faces: 400 photographs, ten of each of 40 people, at half their resolution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat, whosmat
from sklearn.datasets import fetch_olivetti_faces
from torch import Tensor
from torch.nn import functional

from torchimplicit.recipes.phantom.image_data import Labelled, set_apart
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import cache_folder, no_larger, unchanged

MEAN, DEVIATION = (0.5195,), (0.1596,)
TEST_IMAGES = 80
FILE = "olivettifaces.mat"
SHAPE = (4096, 400)


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
    folder = cache_folder("olivetti")

    def verify() -> None:
        if kept := [path.name for path in folder.glob("*.pkz")]:
            unchanged(folder, kept)

    verify()  # before anything in it is unpickled
    try:
        images = fetch_olivetti_faces(data_home=str(folder)).images
    except Exception as error:  # of the network, the file system or what is there already
        raise UserError(
            f"scikit-learn cannot download the Olivetti faces ({error}); give the folder that holds {FILE} with "
            "--data-dir"
        ) from None
    verify()
    return 255 * torch.as_tensor(images).float()

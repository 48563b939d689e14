"""A Fréchet distance between images, in the features of a small classifier that is trained here.

It is computed as FID is (Heusel et al. 2017), from means and covariances of features; but the features are those of a
small network trained on the same images, so that its numbers compare with each other alone, and not with any FID.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.recipes.jiio.config import Images
from torchimplicit.recipes.jiio.data import classes, read
from torchimplicit.recipes.runtime.task import generator, permutation

FEATURES = 32
STEPS = 400
BATCH = 64


class Features(nn.Module):
    """Convolutions down to 4×4, ``FEATURES`` features, and the scores of the classes."""

    def __init__(self, channels: int, size: int, count: int):
        super().__init__()
        layers: list[nn.Module] = []
        width = 16
        while size > 4:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()]
            channels, width, size = width, min(2 * width, 32), (size + 1) // 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, FEATURES), nn.Tanh())
        self.head = nn.Linear(FEATURES, count)

    def forward(self, images: Tensor) -> Tensor:
        """The features, ``[batch, FEATURES]``."""
        return self.body(images)


@lru_cache(maxsize=2)
def features(images: Images) -> tuple[Features, float]:
    """The network, trained on the training images of the settings (always alike), and its accuracy on the test
    images."""
    data = read(images)
    channels, height, _ = data.pixels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(0, -1).initial_seed())
        network = Features(channels, height, classes(images))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    batch = min(BATCH, len(data.training.labels))
    per_pass = len(data.training.labels) // batch
    for step in range(STEPS):
        turn, place = divmod(step, per_pass)
        chosen = permutation(len(data.training.labels), 0, turn)[place * batch : (place + 1) * batch]
        scores = network.head(network(data.training.images[chosen]))
        optimizer.zero_grad()
        functional.cross_entropy(scores, data.training.labels[chosen]).backward()
        optimizer.step()
    network.eval().requires_grad_(False)
    right = network.head(network(data.test.images)).argmax(dim=1) == data.test.labels
    return network, float(right.double().mean())


@torch.no_grad()
def distance(network: Features, one: Tensor, other: Tensor) -> float:
    """Between two sets of images, in the network's features."""
    return between(*(moments(network(images).double()) for images in (one, other)))


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of ``[n, dim]``."""
    return rows.mean(dim=0), torch.cov(rows.mT)


def between(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """:math:`\\lVert m_1 - m_2\\rVert^2 + \\mathrm{tr}(C_1 + C_2 - 2(C_1^{1/2}C_2C_1^{1/2})^{1/2})` of two Gaussians
    (Dowson and Landau 1982)."""
    values, vectors = torch.linalg.eigh(one[1])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ other[1] @ root).clamp_min(0).sqrt().sum()
    gap = (one[0] - other[0]).square().sum()
    return float(gap + one[1].trace() + other[1].trace() - 2 * cross)

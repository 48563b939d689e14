"""Models of the field, built on :class:`torchimplicit.nn.Equilibrium`. They need torch alone."""

from torchimplicit.models.conv_deq import ConvDEQClassifier, ResidualCell
from torchimplicit.models.mdeq import MDEQ, MDEQCell, MDEQConfig, mdeq_imagenet, mdeq_large, mdeq_small, mdeq_tiny

__all__ = [
    "MDEQ",
    "ConvDEQClassifier",
    "MDEQCell",
    "MDEQConfig",
    "ResidualCell",
    "mdeq_imagenet",
    "mdeq_large",
    "mdeq_small",
    "mdeq_tiny",
]

"""Models of the field, built on :class:`torchimplicit.nn.Equilibrium`. They need torch alone."""

from torchimplicit.models.conv_deq import ConvDEQClassifier, ResidualCell

__all__ = ["ConvDEQClassifier", "ResidualCell"]

"""Attacks on classifiers that contain an equilibrium: joint inference and projected gradient ascent."""

from torchimplicit.attacks.base import Attack, Found, Norm
from torchimplicit.attacks.jiio import JIIO
from torchimplicit.attacks.pgd import PGD

__all__ = ["JIIO", "PGD", "Attack", "Found", "Norm"]

"""Initializations of the recurrent weight of an IGNN."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.validation import check_nonnegative, check_positive


@dataclass(frozen=True, kw_only=True)
class Start(ABC):
    """An initialization of the recurrent weight, which is projected onto the ball afterwards."""

    @abstractmethod
    def weight(self, features: int) -> Tensor:
        """A matrix ``[features, features]``."""


@final
@dataclass(frozen=True, kw_only=True)
class UniformStart(Start):
    """Uniform within :math:`\\pm 1/\\sqrt{features}`, as in the paper. The projection makes most entries zero: a node's
    state then reaches its neighbours mixed and weakened, and hardly travels along a chain of tens of edges."""

    def weight(self, features: int) -> Tensor:
        return torch.empty(features, features).uniform_(-1, 1) / features**0.5


@final
@dataclass(frozen=True, kw_only=True)
class IdentityStart(Start):
    """A multiple of the identity plus normal noise: a node's state travels unmixed, which long chains need.

    Args:
        scale: factor of the identity; below kappa, so that the weight lies inside the ball.
        noise: standard deviation of the noise in every entry.
    """

    scale: float = 0.8
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "scale")
        check_nonnegative(self, "noise")

    def weight(self, features: int) -> Tensor:
        return self.scale * torch.eye(features) + self.noise * torch.randn(features, features)

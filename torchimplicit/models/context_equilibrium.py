"""An equilibrium modulated by a context vector: adapting to a task changes the context alone, never the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.gradients import Gradient
from torchimplicit.nn import Equilibrium, spectral_norm
from torchimplicit.solvers import Solver


@dataclass(frozen=True, kw_only=True)
class ContextEquilibriumConfig:
    """The sizes of a :class:`ContextEquilibrium`.

    Attributes:
        state: numbers in the equilibrium state of one sample.
        context: numbers in the context of one task.
        outputs: numbers that the model gives for one sample.
        bound: upper bound of the recurrent weight's spectral norm; below 1, every context has exactly one equilibrium.
    """

    state: int = 64
    context: int = 16
    outputs: int = 1
    bound: float = 0.7


class ModulatedCell(nn.Module):
    """:math:`z^+=\\tanh(Wz+\\gamma\\odot u+\\beta)`: u is the injection of a sample; the scale :math:`\\gamma` and the
    shift :math:`\\beta` come from its task (FiLM: Perez et al. 2018)."""

    def __init__(self, size: int, bound: float):
        super().__init__()
        self.mixing = spectral_norm(nn.Linear(size, size, bias=False), bound=bound)

    def forward(self, z: Tensor, u: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """One application of the map, for ``z`` and u ``[tasks, samples, size]``, γ and β ``[tasks, 1, size]``."""
        return torch.tanh(self.mixing(z) + gamma * u + beta)


class ContextEquilibrium(nn.Module):
    """Predicts outputs from samples and the context of their task, through an equilibrium.

    The context c sets the scale and the shift of the injection, :math:`\\gamma=1+Gc,\\ \\beta=Bc`, and a scale of the
    readout. The recurrent weight depends on no task, so that no context can make the map expand.

    Args:
        encoder: samples ``[n, ...]`` to features ``[n, state]``.
        config: the sizes.
        solver, gradient: solver and gradient estimator of the equilibrium layer; ``None``: its defaults.
    """

    def __init__(
        self,
        encoder: nn.Module,
        config: ContextEquilibriumConfig,
        *,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ):
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.modulation = nn.Linear(config.context, 3 * config.state, bias=False)
        cell = ModulatedCell(config.state, config.bound)
        self.equilibrium = Equilibrium(cell, solver=solver, gradient=gradient, rowwise=True)
        self.readout = nn.Linear(config.state, config.outputs)

    def encode(self, samples: Tensor) -> Tensor:
        """Features ``[tasks, samples, state]`` of samples ``[tasks, samples, ...]``. They do not depend on the context:
        compute them once per task."""
        return self.encoder(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])

    def map(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The map ``f(z, context, features)``. Its normalized weight is computed once, in this call."""
        cell = self.equilibrium.cell
        assert isinstance(cell, ModulatedCell)
        weight = cell.mixing.weight

        def f(z: Tensor, context: Tensor, features: Tensor) -> Tensor:
            gamma, beta, _ = self._modulated(context)
            return torch.tanh(functional.linear(z, weight) + gamma * features + beta)

        return f

    def read(self, z: Tensor, context: Tensor) -> Tensor:
        """Outputs ``[tasks, samples, outputs]`` read from states ``[tasks, samples, state]``."""
        return self.readout(self._modulated(context)[2] * z)

    def contexts(self, features: Tensor) -> Tensor:
        """The context of zeros ``[tasks, context]`` from which every adaptation starts."""
        return features.new_zeros(len(features), self.config.context)

    def forward(self, features: Tensor, context: Tensor, z0: Tensor | None = None) -> Tensor:
        """Outputs for features ``[tasks, samples, state]`` and contexts ``[tasks, context]``."""
        gamma, beta, _ = self._modulated(context)
        return self.read(self.equilibrium(features, gamma, beta, z0=z0), context)

    def _modulated(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, shift, gain = self.modulation(context)[:, None].chunk(3, dim=-1)
        return 1 + scale, shift, 1 + gain

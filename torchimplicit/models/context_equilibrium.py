"""An equilibrium that a context modulates: what adapts to a task is the context alone."""

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
    """Sizes.

    Attributes:
        state: of a sample's equilibrium.
        context: of a task's context.
        outputs: of a sample.
        bound: on the spectral norm of the weight between states, below 1: then every context has one equilibrium.
    """

    state: int = 64
    context: int = 16
    outputs: int = 1
    bound: float = 0.7


class ModulatedCell(nn.Module):
    """:math:`z^+=\\tanh(Wz+\\gamma\\odot u+\\beta)`, u being what a sample puts in, and :math:`\\gamma,\\beta` what
    its task does (FiLM: Perez et al. 2018)."""

    def __init__(self, size: int, bound: float):
        super().__init__()
        self.mixing = spectral_norm(nn.Linear(size, size, bias=False), bound=bound)

    def forward(self, z: Tensor, u: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """One application; ``z`` and u ``[tasks, samples, size]``, γ and β ``[tasks, 1, size]``."""
        return torch.tanh(self.mixing(z) + gamma * u + beta)


class ContextEquilibrium(nn.Module):
    """Samples and a context of their task to outputs, through an equilibrium.

    Scale and shift :math:`\\gamma=1+Gc,\\ \\beta=Bc` act on what is put in, and a scale on what is read out; the weight
    between states is the task's no more than the sample's, so that no context can make the map expand.

    Args:
        encoder: samples ``[n, ...]`` to features ``[n, state]``.
        config: the sizes.
        solver, gradient: of the equilibrium; ``None``: the layer's defaults.
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
        """``[tasks, samples, ...]`` to features ``[tasks, samples, state]``; once a task, for no context enters."""
        return self.encoder(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])

    def map(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The map ``f(z, context, features)``, its bounded weight computed once, here."""
        cell = self.equilibrium.cell
        assert isinstance(cell, ModulatedCell)
        weight = cell.mixing.weight

        def f(z: Tensor, context: Tensor, features: Tensor) -> Tensor:
            gamma, beta, _ = self._modulated(context)
            return torch.tanh(functional.linear(z, weight) + gamma * features + beta)

        return f

    def read(self, z: Tensor, context: Tensor) -> Tensor:
        """Outputs ``[tasks, samples, outputs]`` of states."""
        return self.readout(self._modulated(context)[2] * z)

    def contexts(self, features: Tensor) -> Tensor:
        """The context of zeros, ``[tasks, context]``, where every adaptation begins."""
        return features.new_zeros(len(features), self.config.context)

    def forward(self, features: Tensor, context: Tensor, z0: Tensor | None = None) -> Tensor:
        """Features ``[tasks, samples, state]`` and contexts ``[tasks, context]`` to outputs."""
        gamma, beta, _ = self._modulated(context)
        return self.read(self.equilibrium(features, gamma, beta, z0=z0), context)

    def _modulated(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, shift, gain = self.modulation(context)[:, None].chunk(3, dim=-1)
        return 1 + scale, shift, 1 + gain

"""Neural operators for steady problems: a Fourier layer at its equilibrium, and explicit counterparts of it.

A steady state solves a fixed-point problem, u = F(u, a), which is the form of an equilibrium model (Marwah et al. 2023,
arXiv 2312.00234).
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchimplicit.gradients import Gradient
from torchimplicit.nn import Equilibrium
from torchimplicit.solvers import Anderson, Solver


@final
class SpectralConvolution(nn.Module):
    """A linear map of the lowest Fourier modes of a field on a square (Li et al. 2021, arXiv 2010.08895).

    The field is padded by a quarter of its side, since it is not periodic. The weights belong to modes, not to grid
    points: the same map serves every resolution.

    Args:
        inputs, outputs: channels of the field before and after.
        modes: number of lowest frequencies that are kept along each axis.
        gain: factor of the initial weights.
    """

    def __init__(self, inputs: int, outputs: int, modes: int, gain: float = 1.0):
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(gain * torch.randn(2 * modes, modes, outputs, inputs, 2) / (2 * inputs) ** 0.5)

    def forward(self, z: Tensor) -> Tensor:
        """The map of ``[batch, inputs, n, n]`` to ``[batch, outputs, n, n]``; n is at least 1.6 times ``modes``."""
        n, m = z.shape[-1], self.modes
        padded = n + n // 4
        if padded // 2 + 1 < m or padded < 2 * m:
            raise ValueError(f"a grid of {n} has no {m} modes: take fewer, or a finer grid")
        spectrum = torch.fft.rfft2(z, s=(padded, padded), norm="ortho")
        low = torch.cat([spectrum[:, :, :m, :m], spectrum[:, :, -m:, :m]], dim=2).permute(2, 3, 1, 0)
        mapped = (torch.view_as_complex(self.weight) @ low).permute(3, 2, 0, 1)
        between = mapped.new_zeros(*mapped.shape[:2], padded - 2 * m, m)
        whole = functional.pad(
            torch.view_as_real(torch.cat([mapped[:, :, :m], between, mapped[:, :, m:]], dim=2)),
            (0, 0, 0, padded // 2 + 1 - m),
        )
        return torch.fft.irfft2(torch.view_as_complex(whole), s=(padded, padded), norm="ortho")[..., :n, :n]


@final
class OperatorCell(nn.Module):
    """One Fourier layer: ``h = gelu(Wz + x)``, then its spectral convolution and a map of its channels.

    Args:
        width: channels of the state.
        modes: see :class:`SpectralConvolution`.
        gain: factor of the initial weights; at the default the untrained map contracts.
    """

    def __init__(self, width: int, modes: int, gain: float = 0.3):
        super().__init__()
        self.inner = nn.Conv2d(width, width, 1)
        self.spectral = SpectralConvolution(width, width, modes, gain)
        self.local = nn.Conv2d(width, width, 1)
        with torch.no_grad():
            self.local.weight.mul_(gain)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One application of the map, for ``z`` and ``x`` ``[batch, width, n, n]``."""
        h = functional.gelu(self.inner(z) + x)
        return self.spectral(h) + self.local(h)


@final
class NeuralOperator(nn.Module):
    """Predicts the steady state on a square from the coefficient of its equation.

    Args:
        kind: ``"equilibrium"``: the fixed point of one cell; ``"tied"``: that cell applied ``depth`` times, with as
            many weights; ``"explicit"``: ``depth`` residual cells with weights of their own.
        width, modes: channels and modes of the cells.
        depth: number of layers of the explicit kinds.
        solver, gradient: solver and gradient estimator of the equilibrium.
    """

    def __init__(
        self,
        kind: Literal["equilibrium", "tied", "explicit"],
        *,
        width: int,
        modes: int,
        depth: int = 4,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ):
        super().__init__()
        self.kind, self.depth = kind, depth
        self.lift = nn.Sequential(nn.Conv2d(3, width, 1), nn.GELU(), nn.Conv2d(width, width, 1))
        self.head = nn.Sequential(nn.Conv2d(width, 32, 1), nn.GELU(), nn.Conv2d(32, 1, 1))
        self.cells = nn.ModuleList(OperatorCell(width, modes) for _ in range(depth if kind == "explicit" else 1))
        chosen = solver or Anderson(rtol=1e-3, max_steps=30)
        self.equilibrium = (
            Equilibrium(self.cells[0], solver=chosen, gradient=gradient, rowwise=True)
            if kind == "equilibrium"
            else None
        )

    def forward(self, a: Tensor) -> Tensor:
        """The steady state ``[batch, 1, n, n]`` of a coefficient of the same shape, at the inner points of a grid."""
        x = self.lift(torch.cat([a, places(a)], dim=1))
        if self.equilibrium is not None:
            return self.head(self.equilibrium(x))
        z = torch.zeros_like(x)
        for layer in range(self.depth):
            z = z + self.cells[layer](z, x) if self.kind == "explicit" else self.cells[0](z, x)
        return self.head(z)


def places(a: Tensor) -> Tensor:
    """Two channels that tell each point its place: a bump along each axis that is zero on the boundary."""
    n = a.shape[-1]
    x = torch.arange(1, n + 1, dtype=a.dtype, device=a.device) / (n + 1)
    bump = 4 * x * (1 - x)
    return torch.stack(torch.meshgrid(bump, bump, indexing="ij")).expand(len(a), -1, -1, -1)

"""Equilibria of monotone operators: one for every input, whatever the weights.

The cell :math:`z=\\mathrm{relu}(Wz+b)` has one equilibrium where :math:`I-W` is strongly monotone, which
:math:`W=(1-m)I-A^TA+B-B^T` is for every A and B (Winston and Kolter 2020, "Monotone operator equilibrium networks").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from torchimplicit.diagnostics.certificate import Certificate, contraction
from torchimplicit.gradients import Gradient
from torchimplicit.nn import Equilibrium
from torchimplicit.precision import without_autocast
from torchimplicit.solvers import FixedPointIteration, Solver
from torchimplicit.state import row_norm
from torchimplicit.validation import check_positive


class MonotoneOperator(nn.Module, ABC):
    """:math:`W=(1-m)I-A^TA+B-B^T`, in a basis in which it is made of blocks: for every A and B, the symmetric part of
    :math:`I-W` is at least m.

    Args:
        margin: m > 0.
    """

    def __init__(self, margin: float):
        super().__init__()
        if not 0 < margin < float("inf"):
            raise ValueError(f"{type(self).__name__}: margin is {margin}, and must be a positive finite number")
        self.margin = margin

    @abstractmethod
    def blocks(self, like: Tensor) -> Tensor:
        """The blocks ``[..., n, n]`` for states like ``like``."""

    @abstractmethod
    def product(self, blocks: Tensor, z: Tensor) -> Tensor:
        """Any operator in that basis times a state ``[batch, ...]``."""

    def extra_repr(self) -> str:
        return f"margin={self.margin}"

    def _made(self, a: Tensor, b: Tensor) -> Tensor:
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return (1 - self.margin) * eye - a.mH @ a + b - b.mH


@final
class DenseMonotone(MonotoneOperator):
    """One block: states are ``[batch, features]``.

    Args:
        features: size of the state.
        margin: m > 0.
    """

    def __init__(self, features: int, *, margin: float = 0.1):
        super().__init__(margin)
        self.a, self.b = (nn.Parameter(0.5 * features**-0.5 * torch.randn(features, features)) for _ in range(2))

    def blocks(self, like: Tensor) -> Tensor:
        return self._made(self.a, self.b)

    def product(self, blocks: Tensor, z: Tensor) -> Tensor:
        return z @ blocks.mT


@final
class ConvMonotone(MonotoneOperator):
    """A and B are convolutions that wrap around at the border, so that W is a block of channels for every frequency.
    States are ``[batch, channels, height, width]``, of any size from that of the kernel on.

    Args:
        channels: channels of the state.
        kernel_size: side of the kernels, odd.
        margin: m > 0.
    """

    def __init__(self, channels: int, kernel_size: int = 3, *, margin: float = 0.1):
        super().__init__(margin)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"ConvMonotone: kernel_size is {kernel_size}, and must be an odd number")
        shape, size = (channels, channels, kernel_size, kernel_size), 0.5 * (channels**0.5 * kernel_size) ** -1
        self.a, self.b = (nn.Parameter(size * torch.randn(shape)) for _ in range(2))

    def blocks(self, like: Tensor) -> Tensor:
        """``[height, width // 2 + 1, channels, channels]``, of the real Fourier transform."""
        height, width = like.shape[-2:]
        size = self.a.shape[-1]
        if min(height, width) < size:
            raise ValueError(
                f"ConvMonotone: states of {height} by {width} pixels are smaller than the kernel of {size}: take a "
                "smaller kernel_size"
            )

        def spectrum(kernel: Tensor) -> Tensor:
            padded = nn.functional.pad(kernel, (0, width - size, 0, height - size))
            return torch.fft.rfft2(padded.roll((-(size // 2),) * 2, (-2, -1))).permute(2, 3, 0, 1)

        return self._made(spectrum(self.a), spectrum(self.b))

    def product(self, blocks: Tensor, z: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(z)
        return torch.fft.irfft2(torch.einsum("hwoi,bihw->bohw", blocks, spectrum), s=z.shape[-2:])


class Constants(NamedTuple):
    """:math:`m` and :math:`L`: the least eigenvalue of the symmetric part of :math:`I-W`, and its spectral norm."""

    monotonicity: Tensor
    lipschitz: Tensor


def constants(blocks: Tensor) -> Constants:
    """The constants of an operator, from its blocks."""
    rest = _eye(blocks) - blocks
    return Constants(torch.linalg.eigvalsh((rest + rest.mH) / 2).amin(), torch.linalg.matrix_norm(rest, 2).amax())


@dataclass(frozen=True, kw_only=True)
class Splitting(ABC):
    """A map with the same equilibrium that contracts: an affine one with a matrix M, joined with one that does not
    expand, so that the factor is the spectral norm of M.

    Args:
        step: :math:`\\alpha>0`. ``None``: of a few candidates, the step with the least factor. The choice takes
            spectral norms of the blocks at every call, which cost more than the solve from some hundred features on.
    """

    step: float | None = None

    def __post_init__(self) -> None:
        if self.step is not None:
            check_positive(self, "step")

    @abstractmethod
    def steps(self, known: Constants) -> list[Tensor]:
        """The candidates for the step."""

    @abstractmethod
    def matrix(self, blocks: Tensor, step: float | Tensor) -> Tensor:
        """The blocks of M."""

    def chosen(self, blocks: Tensor) -> float | Tensor:
        """The step: the given one, or the best of the candidates."""
        if self.step is not None:
            return self.step
        with torch.no_grad():
            tried = torch.stack(self.steps(constants(blocks)))
            return tried[torch.stack([_norm(self.matrix(blocks, step)) for step in tried]).argmin()]

    @abstractmethod
    def offset(self, shifted: Tensor, b: Tensor, step: float | Tensor) -> Tensor:
        """The constant term of the map, given the product ``M b`` (``shifted``)."""

    @abstractmethod
    def map(self, product: Callable[[Tensor], Tensor], u: Tensor, offset: Tensor) -> Tensor:
        """One step, given the product with M."""

    @abstractmethod
    def value(self, u: Tensor) -> Tensor:
        """The state of the cell that belongs to a state of the splitting."""


@final
@dataclass(frozen=True, kw_only=True)
class ForwardBackward(Splitting):
    """:math:`z\\leftarrow\\mathrm{relu}(z-\\alpha((I-W)z-b))`; contracts for :math:`\\alpha<2m/L^2`.

    Args:
        step: see :class:`Splitting`.
    """

    def steps(self, known: Constants) -> list[Tensor]:
        m, size = known
        return [m / size**2, 2 / (m + size), 1 / size]

    def matrix(self, blocks: Tensor, step: float | Tensor) -> Tensor:
        eye = _eye(blocks)
        return eye - step * (eye - blocks)

    def offset(self, shifted: Tensor, b: Tensor, step: float | Tensor) -> Tensor:
        return step * b

    def map(self, product: Callable[[Tensor], Tensor], u: Tensor, offset: Tensor) -> Tensor:
        return torch.relu(product(u) + offset)

    def value(self, u: Tensor) -> Tensor:
        return u


@final
@dataclass(frozen=True, kw_only=True)
class PeacemanRachford(Splitting):
    """:math:`u\\leftarrow(2V-I)|u|+2\\alpha Vb`, :math:`z=\\mathrm{relu}(u)`, with the inverse
    :math:`V=(I+\\alpha(I-W))^{-1}`; contracts for every :math:`\\alpha`, and in fewer steps than
    :class:`ForwardBackward`. :math:`|u|=2\\,\\mathrm{relu}(u)-u` is the reflection of the activation.

    Args:
        step: see :class:`Splitting`.
    """

    def steps(self, known: Constants) -> list[Tensor]:
        m, size = known
        return [1 / size, (m * size) ** -0.5]

    def matrix(self, blocks: Tensor, step: float | Tensor) -> Tensor:
        eye = _eye(blocks)
        return 2 * torch.linalg.inv(eye + step * (eye - blocks)) - eye

    def offset(self, shifted: Tensor, b: Tensor, step: float | Tensor) -> Tensor:
        return step * (shifted + b)

    def map(self, product: Callable[[Tensor], Tensor], u: Tensor, offset: Tensor) -> Tensor:
        return product(u.abs()) + offset

    def value(self, u: Tensor) -> Tensor:
        return torch.relu(u)


def _eye(blocks: Tensor) -> Tensor:
    return torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)


def _norm(blocks: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(blocks, 2).amax()


@final
class MonotoneCell(nn.Module):
    """The map :math:`\\mathrm{relu}(Wz+b)`. Plain iteration of it may diverge: :class:`MonotoneEquilibrium` converges.

    Args:
        operator: the operator W.
    """

    def __init__(self, operator: MonotoneOperator):
        super().__init__()
        self.operator = operator

    def forward(self, z: Tensor, b: Tensor) -> Tensor:
        """One application of the map; both are ``[batch, features]``, or ``[batch, channels, height, width]``."""
        return torch.relu(self.operator.product(self.operator.blocks(z), z) + b)

    def certificate(self, z: Tensor, b: Tensor) -> Certificate:
        """See :func:`~torchimplicit.diagnostics.certify`."""
        return _certificate(self.operator, self.operator.blocks(z), z, b)


def _certificate(operator: MonotoneOperator, blocks: Tensor, z: Tensor, b: Tensor) -> Certificate:
    """Bounds the error of ``z`` by one step of Peaceman-Rachford splitting, in double precision.

    The splitting's state :math:`u=z+\\alpha((W-I)z+b)` is its fixed point exactly where z is the equilibrium, and
    relu does not expand: the distance of u from the fixed point bounds that of z."""
    blocks = blocks.detach().to(torch.promote_types(blocks.dtype, torch.float64))
    z, b = z.detach().double(), b.detach().double()
    if not bool((torch.view_as_real(blocks) if blocks.is_complex() else blocks).isfinite().all()):
        raise ValueError("the weights are not finite, and nothing is proved of them")
    split = PeacemanRachford()
    step = split.chosen(blocks)
    matrix = split.matrix(blocks, step)
    product = partial(operator.product, matrix)
    offset = split.offset(product(b), b, step)
    u = z + step * (operator.product(blocks, z) - z + b)

    def norm(states: Tensor) -> Tensor:
        return row_norm(states.reshape(len(states), -1))

    rounding = 2 * z[0].numel() ** 1.5 * torch.finfo(z.dtype).eps
    factor = _norm(matrix) * (1 + rounding)
    moved = norm(split.map(product, u, offset) - u) + rounding * (norm(u) + norm(offset))
    known = constants(blocks)
    error = contraction(factor, moved, "the Peaceman-Rachford step of this monotone operator")
    error = error + norm(z - split.value(u))
    return Certificate(factor, "Euclidean", moved, error, known.monotonicity, 1 / known.monotonicity)


class _Split(nn.Module):
    """A splitting's map as a cell: ``(u, offset, M) -> u``."""

    def __init__(self, operator: MonotoneOperator, splitting: Splitting):
        super().__init__()
        self.operator = operator
        self.splitting = splitting

    def forward(self, u: Tensor, offset: Tensor, matrix: Tensor) -> Tensor:
        return self.splitting.map(partial(self.operator.product, matrix), u, offset)


@final
class MonotoneEquilibrium(nn.Module):
    """The equilibrium of :math:`z=\\mathrm{relu}(Wz+g(x))`: it exists and is unique for every input, and operator
    splitting converges to it from every start (Winston and Kolter 2020, arXiv 2006.08591).

    The splitting is a contraction with a known factor, so that plain iteration needs neither damping nor line search.

    Args:
        operator: W, a :class:`DenseMonotone` or :class:`ConvMonotone`.
        injection: g, a module from the input to a tensor like the state; ``None``: the identity.
        splitting: :class:`PeacemanRachford` or :class:`ForwardBackward`.
        solver: solver for the splitting's fixed point; ``None``: :class:`FixedPointIteration`, 2000 steps at most.
        gradient: gradient estimator at the equilibrium; ``None``: :class:`Implicit`.
    """

    def __init__(
        self,
        operator: MonotoneOperator,
        injection: nn.Module | None = None,
        *,
        splitting: Splitting | None = None,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ):
        super().__init__()
        self.cell = MonotoneCell(operator)
        self.injection = nn.Identity() if injection is None else injection
        split = _Split(operator, splitting or PeacemanRachford())
        solver = solver or FixedPointIteration(max_steps=2000)
        self.equilibrium = Equilibrium(split, solver=solver, gradient=gradient)

    def forward(self, x: Tensor, z0: Tensor | None = None) -> Tensor:
        """The equilibrium, like ``[batch, features]`` or ``[batch, channels, height, width]``.

        Args:
            x: the input.
            z0: where the splitting starts; ``None``: zeros.
        """
        b = self.injection(x)
        return _equilibrium(self.equilibrium, lambda: self.cell.operator.blocks(b), b, z0)

    def certificate(self, z: Tensor, x: Tensor) -> Certificate:
        """See :func:`~torchimplicit.diagnostics.certify`; the sensitivity is that to :math:`g(x)`."""
        return self.cell.certificate(z, self.injection(x))


def _equilibrium(layer: Equilibrium, weight: Callable[[], Tensor], b: Tensor, z0: Tensor | None) -> Tensor:
    assert isinstance(layer.cell, _Split)
    split, operator = layer.cell.splitting, layer.cell.operator
    with without_autocast(b.device):  # an inverse and norms, once a call
        blocks = weight()
        step = split.chosen(blocks)
        matrix = split.matrix(blocks, step)
        b = b.to(blocks.real.dtype)
        offset = split.offset(operator.product(matrix, b), b, step)
    return split.value(layer(offset, matrix, z0=z0))


@final
class LipschitzEquilibrium(nn.Module):
    """An equilibrium layer whose Lipschitz constant is at most ``bound``, at any weights (Revay, Wang and Manchester
    2020, "Lipschitz bounded equilibrium networks", arXiv 2010.01732, with :math:`\\Psi=I`).

    :math:`z=\\mathrm{relu}(Wz+Ux+b)`, :math:`y=Cz+d`, where
    :math:`W=(1-m)I-A^TA+B-B^T-\\tfrac1{2\\gamma}(UU^T+C^TC)`. For two inputs the activation gives
    :math:`\\langle\\Delta z,(I-W)\\Delta z\\rangle\\le\\langle U^T\\Delta z,\\Delta x\\rangle`, and the last term of W
    turns that into :math:`\\lVert C\\Delta z\\rVert\\le\\gamma\\lVert\\Delta x\\rVert`, whatever the weights.

    Args:
        in_features, features, out_features: sizes of the input, the state and the output.
        bound: :math:`\\gamma>0`.
        margin, splitting, solver, gradient: as for :class:`MonotoneEquilibrium`.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        out_features: int,
        *,
        bound: float,
        margin: float = 0.1,
        splitting: Splitting | None = None,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ):
        super().__init__()
        if not 0 < bound < float("inf"):
            raise ValueError(f"LipschitzEquilibrium: bound is {bound}, and must be a positive finite number")
        self.bound = bound
        self.injection, self.readout = nn.Linear(in_features, features), nn.Linear(features, out_features)
        self.operator = DenseMonotone(features, margin=margin)
        split = _Split(self.operator, splitting or PeacemanRachford())
        solver = solver or FixedPointIteration(max_steps=2000)
        self.equilibrium = Equilibrium(split, solver=solver, gradient=gradient)

    def weight(self) -> Tensor:
        """W, ``[features, features]``."""
        u, c = self.injection.weight, self.readout.weight
        return self.operator.blocks(u) - (u @ u.mT + c.mT @ c) / (2 * self.bound)

    def state(self, x: Tensor) -> Tensor:
        """The equilibrium z, ``[batch, features]``."""
        return _equilibrium(self.equilibrium, self.weight, self.injection(x), None)

    def forward(self, x: Tensor) -> Tensor:
        """The output, ``[batch, out_features]``."""
        return self.readout(self.state(x))

    def certificate(self, z: Tensor, x: Tensor) -> Certificate:
        """See :func:`~torchimplicit.diagnostics.certify`, for the state z; the sensitivity is that of the output to x,
        the lesser of ``bound`` and :math:`\\lVert C\\rVert\\lVert U\\rVert/m`."""
        of_state = _certificate(self.operator, self.weight(), z, self.injection(x))
        assert of_state.monotonicity is not None
        direct = _norm(self.readout.weight.double()) * _norm(self.injection.weight.double()) / of_state.monotonicity
        return Certificate(
            of_state.factor,
            of_state.metric,
            of_state.residual,
            of_state.error,
            of_state.monotonicity,
            direct.clamp_max(self.bound),
        )

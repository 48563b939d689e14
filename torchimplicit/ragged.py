"""Batches of independent problems of different sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from torchimplicit.constraints import LinearEquality
from torchimplicit.coordinates import Metric
from torchimplicit.problems import FixedPoint, Minimum, Root


@final
@dataclass(frozen=True)
class Ragged:
    """A batch of problems whose states have different lengths: molecules, graphs, time series.

    Each state is padded with zeros to the length of the longest, and each problem is extended to its padding by one
    whose solution is zero (a quadratic energy, a map to zero), so that every solver, linear solver and estimator works.
    The problems share the solver's kernels, and each still has its own function, tolerance and status::

        ragged = ti.Ragged.of(starts)
        problem = ragged.minimum(energies, weights, totals)
        solution = ti.solve(problem, ragged.pack(starts))
        densities = ragged.unpack(solution.value)

    On the padding the Hessian (the Jacobian of a root) has eigenvalues of 1, which a diagnostic of the spectrum sees.

    Args:
        sizes: the number of entries of each state.

    Raises:
        ValueError: ``sizes`` is empty, or holds a number below 1.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or any(size < 1 for size in self.sizes):
            raise ValueError(f"Ragged.sizes is {self.sizes}: give the length of at least one state, each at least 1")

    @staticmethod
    def of(states: Sequence[Tensor]) -> Ragged:
        """The batch with the sizes of ``states``, each ``[n]``."""
        for i, state in enumerate(states):
            if not isinstance(state, Tensor) or state.ndim != 1:
                raise ValueError(f"state {i} must be a tensor [n], but it is {_described(state)}: flatten it")
        return Ragged(tuple(map(len, states)))

    @property
    def widest(self) -> int:
        """The length of the longest state."""
        return max(self.sizes)

    def pack(self, states: Sequence[Tensor]) -> Tensor:
        """Pad one tensor ``[n]`` per problem to ``[batch, widest]``; differentiable."""
        self._matching(states, "states")
        for i, (state, size) in enumerate(zip(states, self.sizes, strict=True)):
            if state.shape != (size,):
                raise ValueError(f"state {i} has shape {tuple(state.shape)} where the batch has ({size},)")
        return torch.stack([torch.nn.functional.pad(s, (0, self.widest - len(s))) for s in states])

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The tensors ``[n]``, one per problem, of a padded one ``[batch, widest]``; differentiable."""
        if packed.shape != (len(self.sizes), self.widest):
            raise ValueError(
                f"the batch has shape {(len(self.sizes), self.widest)}, but this tensor has {tuple(packed.shape)}"
            )
        return [row[:size] for row, size in zip(packed, self.sizes, strict=True)]

    def minimum(
        self,
        energies: Sequence[Callable[..., Tensor]],
        weights: Sequence[Tensor] | None = None,
        totals: Sequence[float] | Tensor | None = None,
        metric: Sequence[Tensor] | None = None,
        *,
        eliminate: bool = False,
    ) -> Minimum:
        """The minima of ``energies``, one function per problem.

        Args:
            energies: functions ``energy(p, *args)`` of a state ``[n]`` and the arguments given to :func:`solve`, each
                returning a scalar.
            weights, totals: those of the constraints :math:`\\langle w, p\\rangle = N`, for each problem ``[n]`` and a
                number; ``None`` for no constraints.
            metric: each problem's :math:`S`, ``[n, n]``: see :class:`Metric`.
            eliminate: see :class:`Minimum`.
        """
        self._matching(energies, "energies")
        if (weights is None) != (totals is None):
            raise ValueError("a constraint needs both weights and totals: give both, or neither")

        def energy(z: Tensor, *args: Any) -> Tensor:
            total = torch.stack([e(p, *args) for e, p in zip(energies, self.unpack(z), strict=True)])
            return total + 0.5 * torch.where(self._padding(z), z, 0).square().sum(dim=1)

        constraint = None
        if weights is not None and totals is not None:
            self._matching(totals, "totals")
            total = totals if isinstance(totals, Tensor) else torch.stack([torch.as_tensor(t) for t in totals])
            constraint = LinearEquality(self.pack(weights), total)
        metrics = None if metric is None else self.metric(metric)
        return Minimum(energy, constraint, metric=metrics, eliminate=eliminate)

    def fixed_point(self, functions: Sequence[Callable[..., Tensor]]) -> FixedPoint:
        """The fixed points of ``functions``, one ``f(p, *args) -> like p`` of a state ``[n]`` per problem."""
        return FixedPoint(self._mapped(functions))

    def root(self, functions: Sequence[Callable[..., Tensor]]) -> Root:
        """The roots of ``functions``, one ``f(p, *args) -> like p`` of a state ``[n]`` per problem."""
        mapped = self._mapped(functions)

        def with_padding(z: Tensor, *args: Any) -> Tensor:
            return mapped(z, *args) + torch.where(self._padding(z), z, 0)

        return Root(with_padding)

    def metric(self, matrices: Sequence[Tensor]) -> Metric:
        """The metric of one :math:`S` (``[n, n]``) per problem, with the identity on the padding."""
        self._matching(matrices, "matrices")
        padded = []
        for i, (s, size) in enumerate(zip(matrices, self.sizes, strict=True)):
            if s.shape != (size, size):
                raise ValueError(f"matrix {i} has shape {tuple(s.shape)} where its state has {size} numbers")
            padded.append(torch.block_diag(s, torch.eye(self.widest - size, dtype=s.dtype, device=s.device)))
        return Metric(torch.stack(padded))

    def _mapped(self, functions: Sequence[Callable[..., Tensor]]) -> Callable[..., Tensor]:
        self._matching(functions, "functions")

        def every(z: Tensor, *args: Any) -> Tensor:
            return self.pack([f(p, *args) for f, p in zip(functions, self.unpack(z), strict=True)])

        return every

    def _padding(self, z: Tensor) -> Tensor:
        """Entries that are padding, bool ``[batch, widest]``."""
        places = torch.arange(self.widest, device=z.device)
        return places >= torch.tensor(self.sizes, device=z.device)[:, None]

    def _matching(self, items: Sequence[Any] | Tensor, what: str) -> None:
        """Raise unless there is one item per problem."""
        if len(items) != len(self.sizes):
            raise ValueError(f"there are {len(self.sizes)} problems, but {len(items)} {what}: give one for each")


def _described(state: Any) -> str:
    return f"of shape {tuple(state.shape)}" if isinstance(state, Tensor) else f"a {type(state).__name__}"

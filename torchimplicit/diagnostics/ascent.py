"""The ascent condition of the phantom-gradient paper (Geng et al. 2021, Theorem 1)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit._solve import flat_system
from torchimplicit.diagnostics.compare import Attached
from torchimplicit.errors import ConvergenceWarning
from torchimplicit.flat_problem import tensors_of
from torchimplicit.gradients import Gradient, OneStep
from torchimplicit.linear.confirmed import separated
from torchimplicit.problems import Problem
from torchimplicit.state import Layout


@dataclass(frozen=True)
class AscentCondition:
    """The two sides of eqs. 6 and 8 of Geng et al. (2021), for a state of n numbers and p parameters.

    In the notation of the documentation :math:`D=f_\\theta^T` (``[p, n]``), :math:`G=(I-J)^T`, and
    :math:`\\hat Au` is the estimate for the cotangent u.

    Attributes:
        left: :math:`\\lVert\\hat AG-D\\rVert_2`, the left side of eq. 6.
        series_left: :math:`\\lVert MG-I\\rVert_2`, the left side of eq. 8, for an estimate :math:`\\hat A=DM`.
        sigma_min, sigma_max: the least and the largest singular value of D. The least is zero if p < n.
    """

    left: float
    series_left: float
    sigma_min: float
    sigma_max: float

    @property
    def right(self) -> float:
        """:math:`\\sigma_{min}^2/\\sigma_{max}`, the right side of eq. 6."""
        return self.sigma_min**2 / self.sigma_max if self.sigma_max else 0.0

    @property
    def condition(self) -> float:
        """:math:`\\kappa=\\sigma_{max}/\\sigma_{min}`, infinite if p < n."""
        return self.sigma_max / self.sigma_min if self.sigma_min else math.inf

    @property
    def series_right(self) -> float:
        """:math:`1/\\kappa^2`, the right side of eq. 8."""
        return 1 / self.condition**2

    @property
    def holds(self) -> bool:
        """True if eq. 6 holds: then the estimate is an ascent direction for every loss (eq. 7)."""
        return self.left < self.right

    @property
    def series_holds(self) -> bool:
        """True if eq. 8 holds, which implies eq. 6."""
        return self.series_left < self.series_right

    @property
    def cosine(self) -> float:
        """A lower bound of the cosine between the estimate and the exact gradient, for every cotangent.

        With :math:`\\epsilon=\\lVert\\hat AG-D\\rVert/\\sigma_{min}<1`, the relative error of the estimate is at most
        :math:`\\epsilon`, and its cosine at least :math:`\\sqrt{1-\\epsilon^2}`; otherwise the bound is −1.
        """
        if self.left >= self.sigma_min:
            return -1.0
        return math.sqrt(1 - (self.left / self.sigma_min) ** 2)


def ascent_condition(
    problem: Problem,
    z: Any,
    *args: Any,
    gradient: Gradient,
    wrt: Sequence[Tensor] | None = None,
    limit: int = 1000,
) -> AscentCondition:
    """Evaluate the ascent condition of Geng et al. (2021), Theorem 1, exactly, from dense matrices.

    The whole batch is one system, as for the gradient of shared parameters; for one sample give a batch of one. It
    costs n backward passes of the estimator and n passes through the map, for a state of n numbers.

    The condition is sufficient for all cotangents at once, and therefore so strict that it seldom holds: never with
    fewer parameters than numbers in the state. For large models there is no cheap and reliable bound of the least
    singular value; use :func:`compare_gradients` there, whose ``relative_error`` below 1 is the same condition for one
    cotangent.

    Args:
        problem, z, args: the problem and its solution, as for :func:`solve`.
        gradient: the estimator; a random one draws anew for every column.
        wrt: see :func:`compare_gradients`.
        limit: the largest n that is accepted.

    Raises:
        ValueError: a state larger than ``limit``, or an estimator that needs the solver's own steps.
    """
    problem = problem.own_coordinates()
    if wrt is None:
        wrt = tensors_of(problem, z, args)
    z = pytree.tree_map(lambda t: t.detach(), z)
    layout = Layout.of(z, problem.batched)
    system, flat, params = flat_system(problem, z, args)
    if flat.numel() > limit:
        raise ValueError(
            f"the state has {flat.numel()} numbers, more than the limit of {limit} for dense matrices: use fewer "
            "samples, or compare_gradients, which tests one cotangent"
        )
    with torch.no_grad():
        operator, _ = separated(system.operator(system.linearize(flat, params), True))
        blocks = operator.dense().double()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore", ConvergenceWarning)
        # the one-step estimate (the JFB of Fung et al. 2022) replaces the inverse by I, so that its gradient map is D
        _, d = _matrices(Attached(problem, z, args, OneStep()), layout, flat, wrt)
        m, a = _matrices(Attached(problem, z, args, gradient), layout, flat, wrt)
    g = torch.block_diag(*blocks)
    values = torch.linalg.svdvals(d)
    return AscentCondition(
        left=float(torch.linalg.matrix_norm(a @ g - d, 2)),
        series_left=float(torch.linalg.matrix_norm(m @ g - torch.eye(len(g)).to(g), 2)),
        sigma_min=float(values[-1]) if d.shape[0] >= d.shape[1] else 0.0,
        sigma_max=float(values[0]),
    )


def _matrices(attached: Attached, layout: Layout, flat: Tensor, wrt: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The estimator's maps of cotangents to adjoint vectors ``[n, n]`` and to gradients ``[p, n]``."""
    adjoints, gradients = [], []
    for i in range(flat.numel()):
        u = torch.zeros_like(flat)
        u.view(-1)[i] = 1
        adjoint, pulled = attached.pull(layout.unflatten(u), wrt)
        adjoints.append(layout.flatten(adjoint, "the adjoint").reshape(-1).double())
        gradients.append(torch.cat([t.reshape(-1).double() for t in pulled]))
    return torch.stack(adjoints, dim=1), torch.stack(gradients, dim=1)

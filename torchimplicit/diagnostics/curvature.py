"""The extreme eigenvalues of a minimum's Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchimplicit._solve import flat_system
from torchimplicit.compiler import untraced
from torchimplicit.inference import outside_inference_mode
from torchimplicit.linear.confirmed import separated
from torchimplicit.linear.extremes import extreme_eigenvalues
from torchimplicit.linear.preconditioners import Preconditioner, as_preconditioner
from torchimplicit.problems import LeastSquares, Minimum
from torchimplicit.validation import at_least


class Curvature(NamedTuple):
    """The least and the largest eigenvalue, each ``[batch]`` (a scalar if the problem is not batched). If samples
    depend on each other, they are the eigenvalues of the whole batch."""

    least: Tensor
    largest: Tensor

    @property
    def condition(self) -> Tensor:
        """The condition number; infinite where the Hessian is not positive definite."""
        return torch.where(self.least > 0, self.largest / self.least, torch.inf)


@untraced()
@outside_inference_mode
def curvature(
    problem: Minimum | LeastSquares,
    z: Any,
    *args: Any,
    subspace: int = 128,
    seed: int = 0,
    preconditioner: Preconditioner | Callable[[Tensor], Tensor] | None = None,
) -> Curvature:
    """The extreme eigenvalues of the Hessian of the energy on the constraint, :math:`PHP` on the range of :math:`P`.

    If the least eigenvalue is negative, the point is a saddle, where an adjoint solve gives a gradient of the wrong
    sign; if it is near zero, the derivative of the solution is very large. States of up to ``subspace`` dimensions get
    exact eigenvalues from a dense Hessian; larger ones the extreme Ritz values of ``subspace`` Lanczos steps with full
    reorthogonalization (Saad 2011, section 6.3). These lie inside the spectrum: a negative Ritz value proves a negative
    eigenvalue. With a preconditioner, some twenty products give a few digits, also from inside (Davidson's method;
    Saad 2011, section 8.4). Not differentiable.

    Args:
        problem, z, args: as for :func:`solve`; ``z`` is usually the solution's value.
        subspace: the largest number of products with the Hessian.
        seed: the seed of the first vectors.
        preconditioner: an approximation of the Hessian, such as the :class:`~torchimplicit.linear.ReferenceHessian` of
            the solver that found ``z``, or a function :math:`v \\mapsto M^{-1}v`.

    Raises:
        TypeError: the problem is neither a :class:`Minimum` nor a :class:`LeastSquares`.
        ValueError: ``subspace`` is below 2.
    """
    if not isinstance(problem, (Minimum, LeastSquares)):
        raise TypeError(f"curvature needs a Minimum or a LeastSquares, not a {type(problem).__name__}")
    at_least("curvature", "subspace", subspace, 2)
    with torch.no_grad():
        system, flat, params = flat_system(problem, z, args)
        operator, samples = separated(system.operator(system.linearize(flat, params), False))
        # a preconditioner acts on single samples, and cannot be used on the whole batch as one system
        usable = as_preconditioner(preconditioner) if samples == 1 else None
        ends = extreme_eigenvalues(operator, subspace, seed, usable)
        least, largest = (end.repeat_interleave(samples) for end in ends)
    least, largest = least.to(flat.dtype), largest.to(flat.dtype)
    return Curvature(least, largest) if problem.batched else Curvature(least[0], largest[0])

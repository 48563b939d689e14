"""The spectral radius of a map at a point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchimplicit._solve import flat_system
from torchimplicit.compiler import untraced
from torchimplicit.inference import outside_inference_mode
from torchimplicit.linear.arnoldi import arnoldi
from torchimplicit.linear.confirmed import separated
from torchimplicit.precision import widened
from torchimplicit.problems import Problem
from torchimplicit.validation import at_least


@untraced()
@outside_inference_mode
def spectral_radius(
    problem: Problem, z: Any, *args: Any, subspace: int = 64, restarts: int = 3, seed: int = 0
) -> Tensor:
    """The largest modulus of an eigenvalue of :math:`J=\\partial f/\\partial z`, per sample.

    Below 1 the plain iteration converges near ``z``. For a root or a minimum, :math:`J = I - A`, the Jacobian of the
    plain step. For states of at most ``subspace`` numbers the result is exact. For larger ones it comes from restarted
    Arnoldi iteration (Saad 2011, section 6.2), which finds complex pairs as well as real eigenvalues. The error is
    below 1e-3 for random and for symmetric Jacobians; if hundreds of eigenvalues share the largest modulus (a scaled
    orthogonal matrix), the result is one or two percent too small. Not differentiable.

    Args:
        problem: the problem with the map.
        z: the state at which to evaluate the Jacobian, as for :func:`solve`.
        args: as for :func:`solve`.
        subspace: the dimension of each Krylov space.
        restarts: the number of Krylov spaces, each built from the best vector of the last.
        seed: the seed of the first vector.

    Returns:
        ``[batch]`` (a scalar if the problem is not batched). If samples depend on each other, it is the spectral radius
        of the whole batch.

    Raises:
        ValueError: ``subspace`` is below 2, or ``restarts`` below 1.
    """
    at_least("spectral_radius", "subspace", subspace, 2)
    at_least("spectral_radius", "restarts", restarts, 1)
    with torch.no_grad():
        system, flat, params = flat_system(problem, z, args)
        operator, samples = separated(system.operator(system.linearize(flat, params), True))
        if operator.dim <= subspace:
            identity = torch.eye(operator.dim, dtype=flat.dtype, device=flat.device)
            radius = torch.linalg.eigvals(widened(identity - operator.dense())).abs().amax(dim=1)
        else:
            generator = torch.Generator().manual_seed(seed)
            start = torch.randn(operator.batch, operator.dim, generator=generator).to(flat)
            for _ in range(restarts):
                value, vector = arnoldi(lambda v: v - operator.product(v), start, subspace).largest()
                # a real start that spans, with its images, the plane of a complex pair
                radius, start = value.abs(), (vector.real + vector.imag).to(flat.dtype)
    radius = radius.repeat_interleave(samples)
    return radius.to(flat.dtype) if problem.batched else radius[0].to(flat.dtype)

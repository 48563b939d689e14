"""A penalty on the spectral radius of the map's Jacobian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from torchimplicit._solve import flat_system
from torchimplicit.closure import transforms_running
from torchimplicit.compiler import untraced
from torchimplicit.errors import UnsupportedDerivativeError
from torchimplicit.inference import outside_inference_mode
from torchimplicit.linear.arnoldi import RitzPairs, arnoldi
from torchimplicit.linear.confirmed import separated
from torchimplicit.precision import widened
from torchimplicit.problems import FixedPoint, Problem, Root
from torchimplicit.problems.system import vjp
from torchimplicit.state import Layout
from torchimplicit.validation import at_least


@untraced()
@outside_inference_mode
def spectral_penalty(
    problem: Problem,
    z: Any,
    *args: Any,
    limit: float = 0.9,
    subspace: int = 20,
    exact: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:math:`\\max(0,\\rho(J)-\\text{limit})^2`, averaged over the batch: plain iteration converges where
    :math:`\\rho<1`.

    The dominant eigenvalue, a real one or one of a complex pair, is found by Arnoldi iteration: power iteration that
    uses all of its vectors. Its derivative is that of an eigenvalue,
    :math:`\\mathrm d\\lambda=u^T\\,\\mathrm dJ\\,v/u^Tv` with the right and the left eigenvector, which is exact where
    the iteration has converged and the eigenvalue is simple. ``exact=False`` takes the right one in the place of the
    left one, as the derivative of one more step of power iteration does: half the products, exact for normal matrices
    only (symmetric, orthogonal). Differentiable, once, in whatever ``f`` depends on, and in ``z``.

    Args:
        problem: a :class:`FixedPoint` or a :class:`Root`, whose :math:`J=I-A` is that of the plain step.
        z: the state, as for :func:`solve`: a solution, or a detached one for the cheaper term.
        args: as for :func:`solve`.
        limit: the spectral radius up to which there is no penalty.
        subspace: dimension of the Krylov subspace; each dimension takes a product with J, and one with its transpose if
            ``exact``. For states of no more numbers the Jacobian is assembled.
        exact: whether the derivative takes the left eigenvector, see above.
        generator: random generator of the first vector, on the state's device; ``None``: the global one.

    Returns:
        a scalar. Where samples depend on each other, the radius is that of the whole batch.

    Raises:
        UnsupportedDerivativeError: in a backward pass that is to be differentiated again, and under ``torch.func``.
    """
    if not isinstance(problem, FixedPoint | Root):
        raise TypeError(f"spectral_penalty needs a map: give FixedPoint or Root, not {type(problem).__name__}")
    at_least("spectral_penalty", "subspace", subspace, 2)
    if transforms_running():
        raise UnsupportedDerivativeError(_FIRST_ORDER)
    with torch.no_grad():
        system, point, params = flat_system(problem, z, args)
        operator, _ = separated(system.operator(system.linearize(point, params), False))
        flipped = operator.transposed_product
        assert flipped is not None
        shape = operator.batch, operator.dim
        if operator.dim <= subspace:
            identity = torch.eye(operator.dim, dtype=point.dtype, device=point.device).expand(operator.batch, -1, -1)
            matrix = widened(identity - operator.dense())
            pairs = (torch.linalg.eig(m) for m in (matrix, matrix.mT))
            right, left = (RitzPairs(values, vectors, widened(identity)) for values, vectors in pairs)
        else:
            start = torch.randn(shape, generator=generator, device=point.device, dtype=point.dtype)
            right = arnoldi(lambda v: v - operator.product(v), start, subspace)
            left = arnoldi(lambda v: v - flipped(v), start, subspace) if exact else right
        value, v = right.largest()
        other, u = left.of((left.values - value[:, None]).abs().argmin(dim=1)) if exact else (value, v.conj())
        # Where the two iterations found different eigenvalues, or the vectors are orthogonal (a defective matrix, whose
        # eigenvalue has no derivative), the right vector stands in for the left one.
        overlap = (u * v).sum(dim=1).abs() / (u.norm(dim=1) * v.norm(dim=1))
        apart = (other - value).abs() > 0.1 * value.abs()
        lost = (overlap <= torch.finfo(overlap.dtype).eps ** 0.5) | apart
        u = torch.where(lost[:, None], v.conj(), u)
        u = u / (u * v).sum(dim=1, keepdim=True)
    layout = Layout.of(z, problem.batched)
    flat = layout.flatten(z, "z")

    def plain_step(flat: Tensor) -> Tensor:
        out = problem.flat_output(layout, problem.function(layout.unflatten(flat), *args), flat.shape[0], cast=True)
        return flat - out if isinstance(problem, Root) else out

    _, pull = vjp(plain_step, flat)
    pulled = [pull(part.reshape(flat.shape).to(flat.dtype))[0].reshape(shape) for part in (u.real, u.imag)]
    # d lambda = u^T dJ v: the pulled-back vector is J^T u, recorded, and v is a constant
    moving = torch.complex(*(widened(part) for part in pulled)) * v
    size = moving.sum(dim=1).abs()
    radius = value.abs() + size - size.detach()
    excess = (radius - limit).clamp_min(0).square().mean()
    return _Once.apply(excess.to(flat.dtype))


_FIRST_ORDER = (
    "spectral_penalty has a first derivative only, by backward(), since its eigenvectors are constants in it: leave "
    "out create_graph=True and torch.func, or take jacobian_frobenius, which has every order"
)


class _Once(Function):
    """The identity; differentiating its derivative raises."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise UnsupportedDerivativeError(_FIRST_ORDER)
        return grad

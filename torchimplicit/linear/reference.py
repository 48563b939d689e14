"""A Hessian that is assembled once, as a preconditioner at nearby points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.preconditioners import Preconditioner, PreparedPreconditioner
from torchimplicit.precision import working_dtype
from torchimplicit.validation import check_count, check_positive


@final
@dataclass(frozen=True, kw_only=True)
class ReferenceHessian(Preconditioner):
    """The operator's own matrix, assembled at the first point of a solve and kept for the steps near it.

    One dense Hessian, from ``dim`` products and an eigendecomposition, serves :class:`LBFGS` as its model of the
    curvature, and :class:`MINRES` or :class:`CG` as preconditioner. Eigenvalues are replaced by their moduli, so that
    it is positive definite where the Hessian is not (a modified Newton method; Nocedal and Wright 2006, section 3.4).

    Each solve makes its own. For a sequence of nearby problems, as in training where slowly changing energies of the
    same batch are minimized and an adjoint system is solved for each, :meth:`init` returns an object that carries the
    Hessian from one solve to the next::

        reference = ReferenceHessian().init()
        solver = LBFGS(preconditioner=reference)
        gradient = Implicit(linear_solver=MINRES(preconditioner=reference))

    Args:
        refresh_after: a minimization makes it anew, at the point reached, after this many steps; after a linear solve
            that took more, the next one makes it anew.
        floor: the smallest modulus of an eigenvalue, relative to the largest of the same sample.

    Raises:
        ValueError: a number is out of range; or, when it is made, the Hessian is not finite.
    """

    refresh_after: int = 25
    floor: float = 1e-6

    def __post_init__(self) -> None:
        check_count(self, "refresh_after")
        check_positive(self, "floor")

    def init(self) -> HessianMemory:
        """An empty memory for a sequence of solves."""
        return HessianMemory(self)

    def outlived(self, steps: int) -> bool:
        return steps >= self.refresh_after

    @torch.no_grad()
    def prepare(self, operator: LinearOperator, definite: bool = False) -> PreparedPreconditioner:
        spectrum = self.spectrum(operator.spectrum_matrix(working_dtype(operator.dtype)))
        return _of_spectrum(*spectrum, setup_rows=operator.batch * operator.dim)

    def spectrum(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """The eigenvectors ``[batch, dim, dim]`` of symmetric matrices, and the floored moduli of their eigenvalues
        ``[batch, dim]``."""
        if not bool(matrix.isfinite().all()):
            raise ValueError(
                "ReferenceHessian cannot be made at a point where the Hessian is not finite: start from a point at "
                "which the energy has finite second derivatives"
            )
        # moduli: near a saddle the model descends along directions of negative curvature instead of climbing them
        values, basis = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
        moduli = values.abs()
        largest = moduli.amax(dim=1, keepdim=True)
        return basis, moduli.maximum(self.floor * torch.where(largest > 0, largest, 1))


@final
class HessianMemory(Preconditioner):
    """A :class:`ReferenceHessian` that is carried from solve to solve.

    The first system that it is prepared for becomes the reference; so does the next one after a refresh, and the first
    one of another shape. Use one for each batch of problems that is solved repeatedly. The cost of a solve, and its
    result within the tolerance, depend on what was solved before with the same memory.

    Args:
        reference: how the reference is made, and when it is made anew.
    """

    def __init__(self, reference: ReferenceHessian):
        self.reference = reference
        self._spectrum: tuple[Tensor, Tensor] | None = None

    def outlived(self, steps: int) -> bool:
        return self.reference.outlived(steps)

    def after_solve(self, steps: Tensor) -> None:
        """Forget the reference if a sample took more than ``refresh_after`` steps with it."""
        if bool((steps > self.reference.refresh_after).any()):
            self.refresh()

    def refresh(self) -> None:
        """Forget the reference: the next system that is prepared becomes it."""
        self._spectrum = None

    @torch.no_grad()
    def keep(self, matrix: Tensor) -> None:
        """Take a given Hessian as the reference, where there is a cheaper way than ``dim`` products.

        Args:
            matrix: ``[batch, dim, dim]``, symmetric, in the coordinates of the solver (those of the metric, where the
                problem has one). Under a linear equality it may be the whole Hessian: the part along the constraint's
                weight is projected out.

        Raises:
            ValueError: ``matrix`` has another shape, or is not finite.
        """
        if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
            raise ValueError(f"the reference must be a tensor [batch, dim, dim], not {tuple(matrix.shape)}")
        self._spectrum = self.reference.spectrum(matrix.to(working_dtype(matrix.dtype)))

    @torch.no_grad()
    def prepare(self, operator: LinearOperator, definite: bool = False) -> PreparedPreconditioner:
        setup_rows = 0
        if self._spectrum is None or not _fits(self._spectrum[0], operator):
            self.keep(operator.spectrum_matrix(working_dtype(operator.dtype)))
            setup_rows = operator.batch * operator.dim
        assert self._spectrum is not None
        return _of_spectrum(*self._spectrum, setup_rows=setup_rows)


def _fits(basis: Tensor, operator: LinearOperator) -> bool:
    return basis.shape[:2] == (operator.batch, operator.dim) and basis.device == operator.device


def _of_spectrum(basis: Tensor, moduli: Tensor, setup_rows: int = 0) -> PreparedPreconditioner:
    def apply(v: Tensor) -> Tensor:
        turned = torch.bmm(v.to(basis.dtype).expand(len(basis), -1)[:, None], basis)[:, 0]
        return torch.bmm(basis, (turned / moduli)[:, :, None])[:, :, 0].to(v.dtype)

    return PreparedPreconditioner(
        inverse=apply,
        transposed_inverse=apply,
        restrict=lambda rows: _of_spectrum(basis[rows], moduli[rows]),
        setup_rows=setup_rows,
    )

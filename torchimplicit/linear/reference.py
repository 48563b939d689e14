"""A Hessian that was once assembled, as a preconditioner for what comes near it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.preconditioners import Preconditioner, PreparedPreconditioner
from torchimplicit.precision import working_dtype
from torchimplicit.validation import check_count, check_positive


@dataclass
class _Kept:
    """The spectra of the reference: eigenvectors ``[batch, dim, dim]``, moduli of the eigenvalues ``[batch, dim]``."""

    basis: Tensor | None = None
    moduli: Tensor | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceHessian(Preconditioner):
    """The operator's own matrix, assembled where it is first needed and kept: for a sequence of nearby systems.

    A training run minimizes slowly changing energies of the same batch again and again, and solves an adjoint system
    for each. One dense Hessian, from ``dim`` products and an eigendecomposition, serves :class:`LBFGS` as its model of
    the curvature and :class:`MINRES` or :class:`CG` as preconditioner for many of them. Eigenvalues are replaced by
    their moduli, so that it is positive definite where the Hessian is not (a modified Newton method; Nocedal and Wright
    2006, section 3.4).

    It remembers: use one for each batch of problems that is solved repeatedly. A batch of another shape has it made
    anew.

    Args:
        refresh_after: a minimization that is not done after this many steps has it made anew at the point reached; a
            linear solve that took more has the next one make it anew.
        floor: the least modulus of an eigenvalue, relative to the largest of the same sample.
    """

    refresh_after: int = 25
    floor: float = 1e-6
    _kept: _Kept = field(default_factory=_Kept, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self, "refresh_after")
        check_positive(self, "floor")

    def after_solve(self, steps: Tensor) -> None:
        """Forget the reference if a sample took more than ``refresh_after`` steps with it."""
        if int(steps.max()) > self.refresh_after:
            self.refresh()

    def refresh(self) -> None:
        """Forget the reference: the next system that is prepared becomes it."""
        self._kept.basis = self._kept.moduli = None

    @torch.no_grad()
    def keep(self, matrix: Tensor) -> None:
        """Take a Hessian that was assembled some cheaper way than by products.

        Args:
            matrix: ``[batch, dim, dim]``, symmetric, in the coordinates of the solver (those of the metric, where the
                problem has one). On a constraint, of weight n in these coordinates, it may be the whole Hessian.
        """
        if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
            raise ValueError(f"ReferenceHessian keeps a matrix [batch, dim, dim], and this is {tuple(matrix.shape)}")
        self._kept.basis, self._kept.moduli = self._spectrum(matrix.to(working_dtype(matrix.dtype)))

    @torch.no_grad()
    def prepare(self, operator: LinearOperator, definite: bool = False) -> PreparedPreconditioner:
        basis, moduli = self._kept.basis, self._kept.moduli
        made = basis is None or moduli is None or not _fits(basis, operator)
        if basis is None or moduli is None or made:
            basis, moduli = self._assemble(operator)
            self._kept.basis, self._kept.moduli = basis, moduli
        return _of_spectrum(basis, moduli, setup_rows=operator.batch * operator.dim if made else 0)

    def _assemble(self, operator: LinearOperator) -> tuple[Tensor, Tensor]:
        return self._spectrum(operator.spectrum_matrix(working_dtype(operator.dtype)))

    def _spectrum(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if not bool(matrix.isfinite().all()):
            raise ValueError(
                "ReferenceHessian was to be made at a point where the Hessian is not finite: start from a point at "
                "which the energy has second derivatives"
            )
        values, basis = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
        moduli = values.abs()
        largest = moduli.amax(dim=1, keepdim=True)
        return basis, moduli.maximum(self.floor * torch.where(largest > 0, largest, 1))


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

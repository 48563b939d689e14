"""Linear solvers: batches of systems that are given by their products, each sample solved to its own tolerance."""

from torchimplicit.linear.base import BlockSolver, LinearSolution, LinearSolver
from torchimplicit.linear.bicgstab import BiCGStab
from torchimplicit.linear.cg import CG
from torchimplicit.linear.cycle import Method
from torchimplicit.linear.dense import Dense
from torchimplicit.linear.gmres import GMRES
from torchimplicit.linear.iterative import IterativeSolver
from torchimplicit.linear.kfac import KFAC
from torchimplicit.linear.krylov_or_dense import KrylovOrDense
from torchimplicit.linear.lsmr import LSMR
from torchimplicit.linear.minres import MINRES
from torchimplicit.linear.neumann import Neumann
from torchimplicit.linear.operator import LinearOperator
from torchimplicit.linear.preconditioners import (
    Diagonal,
    Factorized,
    Inverse,
    Jacobi,
    Preconditioner,
    PreparedPreconditioner,
)
from torchimplicit.linear.reference import HessianMemory, ReferenceHessian

__all__ = [
    "CG",
    "GMRES",
    "KFAC",
    "LSMR",
    "MINRES",
    "BiCGStab",
    "BlockSolver",
    "Dense",
    "Diagonal",
    "Factorized",
    "HessianMemory",
    "Inverse",
    "IterativeSolver",
    "Jacobi",
    "KrylovOrDense",
    "LinearOperator",
    "LinearSolution",
    "LinearSolver",
    "Method",
    "Neumann",
    "Preconditioner",
    "PreparedPreconditioner",
    "ReferenceHessian",
]

"""The solvers: how a solution is found."""

from torchimplicit.solvers.anderson import Anderson
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.broyden import Broyden
from torchimplicit.solvers.chandrupatla import Chandrupatla
from torchimplicit.solvers.fixed_point_iteration import FixedPointIteration
from torchimplicit.solvers.gradient_descent import GradientDescent
from torchimplicit.solvers.iterate import iterate
from torchimplicit.solvers.lbfgs import LBFGS
from torchimplicit.solvers.levenberg_marquardt import LevenbergMarquardt
from torchimplicit.solvers.newton_cg import NewtonCG
from torchimplicit.solvers.newton_krylov import NewtonKrylov
from torchimplicit.solvers.polyalgorithm import Polyalgorithm, in_turn
from torchimplicit.solvers.projected_newton import ProjectedNewton
from torchimplicit.solvers.pseudo_transient import PseudoTransient
from torchimplicit.solvers.result import SolverResult
from torchimplicit.solvers.reversible import ReversibleIteration
from torchimplicit.solvers.trust_region import TrustRegion

__all__ = [
    "LBFGS",
    "Anderson",
    "Broyden",
    "Chandrupatla",
    "Evaluator",
    "FixedPointIteration",
    "GradientDescent",
    "LevenbergMarquardt",
    "Move",
    "NewtonCG",
    "NewtonKrylov",
    "Polyalgorithm",
    "Progress",
    "ProjectedNewton",
    "PseudoTransient",
    "ReversibleIteration",
    "Solver",
    "SolverResult",
    "TrustRegion",
    "in_turn",
    "iterate",
]

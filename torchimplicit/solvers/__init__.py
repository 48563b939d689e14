"""The solvers: how is the point found?"""

from torchimplicit.solvers.anderson import Anderson
from torchimplicit.solvers.base import Evaluator, Move, Progress, Solver
from torchimplicit.solvers.broyden import Broyden
from torchimplicit.solvers.chandrupatla import Chandrupatla
from torchimplicit.solvers.fixed_point_iteration import FixedPointIteration
from torchimplicit.solvers.gradient_descent import GradientDescent
from torchimplicit.solvers.iterate import iterate
from torchimplicit.solvers.lbfgs import LBFGS
from torchimplicit.solvers.levenberg_marquardt import LevenbergMarquardt
from torchimplicit.solvers.newton_krylov import NewtonKrylov
from torchimplicit.solvers.outcome import Outcome
from torchimplicit.solvers.projected_newton import ProjectedNewton

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
    "NewtonKrylov",
    "Outcome",
    "Progress",
    "ProjectedNewton",
    "Solver",
    "iterate",
]

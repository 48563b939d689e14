"""The problems: which point is the output?"""

from torchimplicit.problems.base import Problem
from torchimplicit.problems.fixed_point import FixedPoint
from torchimplicit.problems.joint_inference import JointInference, JointState
from torchimplicit.problems.least_squares import LeastSquares
from torchimplicit.problems.minimum import Minimum
from torchimplicit.problems.root import Root
from torchimplicit.problems.system import Judgement, Point, System

__all__ = [
    "FixedPoint",
    "JointInference",
    "JointState",
    "Judgement",
    "LeastSquares",
    "Minimum",
    "Point",
    "Problem",
    "Root",
    "System",
]

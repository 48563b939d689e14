"""Implicit layers for PyTorch: state a problem, solve it, differentiate the solution to any order."""

from torchimplicit import derivatives, nn, regularizers
from torchimplicit._attach import attach
from torchimplicit._linear_solve import linear_solve
from torchimplicit._resolve import Resolved, resolve
from torchimplicit._solve import solve
from torchimplicit.constraints import (
    Box,
    L2Ball,
    LinearEqualities,
    LinearEquality,
    LinearInequalities,
    NonNegative,
    Projection,
    Proximal,
    Simplex,
)
from torchimplicit.coordinates import Metric
from torchimplicit.diagnostics import spectral_radius
from torchimplicit.errors import (
    CaptureWarning,
    ConvergenceWarning,
    SmoothnessWarning,
    SolveError,
    UnsupportedDerivativeError,
)
from torchimplicit.gradients import (
    AdaptivePhantom,
    DampedImplicit,
    Envelope,
    EquilibriumPropagation,
    FixedInput,
    GaussNewton,
    Implicit,
    NeumannPhantom,
    OneStep,
    SharedInverse,
    UnbiasedNeumann,
    Unrolled,
    UnrolledPhantom,
    WhenUnconverged,
)
from torchimplicit.linear import CG, GMRES, LSMR, MINRES, BiCGStab, Dense, Neumann
from torchimplicit.notices import SolveCounts, solve_counts
from torchimplicit.problems import FixedPoint, JointInference, JointState, LeastSquares, Minimum, Root
from torchimplicit.ragged import Ragged
from torchimplicit.solution import Report, Solution, Status
from torchimplicit.solvers import (
    LBFGS,
    Anderson,
    Broyden,
    Chandrupatla,
    FixedPointIteration,
    GradientDescent,
    LevenbergMarquardt,
    NewtonCG,
    NewtonKrylov,
    Polyalgorithm,
    ProjectedNewton,
    PseudoTransient,
    TrustRegion,
)

__version__ = "0.1.0"

__all__ = [
    "CG",
    "GMRES",
    "LBFGS",
    "LSMR",
    "MINRES",
    "AdaptivePhantom",
    "Anderson",
    "BiCGStab",
    "Box",
    "Broyden",
    "CaptureWarning",
    "Chandrupatla",
    "ConvergenceWarning",
    "DampedImplicit",
    "Dense",
    "Envelope",
    "EquilibriumPropagation",
    "FixedInput",
    "FixedPoint",
    "FixedPointIteration",
    "GaussNewton",
    "GradientDescent",
    "Implicit",
    "JointInference",
    "JointState",
    "L2Ball",
    "LeastSquares",
    "LevenbergMarquardt",
    "LinearEqualities",
    "LinearEquality",
    "LinearInequalities",
    "Metric",
    "Minimum",
    "Neumann",
    "NeumannPhantom",
    "NewtonCG",
    "NewtonKrylov",
    "NonNegative",
    "OneStep",
    "Polyalgorithm",
    "ProjectedNewton",
    "Projection",
    "Proximal",
    "PseudoTransient",
    "Ragged",
    "Report",
    "Resolved",
    "Root",
    "SharedInverse",
    "Simplex",
    "SmoothnessWarning",
    "Solution",
    "SolveCounts",
    "SolveError",
    "Status",
    "TrustRegion",
    "UnbiasedNeumann",
    "Unrolled",
    "UnrolledPhantom",
    "UnsupportedDerivativeError",
    "WhenUnconverged",
    "attach",
    "derivatives",
    "linear_solve",
    "nn",
    "regularizers",
    "resolve",
    "solve",
    "solve_counts",
    "spectral_radius",
]

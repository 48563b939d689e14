"""The gradient estimators: how a solution is differentiated."""

from torchimplicit.gradients.adaptive_phantom import AdaptivePhantom, PhantomReport
from torchimplicit.gradients.base import Gradient
from torchimplicit.gradients.damped_implicit import DampedImplicit
from torchimplicit.gradients.equilibrium_propagation import EquilibriumPropagation
from torchimplicit.gradients.gauss_newton import GaussNewton
from torchimplicit.gradients.implicit import Implicit
from torchimplicit.gradients.joint import Envelope, FixedInput
from torchimplicit.gradients.linear_estimate import LinearEstimate
from torchimplicit.gradients.neumann_phantom import NeumannPhantom
from torchimplicit.gradients.nodes import DerivativeRule, FirstOrderRule
from torchimplicit.gradients.one_step import OneStep
from torchimplicit.gradients.reversible import Reversible
from torchimplicit.gradients.shared_inverse import SharedInverse
from torchimplicit.gradients.unbiased_neumann import UnbiasedNeumann
from torchimplicit.gradients.unrolled import Unrolled
from torchimplicit.gradients.unrolled_phantom import UnrolledPhantom
from torchimplicit.gradients.when_unconverged import WhenUnconverged

__all__ = [
    "AdaptivePhantom",
    "DampedImplicit",
    "DerivativeRule",
    "Envelope",
    "EquilibriumPropagation",
    "FirstOrderRule",
    "FixedInput",
    "GaussNewton",
    "Gradient",
    "Implicit",
    "LinearEstimate",
    "NeumannPhantom",
    "OneStep",
    "PhantomReport",
    "Reversible",
    "SharedInverse",
    "UnbiasedNeumann",
    "Unrolled",
    "UnrolledPhantom",
    "WhenUnconverged",
]

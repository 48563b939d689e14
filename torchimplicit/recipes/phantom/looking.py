"""The recipe of Fig. 2: an image classifier whose gradient is looked at along training, many estimators at once."""

from __future__ import annotations

from torchimplicit.gradients import (
    AdaptivePhantom,
    Gradient,
    Implicit,
    NeumannPhantom,
    UnbiasedNeumann,
    UnrolledPhantom,
)
from torchimplicit.linear import GMRES
from torchimplicit.recipes.phantom.images import Classification, ready
from torchimplicit.recipes.runtime.monitor import MonitorGradient
from torchimplicit.recipes.runtime.trainer import Trainer

BESIDE: dict[str, Gradient] = {
    "npg-1-1": NeumannPhantom(steps=1, damping=1.0),
    "npg-2-0.5": NeumannPhantom(steps=2, damping=0.5),
    "npg-5-0.5": NeumannPhantom(steps=5, damping=0.5),
    "npg-9-0.5": NeumannPhantom(steps=9, damping=0.5),
    "npg-5-1": NeumannPhantom(steps=5, damping=1.0),
    "upg-5-0.5": UnrolledPhantom(steps=5, damping=0.5),
    "adaptive-0.3": AdaptivePhantom(tolerance=0.3, max_steps=60),
    "adaptive-0.1": AdaptivePhantom(tolerance=0.1, max_steps=60),
    "unbiased-5-0.5": UnbiasedNeumann(steps=5, survival=0.9, damping=0.5),
}
"""What is compared with the exact gradient, by the name in the log; for people they are :data:`LABELS`."""

EXACT = Implicit(linear_solver=GMRES(rtol=1e-5, max_steps=400, restart=100))
"""A long Krylov space, for weights at which the Jacobian's spectral radius is above 1."""


def monitor(every: int) -> MonitorGradient:
    """The callback."""
    return MonitorGradient(every, exact=EXACT, beside=BESIDE)


RUNNER = Trainer(Classification, ready, monitor)

"""The optimizers by name."""

from __future__ import annotations

from typing import Literal

OptimizerName = Literal["least-squares", "l-bfgs", "adam"]
"""A trust-region Gauss-Newton method with exact Jacobians, L-BFGS (both SciPy's), or Adam with a cosine."""

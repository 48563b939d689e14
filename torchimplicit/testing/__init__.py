"""Suites of tests that a new solver, linear solver or gradient estimator inherits; they need pytest."""

import pytest

pytest.register_assert_rewrite(
    "torchimplicit.testing.gradient_suite",
    "torchimplicit.testing.linear_suite",
    "torchimplicit.testing.solver_suite",
)

from torchimplicit.testing.gradient_suite import GradientSuite  # noqa: E402
from torchimplicit.testing.linear_suite import LinearSolverSuite  # noqa: E402
from torchimplicit.testing.solver_suite import SolverSuite  # noqa: E402

__all__ = ["GradientSuite", "LinearSolverSuite", "SolverSuite"]

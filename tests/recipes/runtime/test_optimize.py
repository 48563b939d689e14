"""The optimizers of residuals, on residuals that are not to be had."""

from __future__ import annotations

import numpy as np
import pytest

from torchimplicit.recipes.runtime.errors import DivergedError
from torchimplicit.recipes.runtime.optimize import gauss_newton, l_bfgs


class Line:
    """Residuals x - 1, which are not found above ``reach``."""

    def __init__(self, reach: float):
        self.reach = reach

    def residuals(self, vector):
        return np.where(vector > self.reach, np.inf, vector - 1)

    def jacobian(self, vector):
        return np.eye(len(vector))


def test_a_start_without_a_solution_is_told_in_words() -> None:
    with pytest.raises(DivergedError, match=r"not finite at the weights that training starts from.*--inner-steps"):
        gauss_newton(Line(-1.0), np.zeros(2), lambda *_: 0.0)


def test_it_steps_back_from_what_is_not_found() -> None:
    seen = []
    gauss_newton(Line(1.5), np.array([1.4, -6.0]), lambda vector, loss: seen.append(loss) or 0.0)
    assert seen[-1] < 1e-20


def test_l_bfgs_begins_with_a_short_step() -> None:
    """A slope of length one far from quadratic: SciPy's own first trial would have length one."""
    tried = []

    class Steep(Line):
        def loss_and_gradient(self, vector):
            tried.append(vector.copy())
            return float(np.cosh(5 * vector).sum()), 5 * np.sinh(5 * vector)

    start = np.array([0.4, -0.3])
    reached = []
    l_bfgs(Steep(np.inf), start, lambda vector, loss: reached.append((vector, loss)) or 0.0)
    assert np.linalg.norm(tried[1] - start) < 0.11
    assert np.abs(reached[-1][0]).max() < 1e-6
    assert reached[-1][1] == pytest.approx(2.0)

"""The optimizers of residuals, on residuals that are not to be had."""

from __future__ import annotations

import numpy as np
import pytest

from torchimplicit.recipes.errors import DivergedError
from torchimplicit.recipes.optimizing.optimizers import gauss_newton


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

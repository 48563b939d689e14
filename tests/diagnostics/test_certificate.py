"""What certify refuses. What it proves is in tests/models/test_monotone.py and test_positive_concave.py."""

from __future__ import annotations

import pytest
import torch

import torchimplicit as ti
from torchimplicit.diagnostics import certify
from torchimplicit.models import ResidualCell


def test_a_map_of_which_nothing_is_proved():
    x = torch.zeros(2, 3)
    solution = ti.solve(ti.FixedPoint(lambda z, x: 0.5 * torch.tanh(z) + x), x, x)
    with pytest.raises(ValueError, match=r"nothing is proved of function.*spectral_radius"):
        certify(solution)
    with pytest.raises(ValueError, match="nothing is proved of ResidualCell"):
        certify(ResidualCell(4), torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 3))


def test_a_solution_that_is_cut_off():
    layer = ti.nn.Equilibrium(torch.nn.Identity())
    layer.solution = ti.solve(ti.FixedPoint(torch.cos), torch.zeros(1, 1)).figures()
    with pytest.raises(ValueError, match=r"layer\.solve\(x\)"):
        certify(layer.solution)

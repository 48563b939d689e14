"""Operators on images: linear, and what their names say."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning")

from torchimplicit.recipes import operators
from torchimplicit.recipes.operators import Blur, Downsample, Known, Matrix, Radon, made, smoothed
from torchimplicit.recipes.runtime.errors import UserError

ALL = [Blur(1.2), Downsample(3), Known.drawn(0.3, 9, 12), Radon(7), Matrix(torch.randn(5, 216).double())]


@pytest.mark.parametrize("operator", ALL, ids=lambda o: type(o).__name__)
def test_linear(operator) -> None:
    torch.manual_seed(0)
    one, other = torch.rand(2, 1, 2, 9, 12).double()
    torch.testing.assert_close(operator(2 * one - other), 2 * operator(one) - operator(other))
    both = torch.cat((one, other))
    torch.testing.assert_close(operator(both)[1:], operator(other))


def test_what_they_do() -> None:
    flat = torch.full((1, 1, 12, 12), 0.7).double()
    torch.testing.assert_close(Blur(2.0)(flat), flat)
    spot = torch.zeros(1, 1, 33, 33).double()
    spot[..., 16, 16] = 1
    place = torch.arange(33) - 16.0
    assert float((Blur(2.0)(spot)[0, 0].sum(0) * place.square()).sum()) == pytest.approx(4.0, rel=0.05)
    assert Downsample(5)(flat).shape == (1, 1, 3, 3)
    torch.testing.assert_close(Downsample(5)(flat), flat[..., :3, :3])
    assert Known.drawn(0.25, 12, 12)(flat).shape == (1, 1, 36)


def test_line_integrals_of_a_disc() -> None:
    x = (torch.arange(65) - 32.0) / 32.5
    disc = ((x[:, None].square() + x.square()) < 0.36).double()[None, None]
    found = Radon(9)(disc)[0, 0]
    exact = (0.36 - x.double().square()).clamp_min(0).sqrt()
    assert float((found - exact).abs().max()) < 0.08
    assert float((found - exact).abs().mean()) < 0.01
    high = torch.zeros(1, 1, 65, 65).double()
    high[..., 10, 32] = 1
    assert float(Radon(2)(high)[0, 0, 0].argmax()) == 32, "the first angle looks along the columns"
    assert int(Radon(2)(high)[0, 0, 1].argmax()) in (10, 54), "and the second along the rows"


def test_smoothing_solves_the_normal_equations() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, 8, 8).double()
    operator = Blur(1.0)
    found = smoothed(operator, operator(image), image, 1e-2).requires_grad_()
    energy = (operator(found) - operator(image)).square().sum()
    energy = energy + 1e-2 * (found.diff(dim=-1).square().sum() + found.diff(dim=-2).square().sum())
    (slope,) = torch.autograd.grad(energy, found)
    assert float(slope.abs().max()) < 1e-3


def test_sizes_that_make_no_sense() -> None:
    assert isinstance(made("blur", None, 8, 8), Blur)
    for name, size, words in (
        ("mask", 2.0, "share of pixels"),
        ("downsample", 2.5, "whole number"),
        ("downsample", 20.0, "leaves nothing"),
        ("radon", -1.0, "positive"),
    ):
        with pytest.raises(UserError, match=words):
            made(name, size, 8, 8)
    with pytest.raises(UserError, match="a matrix"):
        operators.Matrix(torch.ones(2, 5))(torch.ones(1, 1, 2, 2))

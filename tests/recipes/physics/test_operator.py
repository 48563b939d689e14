"""Darcy flow: its flows, the neural operators, and a training of a few steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning")

from rich.console import Console

from torchimplicit.models.neural_operator import NeuralOperator, SpectralConvolution
from torchimplicit.recipes.physics.operator import RUNNER, OperatorConfig, flows, permeabilities, pressure
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import RunOptions, create
from torchimplicit.recipes.runtime.settings import Machine, Optimization
from torchimplicit.recipes.runtime.trainer import Results

TINY = OperatorConfig(
    optimization=Optimization(steps=4, batch_size=4, validate_every=2, learning_rate=3e-3),
    machine=Machine(device="cpu", tensorboard=False),
    width=4,
    modes=3,
    grid=7,
    depth=2,
    training_flows=8,
    held_out_flows=4,
)


def test_the_pressure_is_that_of_known_flows():
    # Poisson's equation has a series
    u = pressure(torch.full((33, 33), 2.0, dtype=torch.float64))
    x = torch.arange(1, 32, dtype=torch.float64) / 32
    series = torch.zeros(31, 31, dtype=torch.float64)
    for k in range(1, 40, 2):
        for j in range(1, 40, 2):
            wave = torch.sin(k * torch.pi * x)[:, None] * torch.sin(j * torch.pi * x)
            series += 16 / (torch.pi**4 * k * j * (k**2 + j**2)) * wave
    torch.testing.assert_close(2 * u, series, rtol=0, atol=2e-4)


def test_the_scheme_is_of_second_order():
    fine, coarse = (pressure(permeabilities(1, grid, 1.0, 5)[0]) for grid in (63, 15))
    middle = pressure(permeabilities(1, 31, 1.0, 5)[0])
    gaps = [
        (part - fine[step - 1 :: step, step - 1 :: step]).norm() / len(part)
        for part, step in ((coarse, 4), (middle, 2))
    ]
    assert 3 < gaps[0] / gaps[1] < 7


def test_fields_are_the_same_functions_on_every_grid():
    one, other = permeabilities(2, 7, 1.0, 3), permeabilities(2, 15, 1.0, 3)
    torch.testing.assert_close(one, other[:, ::2, ::2])
    assert float(permeabilities(200, 7, 0.5, 0).log().std()) == pytest.approx(0.5, rel=0.1)


def test_a_spectral_convolution_does_not_depend_on_the_grid():
    torch.manual_seed(0)
    layer = SpectralConvolution(1, 1, 3)
    with pytest.raises(ValueError, match="a grid of 3 has no 3 modes"):
        layer(torch.zeros(1, 1, 3, 3))
    # a finer grid has nearly the same values at the points that both have
    coarse, fine = (torch.ones(1, 1, n, n) for n in (16, 32))
    one, other = layer(coarse), layer(fine)[..., ::2, ::2]
    assert float(((one - other).norm() / one.norm()).detach()) < 0.1


def test_twins_of_equal_size():
    counts = {
        kind: sum(p.numel() for p in NeuralOperator(kind, width=width, modes=8).parameters())
        for kind, width in (("equilibrium", 20), ("tied", 20), ("explicit", 10))
    }
    assert counts["equilibrium"] == counts["tied"]
    assert counts["explicit"] == pytest.approx(counts["equilibrium"], rel=0.01)


@pytest.mark.parametrize("model", ["equilibrium", "tied", "explicit"])
def test_a_training(tmp_path, model):
    config = replace(TINY, model=model)
    run = create("operator-darcy", RunOptions(output=tmp_path / "run"))
    run.describe("operator-darcy", config)
    assert RUNNER.train(config, run, Console(quiet=True))
    found = Results.of(run)
    assert found.test.figures["error"] < 1.2
    assert len(flows(8, 7, 1.0, 0)[0]) == 8


def test_settings_that_make_no_sense():
    with pytest.raises(UserError, match="--grid 7 has no --modes 5"):
        replace(TINY, modes=5)

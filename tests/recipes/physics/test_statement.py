"""Equations of one's own: how they are stated, read from a file, and refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning")

from rich.console import Console

from torchimplicit.recipes.physics import solve_equation as runner
from torchimplicit.recipes.physics.equation_file import given
from torchimplicit.recipes.physics.solve_equation import PhysicsConfig
from torchimplicit.recipes.physics.statement import Condition, Equation, Names
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import RunOptions, create

DECAY = """
import torch
from torch import nn
from torchimplicit.models import CellField
from torchimplicit.recipes.physics.statement import Condition, Equation

times = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
equation = Equation(
    title="Decay",
    inputs={"t": (0.0, 1.0)},
    outputs=("y",),
    inside=lambda p: p.y_t + p.rate * p.y,
    conditions=(
        Condition(lambda p: p.y - 1, at={"t": 0.0}),
        Condition(lambda p: p.y - torch.exp(-2 * p.t), at=times),
    ),
    unknown={"rate": 1.0},
)

class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.input = nn.Linear(4, 4), nn.Linear(1, 4, bias=False)

    def forward(self, z, x):
        return torch.sin(self.inner(z) + self.input(x))

def field(equation):
    return CellField(equation.low, equation.high, Cell(), states=4, outputs=1)
"""


def written(tmp_path, text=DECAY):
    path = tmp_path / "decay.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("model", ["equilibrium", "network", "own"])
def test_an_equation_of_a_file_and_its_unknown_parameter(tmp_path, model):
    config = PhysicsConfig(equation=str(written(tmp_path)), model=model, points=12, iterations=15, states=5, page=False)
    runner.check(config)
    run = create("physics-equation", RunOptions(output=tmp_path / "run"))
    run.describe("physics-equation", config)
    assert runner.train(config, run, Console(quiet=True))
    results = run.read_json("results.json")
    assert results["unknown"]["rate"] == pytest.approx(2, abs=1e-2)
    assert results["errors"] == {}
    assert results["reference"] == ""
    runner.evaluate(config, run, Console(quiet=True))
    assert run.read_json("evaluation.json")["unknown"] == pytest.approx(results["unknown"])
    written(tmp_path, DECAY.replace("1.0}", "1.5}"))
    with pytest.raises(UserError, match="file has changed"):
        runner.evaluate(config, run, Console(quiet=True))


def test_names_of_derivatives():
    names = Names(("t", "x"), ("u", "v"), ("nu",))
    assert names.derivative("u") == (0, ())
    assert names.derivative("v_xxt") == (1, (0, 1, 1))
    assert names.derivative("w") is None
    assert names.derivative("u_y") is None
    assert names.derivative("u_") is None
    for wrong, match in (
        ((("t", "x"), ("t",), ()), "different names"),
        ((("x", "xa"), ("u",), ()), "may begin another's"),
        ((("x",), ("u_x",), ()), "cannot name"),
    ):
        with pytest.raises(UserError, match=match):
            Names(*wrong)


def test_points_of_conditions():
    equation = Equation(
        title="A disc",
        inputs={"x": (-1.0, 1.0), "y": (-1.0, 1.0)},
        outputs=("u",),
        inside=lambda p: (p.u_xx + p.u_yy, p.u_xxyy),
        conditions=(
            Condition(lambda p: p.u, at={"x": 0.0}),
            Condition(lambda p: p.u - p.y, at=lambda count: torch.rand(count, 2, dtype=torch.float64)),
        ),
        where=lambda points: points.square().sum(1) < 1,
    )
    line, given_points, inside = equation.stated(100, seed=0)
    assert (line.points[:, 0] == 0).all()
    assert given_points.points.shape == (10, 2)
    assert len(inside.points) == 100
    assert (inside.points.square().sum(1) < 1).all()
    assert inside.orders == ((0, 0), (1, 1), (0, 0, 1, 1))
    other = equation.stated(100, seed=0, held_out=True)[-1].points
    assert not torch.equal(other, inside.points)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("equation = 3", "must define 'equation'.* it is a int"),
        ("x = 1", "does not define it"),
        ("import torch\nraise ValueError('so')", "line 2: ValueError: so"),
        ("def (", "line 1: SyntaxError"),
        (DECAY.replace("p.rate *", "p.speed *"), "asks for 'speed', and there is none; there are t, y, rate"),
        (DECAY.replace("p.y_t +", "p.y_t.sum() +").replace("* p.y,", ","), "value for each of 10 points.* has shape"),
        (DECAY.replace('at={"t": 0.0}', 'at={"s": 0.0}'), "a condition is at 's'"),
        (DECAY.replace("(0.0, 1.0)", "(1.0, 0.0)"), "must run from a least to a greatest value"),
    ],
)
def test_files_that_are_refused(tmp_path, text, match):
    with pytest.raises(UserError, match=match):
        runner.problem_of(PhysicsConfig(equation=str(written(tmp_path, text)), points=10))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        given(str(tmp_path / "none.py"))
    path = written(tmp_path, DECAY.split("class Cell")[0])
    with pytest.raises(UserError, match="defines as 'field"):
        runner.field(PhysicsConfig(equation=str(path), model="own"))

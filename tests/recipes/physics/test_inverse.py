"""The table of equations' parameters, and measured values."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("lightning")

from rich.console import Console

from torchimplicit.recipes.physics import inverse as planned
from torchimplicit.recipes.physics import solve_equation as runner
from torchimplicit.recipes.physics.equations import INVERSE, inverse
from torchimplicit.recipes.physics.inverse import TABLE, PhysicsInverseConfig
from torchimplicit.recipes.physics.statement import Measured
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.jobs import prepare
from torchimplicit.recipes.runtime.table import Plan, Runs

TINY = PhysicsInverseConfig(
    plan=Plan(seeds=2), equations=("van-der-pol-mu-0",), iterations=25, ordinary_points=15, models=("network",)
)


def test_a_parameter_is_found_and_its_table_says_so(tmp_path):
    done = {}
    for job in planned.jobs(TINY):
        done[job.name] = prepare(job, tmp_path)
        assert runner.train(job.config, done[job.name], Console(quiet=True))
    summary = TABLE.summarize(TINY, done)
    (sheet,) = summary.sheets
    assert float(sheet.table.rows[0][5]) == pytest.approx(1.0, abs=0.05)
    assert len(summary.claims) == 1
    assert [drawing.name for drawing in summary.drawings] == ["parameters"]


def test_claims_follow_the_figures():
    def holds(equation: str, found: list[float]) -> bool | None:
        config = PhysicsInverseConfig(plan=Plan(seeds=2), equations=(equation,), models=("network",))
        figures = {
            job.name: {"unknown": {"mu": value}, "true": {"mu": 1.0}, "title": "VdP", "errors": {}}
            for job, value in zip(planned.jobs(config), found, strict=True)
        }
        (claim,) = planned.claims(config, Runs.made_by(planned.jobs(config), figures))
        return claim.holds

    assert holds("van-der-pol-mu-0", [1.005, 0.995])
    assert not holds("van-der-pol-mu-0", [1.05, 0.95])
    assert holds("van-der-pol-mu-5", [1.05, 0.97])
    assert not holds("van-der-pol-mu-5", [1.05, 1.051])


def test_noise_differs_from_seed_to_seed():
    equation = inverse("burgers-viscosity", 0.05)
    assert equation.true["lognu"] == pytest.approx(math.log(0.1 / math.pi))
    zero = {"u": lambda output, order: torch.zeros(100, dtype=torch.float64)}
    first, again, other = (equation.stated(20, seed)[3](zero["u"], {"lognu": torch.tensor(0.0)}) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert 0.01 < float((first - other).std()) < 0.2
    assert len(INVERSE) == 6


def test_values_from_a_table(tmp_path):
    file = tmp_path / "values.csv"
    file.write_text("t,u,other\n0.0,1.0,a\n0.5,0.7,b\n", encoding="utf-8")
    found = Measured.read(file, ("t",), ("u",))
    assert found.points.tolist() == [[0.0], [0.5]]
    assert found.values["u"].tolist() == [1.0, 0.7]
    with pytest.raises(UserError, match="no column 'v'; it has t, u, other"):
        Measured.read(file, ("t",), ("v",))
    with pytest.raises(UserError, match="a number in every cell"):
        Measured.read(file, ("t",), ("other",))
    with pytest.raises(UserError, match="cannot be read"):
        Measured.read(tmp_path / "none.csv", ("t",), ("u",))

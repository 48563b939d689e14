"""The table in which a training of a density functional tells its results."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("lightning")

from torchimplicit.recipes.density.quality import Finer, Quality
from torchimplicit.recipes.density.report import Part, table_of

ONE = Quality(
    name="H2",
    size=40,
    loss=1e-4,
    l1=0.03,
    energy_error=-2e-3,
    guess_loss=1e-3,
    guess_l1=0.15,
    negative=0.0,
    steps=8,
    evaluations=10.0,
    converged=True,
    trained_energy_error=-2e-3,
)
FINER = Finer(level=3, loss=2e-4, l1=0.04, guess_l1=0.15, energy_error=5e-3, converged=True, moved=1e-6)


def told(*parts: Part) -> dict[str, list[str]]:
    table = table_of(parts)
    return {column.title: [row[place] for row in table.rows] for place, column in enumerate(table.columns)}


def test_only_what_was_measured_is_told():
    table = told(Part("test", [ONE]), Part("validation", []))
    assert table["Molecules"] == ["test"]
    assert table["L"] == ["0.100 (MINAO 1.000)"]
    assert table["ΔE"] == ["2.0"]
    assert table["Better than MINAO"] == ["100"]
    assert not {"L, finer grid", "ΔE, as trained", "Spurious minima", "λmin", "Better than before"} & set(table)


def test_figures_that_one_part_has_are_a_dash_in_the_others():
    found = replace(ONE, finer=FINER, trained_energy_error=0.5, least=0.7)
    table = told(Part("before", [ONE]), Part("after", [found], spurious=0.5, improved=1.0, reference=[1e-3, -3e-3]))
    assert table["ΔE, constants refitted"] == ["–", "2.0"]  # the first part has those of training alone
    assert table["ΔE, as trained"] == ["2.0", "500.0"]
    assert table["L, finer grid"] == ["–", "0.200"]
    assert table["ΔE at the reference"] == ["–", "2.0"]
    assert table["Spurious minima"] == ["–", "50"]
    assert table["λmin"] == ["–", "0.700"]

"""What a density costs: molecules of any length, one measurement, and what the table makes of several."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from torchimplicit.recipes.density.chemistry import BOHR, symbol
from torchimplicit.recipes.density.cost import (
    SERIES,
    CostConfig,
    Measured,
    MeasurementConfig,
    alkane,
    claims,
    jobs,
    waters,
)
from torchimplicit.recipes.runtime.settings import to_plain
from torchimplicit.recipes.runtime.table import Runs


def lengths(geometry, first, second):
    """Of the bonds between two elements, in angstrom."""
    places = BOHR * np.array(geometry.positions)
    kinds = [symbol(charge) for charge in geometry.charges]
    pairs = [(i, j) for i in range(len(kinds)) for j in range(i) if {kinds[i], kinds[j]} == {first, second}]
    found = [float(np.linalg.norm(places[i] - places[j])) for i, j in pairs]
    return [one for one in found if one < 1.7]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_alkanes_have_their_bonds(count):
    made = alkane(count)
    assert Counter(map(symbol, made.charges)) == {"C": count, "H": 2 * count + 2}
    assert lengths(made, "C", "H") == pytest.approx([1.09] * (2 * count + 2))
    assert lengths(made, "C", "C") == pytest.approx([1.53] * (count - 1))
    places = BOHR * np.array(made.positions)
    apart = np.linalg.norm(places[:, None] - places, axis=-1)[np.triu_indices(len(places), 1)]
    assert apart.min() == pytest.approx(1.09)  # no two hydrogens are nearer than a bond


def test_waters_are_whole():
    made = waters(3)
    assert made.name == "(H2O)3"
    assert lengths(made, "O", "H") == pytest.approx([0.9572] * 6)


def test_a_measurement():
    pytest.importorskip("pyscf")
    from torchimplicit.recipes.density.cost import measured

    found = measured(MeasurementConfig(grid=0))
    assert (found.atoms, found.functions, found.converged) == (3, 134, True)
    assert min(found.integrals, found.minimization, found.forces, found.kohn_sham, found.gigabytes) > 0


def test_claims_compare_the_largest():
    config = CostConfig(alkanes=(1, 2), waters=(1,))

    def one(atoms, seconds):
        return to_plain(Measured(atoms, 10, 10, 10, 0.0, seconds, 0.0, 9, True, 1.0, 2.0 * atoms, 8))

    runs = {job.name: one(count, 0.5 * count**2) for job, count in zip(jobs(config), (4, 8, 1), strict=True)}
    made = list(claims(config, Runs.made_by(jobs(config), runs)))
    assert [claim.holds for claim in made] == [False, False, True, True]
    assert made[1].measured == "the powers are 2.0 and 1.0"
    assert set(SERIES) == {"alkanes", "waters"}

"""Molecules by name, and geometries that are refused before anything is computed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from torchimplicit.recipes.density.chemistry import (
    ATOMS,
    BOHR,
    Geometry,
    distorted,
    from_angstrom,
    named,
)
from torchimplicit.recipes.runtime.errors import UserError


def places(geometry):
    return np.array(geometry.positions) * BOHR


def angle(geometry, a, b, c):
    p = places(geometry)
    u, v = p[a] - p[b], p[c] - p[b]
    return math.degrees(math.acos(u @ v / np.linalg.norm(u) / np.linalg.norm(v)))


def test_known_molecules_have_their_bonds():
    water, ammonia, methane, ethene, methanal = map(named, ("H2O", "NH3", "CH4", "C2H4", "H2CO"))
    assert (water.charges, water.electrons, water.formula) == ((8, 1, 1), 10, "H2O")
    assert angle(water, 1, 0, 2) == pytest.approx(104.52)
    for other in (1, 2, 3):
        assert np.linalg.norm(places(ammonia)[other] - places(ammonia)[0]) == pytest.approx(1.012)
    assert angle(ammonia, 1, 0, 2) == pytest.approx(106.7)
    assert angle(ammonia, 2, 0, 3) == pytest.approx(106.7)
    assert angle(methane, 1, 0, 3) == pytest.approx(math.degrees(math.acos(-1 / 3)))
    assert np.linalg.norm(places(ethene)[2] - places(ethene)[0]) == pytest.approx(1.086)
    assert angle(ethene, 1, 0, 2) == pytest.approx(121.2)
    assert angle(methanal, 2, 0, 3) == pytest.approx(116.5)
    assert (ethene.formula, named("HCN").formula, named("HCl").formula) == ("C2H4", "CHN", "ClH")


@pytest.mark.parametrize("name", ATOMS)
def test_every_known_molecule_is_a_geometry(name):
    assert named(name).electrons % 2 == 0


def test_unknown_names_say_what_is_known():
    with pytest.raises(UserError, match=r"no molecule or file 'h2o' \(did you mean 'H2O'\?\); .*NH3, CH4"):
        named("h2o")
    with pytest.raises(UserError, match=r"'benzene'; the molecules known by name are He, H2"):
        named("benzene")


@pytest.mark.parametrize(
    ("atoms", "charge", "electrons", "said"),
    [
        ([], 0, None, "has no atoms"),
        ([("Xx", (0, 0, 0))], 0, None, "atom 1 is 'Xx', and there is no such element"),
        ([("I", (0, 0, 0)), ("H", (0, 0, 1.6))], 0, None, "atom 1 is I; elements beyond Kr are not supported"),
        ([("H", (0, 0, 0)), ("H", (0, 0, 0.1))], 0, None, r"atoms 1 \(H\) and 2 \(H\) are 0.100 angstrom apart"),
        ([("H", (0, 0, 0)), ("H", (0, 0, 0))], 0, None, "0.000 angstrom apart"),
        ([("H", (0, 0, math.nan)), ("H", (0, 0, 1))], 0, None, "position of atom 1 is not finite"),
        ([("H", (0, 0, 0))], 0, None, "1 electrons, an odd number: a radical has an open shell"),
        ([("H", (0, 0, 0)), ("H", (0, 0, 1))], 1, None, r"charge \+1 has 1 electrons, an odd number"),
        ([("H", (0, 0, 0)), ("H", (0, 0, 1))], 2, None, "no electrons left"),
        ([("H", (0, 0, 0)), ("H", (0, 0, 1))], 3, None, "no electrons left"),
        ([("H", (0, 0, 0)), ("H", (0, 0, 1))], 0, 4, "charge 2 in all .* hence 2 electrons, and 4 were asked for"),
    ],
)
def test_what_is_refused(atoms, charge, electrons, said):
    with pytest.raises(UserError, match=said):
        from_angstrom("mine", atoms, charge, electrons)


def test_ions_with_closed_shells_are_taken():
    hydroxide = from_angstrom("OH", [("O", (0, 0, 0)), ("H", (0, 0, 0.97))], charge=-1, electrons=10)
    assert (hydroxide.electrons, hydroxide.charge) == (10, -1)


@pytest.mark.parametrize("name", ATOMS)
def test_positions_in_bohr_are_doubted(name):
    there = named(name)
    bohr = replace(there, positions=tuple(tuple(x / BOHR for x in place) for place in there.positions))
    assert not there.doubt
    assert ("look like bohr" in bohr.doubt) == (len(there.charges) > 1)
    far = replace(there, positions=tuple(tuple(9 * x for x in place) for place in there.positions))
    assert not far.doubt  # atoms without bonds


def test_a_nuclear_charge_that_no_element_has():
    with pytest.raises(UserError, match="nuclear charge 0, and no element has"):
        Geometry(name="mine", charges=(0, 2), positions=((0, 0, 0), (0, 0, 3)))
    with pytest.raises(UserError, match="2 elements and 1 positions"):
        Geometry(name="mine", charges=(1, 1), positions=((0, 0, 0),))


def test_distortions_are_random_and_repeatable():
    water = named("H2O")
    one = distorted(water, 0.04, seed=0, copy=1)
    assert one.name == "H2O-d1"
    assert one == distorted(water, 0.04, seed=0, copy=1)
    assert one.positions != distorted(water, 0.04, seed=1, copy=1).positions
    assert one.positions != distorted(water, 0.04, seed=0, copy=2).positions
    moves = np.concatenate([(places(distorted(water, 0.04, 0, c)) - places(water)).ravel() for c in range(200)])
    assert moves.std() == pytest.approx(0.04, rel=0.05)
    assert abs(moves.mean()) < 0.004
    # two molecules are not distorted alike
    other = distorted(replace(water, name="other"), 0.04, seed=0, copy=1)
    assert other.positions != one.positions

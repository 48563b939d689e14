"""Densities in known potentials: their energies and slopes agree with each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("pyscf")

from torchimplicit.recipes.density import labels as files
from torchimplicit.recipes.density.chemistry import Geometry, named
from torchimplicit.recipes.density.compute import compute
from torchimplicit.recipes.density.labels import Labels, labelled
from torchimplicit.recipes.density.prepare import prepare_labels
from torchimplicit.recipes.density.settings import ChemistrySettings, LabelSettings
from torchimplicit.recipes.density.storage import BrokenFileError
from torchimplicit.recipes.runtime.errors import UserError

QUICK = {"grid": 0, "scf_grid": 1}
FEW = LabelSettings(count=4, farthest=2e-4)


@pytest.fixture(scope="module", params=["lda,pw", "pbe"])
def water(request: pytest.FixtureRequest) -> tuple[Labels, Geometry, ChemistrySettings]:
    geometry, chemistry = named("H2O"), ChemistrySettings(functional=request.param, **QUICK)
    return labelled(geometry, chemistry, FEW), geometry, chemistry


def test_slopes_are_those_of_the_energies(water) -> None:
    """The trapezoid of the slopes along the way between two densities is the difference of their energies."""
    labels, geometry, chemistry = water
    molecule = compute(geometry, chemistry).molecule()
    energy = labels.learned + labels.hartree + labels.attraction
    slope = labels.slope + labels.coefficients @ molecule.coulomb + molecule.external
    for one in range(1, len(energy)):
        moved = labels.coefficients[one] - labels.coefficients[0]
        trapezoid = 0.5 * (slope[one] + slope[0]) @ moved
        change = energy[one] - energy[0]
        assert float(change) > 5e-4  # the ground state is the lowest
        assert float(trapezoid) == pytest.approx(float(change), rel=0.02, abs=5e-5)


def test_the_first_is_the_ground_state(water) -> None:
    labels, geometry, chemistry = water
    record = compute(geometry, chemistry)
    assert float(labels.kinetic[0]) == pytest.approx(record.kinetic, abs=1e-4)
    energy = labels.learned + labels.hartree + labels.attraction
    assert float(energy[0]) == pytest.approx(record.energy - record.repulsion, abs=1e-6)
    molecule = record.molecule()
    slope = labels.slope[0] + labels.coefficients[0] @ molecule.coulomb + molecule.external
    along = torch.linalg.solve(molecule.overlap, molecule.weight)
    slope = slope - (slope @ along) / (molecule.weight @ along) * molecule.weight
    assert float(slope @ torch.linalg.solve(molecule.overlap, slope)) < 1e-6  # of squares; the others have about one


def test_densities_hold_the_electrons_at_the_distances_asked_for(water) -> None:
    labels, geometry, _ = water
    weight = compute(geometry, ChemistrySettings(**QUICK)).molecule().weight
    torch.testing.assert_close(labels.coefficients @ weight, torch.full((4,), 10.0, dtype=torch.float64))
    assert bool((labels.loss[1:] > 0.3 * FEW.nearest).all())
    assert bool((labels.loss[1::2] < 3 * FEW.farthest).all())  # the steps from the ground state
    assert bool((labels.gap > 0.05).all())


def test_files(tmp_path) -> None:
    """Computed once, in parallel too; what is damaged is computed again; another count is another file."""
    chemistry, settings = ChemistrySettings(**QUICK), LabelSettings(count=2)
    hydrogen = named("H2")
    both = [hydrogen, replace(hydrogen, name="other", positions=((0.0, 0.0, 0.0), (0.0, 0.0, 1.5)))]
    first = prepare_labels(both, chemistry, settings, tmp_path, workers=2)
    assert all(one.seconds > 0 and one.path is not None for one in first)
    read = files.read(first[0].path)
    again = labelled(hydrogen, chemistry, settings)
    assert (read.geometry, read.settings, read.chemistry) == (hydrogen, settings, chemistry)
    for name, tensor in vars(again).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        torch.testing.assert_close(getattr(read, name), tensor, rtol=1e-6, atol=1e-8)
    assert all(one.seconds == 0 for one in prepare_labels(both, chemistry, settings, tmp_path))
    content = bytearray(first[0].path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)  # more than a header, of which some bytes do not matter
    first[0].path.write_bytes(content)
    with pytest.raises(BrokenFileError, match="damaged"):
        files.read(first[0].path)
    mended = prepare_labels(both, chemistry, settings, tmp_path)
    assert [one.seconds > 0 for one in mended] == [True, False]
    assert "computed again" in mended[0].note
    assert files.file_name(hydrogen, chemistry, LabelSettings(count=3)) != first[0].path.name


@pytest.mark.parametrize("wrong", [{"count": 0}, {"nearest": 1.0}, {"shares": (0.5, 0.1)}, {"seed": -1}])
def test_settings_that_make_no_sense(wrong) -> None:
    with pytest.raises(UserError):
        LabelSettings(**wrong)


def test_one_label_is_the_ground_state() -> None:
    labels = labelled(named("H2"), ChemistrySettings(**QUICK), LabelSettings(count=1))
    assert labels.coefficients.shape[0] == 1
    assert float(labels.loss[0]) < 1e-10
    assert np.isfinite(labels.seconds)

"""Molecules are computed once; what fails or is damaged stops nobody else."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from torchimplicit.recipes.density import integrals, storage
from torchimplicit.recipes.density.prepare import prepare, prepared
from torchimplicit.recipes.density.settings import ChemistrySettings
from torchimplicit.recipes.runtime.errors import UserError

SETTINGS = ChemistrySettings()


@pytest.fixture
def geometries(record):
    """Hydrogen under several names, a bit longer each."""
    return [
        replace(record.geometry, name=name, positions=((0.0, 0.0, 0.0), (0.0, 0.0, 1.4 + i / 10)))
        for i, name in enumerate(("one", "bad", "three"))
    ]


def test_molecules_come_in_order_with_the_failures(tmp_path, geometries, no_chemistry):
    seen = []
    found = prepared(geometries, SETTINGS, tmp_path, watch=seen.append)
    assert [molecule.name for molecule in found.molecules] == ["one", "three"]
    assert [(one.geometry.name, one.reason) for one in found.failures] == [("bad", "it does not converge")]
    assert len(seen) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_there_is_not_computed_again(tmp_path, geometries, no_chemistry):
    prepare(geometries, SETTINGS, tmp_path)
    del no_chemistry[:]
    outcomes = prepare([*geometries, geometries[0]], SETTINGS, tmp_path)
    assert no_chemistry == ["bad"]
    assert [one.path is not None for one in outcomes] == [True, False, True, True]
    assert outcomes[0].seconds == 0
    prepare(geometries[:1], replace(SETTINGS, grid=0), tmp_path)
    assert no_chemistry == ["bad", "one"]


def test_a_damaged_file_is_computed_again_and_said(tmp_path, geometries, no_chemistry):
    [outcome] = prepare(geometries[:1], SETTINGS, tmp_path)
    outcome.path.write_bytes(outcome.path.read_bytes()[:-100])
    [again] = prepare(geometries[:1], SETTINGS, tmp_path)
    assert no_chemistry == ["one", "one"]
    assert "computed again: " in again.note
    assert "is damaged" in again.note
    assert storage.load(again.path).name == "one"


def test_an_interruption_keeps_what_is_done(tmp_path, geometries, no_chemistry):
    def interrupt(outcome):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([geometries[0], geometries[2]], SETTINGS, tmp_path, watch=interrupt)
    assert len(no_chemistry) == 1
    prepare([geometries[0], geometries[2]], SETTINGS, tmp_path)
    assert sorted(no_chemistry) == ["one", "three"]


def test_a_file_that_cannot_be_written_is_a_failure(tmp_path, geometries, no_chemistry, monkeypatch):
    def full(path, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchimplicit.recipes.density.prepare.write", full)
    [outcome] = prepare(geometries[:1], SETTINGS, tmp_path)
    assert "cannot be written (No space left on device)" in outcome.reason


def test_a_folder_that_is_a_file(tmp_path, geometries):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; the molecules' files need a folder"):
        prepare(geometries, SETTINGS, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be made"):
        prepare(geometries, SETTINGS, tmp_path / "file" / "below")


def test_pyscf_is_needed_to_compute_only(tmp_path, geometries, no_chemistry, monkeypatch):
    prepare(geometries[:1], SETTINGS, tmp_path)
    monkeypatch.undo()
    there = importlib.util.find_spec
    monkeypatch.setattr(integrals, "find_spec", lambda name: None if name == "pyscf" else there(name))
    assert len(prepared(geometries[:1], SETTINGS, tmp_path).molecules) == 1
    with pytest.raises(UserError, match=r"needs PySCF .* pip install 'torchimplicit\[chemistry\]'"):
        prepare(geometries, SETTINGS, tmp_path)


def test_processes_compute_side_by_side(tmp_path, geometries):
    """With PySCF: a real pool, one of whose molecules does not converge."""
    pytest.importorskip("pyscf")
    stretched = replace(geometries[0], positions=((0.0, 0.0, 0.0), (0.0, 0.0, 2.5)))
    settings = replace(SETTINGS, grid=0, scf_grid=0, orbital_basis="sto-3g", scf_cycles=2)
    found = prepare([geometries[0], stretched], settings, tmp_path, workers=2)
    assert [one.geometry for one in found] == [geometries[0], stretched]
    assert all(one.path is not None or "did not converge" in one.reason for one in found)
    alone = prepare([geometries[0]], settings, tmp_path / "alone")
    if found[0].path is not None:
        mine, other = storage.load(found[0].path), storage.load(alone[0].path)
        assert torch.allclose(mine.reference, other.reference, atol=1e-9)

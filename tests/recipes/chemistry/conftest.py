from dataclasses import replace
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data" / "h2.npz"

pytest.importorskip("numpy")
pytest.importorskip("scipy")


@pytest.fixture(scope="session")
def record():
    """The record of the hydrogen molecule, as PySCF computed it."""
    from torchimplicit.recipes.density.storage import read

    return read(DATA)


@pytest.fixture
def no_chemistry(monkeypatch, record):
    """Every calculation gives hydrogen's numbers at once, and needs no PySCF; the geometries that were asked for."""
    from torchimplicit.recipes.density import compute, prepare

    asked = []

    def computed(geometry, settings):
        asked.append(geometry.name)
        if geometry.name.startswith("bad"):
            raise compute.NotComputedError("it does not converge")
        return replace(record, geometry=replace(record.geometry, name=geometry.name), settings=settings)

    monkeypatch.setattr(prepare, "compute", computed)
    monkeypatch.setattr(prepare, "check_functional", lambda name: None)
    return asked

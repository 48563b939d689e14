from dataclasses import replace

import pytest

from tests.conftest import H2

pytest.importorskip("numpy")
pytest.importorskip("scipy")


@pytest.fixture(scope="session")
def record():
    """The record of the hydrogen molecule, as PySCF computed it."""
    from torchimplicit.recipes.density.storage import read

    return read(H2)


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

"""A trained density functional in use: forces, domain, a start for Kohn-Sham calculations, and the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("pyscf")

from rich.console import Console
from running import trained

from tests.conftest import H2
from torchimplicit.models.orbital_free import Domain, NetworkConfig, OrbitalFree
from torchimplicit.recipes.commands import parse
from torchimplicit.recipes.density import storage
from torchimplicit.recipes.density import training as runner
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.chemistry import from_angstrom, named
from torchimplicit.recipes.density.compute import compute, kohn_sham, superposition, unsolved
from torchimplicit.recipes.density.guess import density_matrix
from torchimplicit.recipes.density.integrals import made
from torchimplicit.recipes.density.predict import Trained, density
from torchimplicit.recipes.density.record import Record
from torchimplicit.recipes.density.settings import ChemistrySettings, Molecules, OrbitalFreeTraining
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import RunOptions, create
from torchimplicit.solution import Status

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = ChemistrySettings()


def stretched(length, axis=2):
    place = [0.0, 0.0, 0.0]
    place[axis] = length
    return from_angstrom("H2-stretched", [("H", (0, 0, 0)), ("H", place)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A functional trained on hydrogen for two iterations."""
    where = tmp_path_factory.mktemp("density")
    (where / "molecules").mkdir()
    shutil.copy(H2, where / "molecules" / storage.file_name(named("H2"), SETTINGS))
    config = OrbitalFreeTraining(
        molecules=Molecules(sources=("H2",), data_dir=where / "molecules"),
        hidden=4,
        iterations=2,
        page=False,
        check_grid=0,
    )
    run = trained("ofdft-one", config, where / "run")
    run.mark("complete")
    return run


# -- the domain --------------------------------------------------------------------------------------------------------


def molecule(geometry):
    return unsolved(geometry, replace(SETTINGS, grid=0)).molecule()


def test_the_domain_knows_its_molecules_however_they_are_turned():
    water, ammonia = molecule(named("H2O")), molecule(named("NH3"))
    domain = Domain.of([water, ammonia])
    assert float(domain.distances(water).max()) == pytest.approx(0, abs=1e-6)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    turned = replace(water, positions=water.positions @ turn + 1.0)
    torch.testing.assert_close(domain.distances(turned), torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert domain.limit > 0
    again = Domain(**domain.state())
    torch.testing.assert_close(again.distances(turned), domain.distances(turned))


def test_the_domain_tells_bonds_that_it_has_not_seen():
    domain = Domain.of([molecule(stretched(length)) for length in (0.70, 0.72, 0.74, 0.76, 0.78)])
    assert float(domain.distances(molecule(stretched(0.75))).max()) <= domain.limit
    assert float(domain.distances(molecule(stretched(1.1))).max()) > 3 * domain.limit
    assert domain.distances(molecule(named("He"))).isinf().all()


# -- forces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [None, "density", "guess"])
def test_forces_are_the_slopes_of_the_energy(network):
    """Of lithium hydride with a network that does something, both atoms, against central differences."""
    config = OrbitalFreeTraining(hidden=4)
    geometry = from_angstrom("LiH", [("Li", (0, 0, 0)), ("H", (0.1, 0.0, 1.55))])
    record = compute(geometry, replace(SETTINGS, grid=2))
    functional = runner.started(config, [Case.of(record.molecule())])
    torch.manual_seed(0)
    torch.nn.init.normal_(functional.factor[-1].weight, std=0.05)
    if network:
        functional = _with_network(functional, record, network)
    trained = Trained(functional, Domain.of([record.molecule()]), replace(SETTINGS, grid=2))
    found = density(trained, geometry)
    assert found.status.name == "CONVERGED"
    assert found.forces.sum(dim=0).abs().max() < 1e-3  # but for what the grid would add
    step = 2e-3
    for atom, axis in ((0, 2), (1, 0)):
        energies = []
        for sign in (1, -1):
            places = np.array(geometry.positions)
            places[atom, axis] += sign * step
            moved = replace(geometry, positions=tuple(map(tuple, places.tolist())))
            energies.append(density(trained, moved, slopes=False).energy)
        assert float(found.forces[atom, axis]) == pytest.approx((energies[1] - energies[0]) / (2 * step), abs=1e-3)


def _with_network(functional: OrbitalFree, record: Record, at: str) -> OrbitalFree:
    """With a network of the coefficients that does something."""
    molecule = record.molecule_without_grid()
    size = NetworkConfig.of([molecule], width=8, channels=2)
    found = OrbitalFree(replace(functional.config, network=size, network_at=at))
    found.load_state_dict(functional.state_dict(), strict=False)
    found.network.scale([found.network.known(molecule)[1](molecule.guess)], [found.network.known(molecule)[0].kinds])
    for last in (found.network.energy[-1], found.network.bond[-1]):
        torch.nn.init.normal_(last.weight, std=0.01)
    return found


# -- the start of a Kohn-Sham calculation ------------------------------------------------------------------------------


@pytest.mark.parametrize("functional", ["lda,pw", "pbe"])
def test_the_kohn_sham_density_is_a_better_start_than_atoms(functional):
    settings = replace(SETTINGS, functional=functional)
    record = compute(named("NH3"), settings)
    mol = made(named("NH3"), settings.orbital_basis)
    plain = kohn_sham(mol, settings, superposition(mol))
    begun = kohn_sham(mol, settings, density_matrix(record.reference, record))
    assert begun.e_tot == pytest.approx(plain.e_tot, abs=1e-7)
    assert begun.cycles < plain.cycles


# -- a run in use ------------------------------------------------------------------------------------------------------


def test_the_density_is_that_of_the_run(run):
    found = density(Trained.of(run.path), named("H2"))
    (test,) = run.read_json("results.json")["train"]
    assert found.status.name == "CONVERGED"
    assert not found.strange
    assert not found.warning
    record = storage.read(H2)
    assert found.energy - record.energy == pytest.approx(test["energy_error"], abs=1e-7)
    torch.testing.assert_close(found.coefficients @ record.basis.integrals(), torch.tensor(2.0, dtype=torch.float64))
    assert found.dipole == pytest.approx((0, 0, 0), abs=1e-4)
    assert not replace(found, distance=found.limit + 1e-9).strange


def test_what_training_lacked_is_refused_or_warned_of(run):
    trained = Trained.of(run.path)
    with pytest.raises(UserError, match="H2O has O, and this functional was trained on molecules of H alone"):
        density(trained, named("H2O"))
    strange = density(trained, stretched(1.6), slopes=False)
    assert strange.strange
    assert "atom 1 (H) of H2-stretched has surroundings unlike any in training" in strange.warning
    assert strange.least > 0
    assert "no minimum" not in strange.warning
    assert "an eigenvalue of -0.5 hartree" in replace(strange, least=-0.5).warning
    assert "stopped with MAX_STEPS" in replace(strange, status=Status.MAX_STEPS).warning
    hydride = from_angstrom("H-", [("H", (0, 0, 5.0))], charge=-1)
    ion = density(trained, hydride)
    assert "H- has the charge -1, and training molecules have none" in ion.warning
    assert ion.dipole == pytest.approx((0, 0, 0), abs=1e-3)  # wherever it is


def test_a_run_without_a_functional(tmp_path):
    run = create("ofdft-one", RunOptions(output=tmp_path / "run"))
    run.describe("ofdft-one", OrbitalFreeTraining())
    with pytest.raises(UserError, match="has no finished density functional"):
        Trained.of(run)
    with pytest.raises(UserError, match="is not a directory"):
        Trained.of(tmp_path / "none")


def test_the_command(run, tmp_path, capsys):
    (tmp_path / "far.xyz").write_text("2\n\nH 0 0 0\nH 0 0 1.0\n", encoding="utf-8")
    command = ["density", str(run.path), "H2", str(tmp_path / "far.xyz"), "--compare", "--scf-guess"]
    out = tmp_path / "out"
    assert parse([*command, "--output", str(out)]).run(Console()) == 0
    said = capsys.readouterr().out
    assert said.count("beside Kohn-Sham") == 2
    assert "far has surroundings unlike any in training" in said
    assert {path.name for path in out.iterdir()} == {
        f"{name}.{end}" for name in ("H2", "far") for end in ("json", "cube", "png")
    }
    told = json.loads((out / "H2.json").read_text(encoding="utf-8"))
    assert told["kohn_sham"]["loss"] < told["kohn_sham"]["minao_loss"]
    assert set(told["scf_guess"]) == {"density", "minao"}
    assert np.array(told["forces_hartree_per_bohr"]).shape == (2, 3)
    assert parse(["density", str(run.path), "H2", str(tmp_path), "--output", str(out), "--no-cube"]).run(Console()) == 0
    with pytest.raises(UserError, match="there is no molecule or file 'water'"):
        parse(["density", str(run.path), "water", "--output", str(out)]).run(Console(quiet=True))


def test_the_cube_holds_the_electrons(run):
    from torchimplicit.recipes.density.apply import SPACING, cube_file

    lines = cube_file(density(Trained.of(run.path), named("H2"), slopes=False)).splitlines()
    counts = [int(line.split()[0]) for line in lines[3:6]]
    values = np.array([float(word) for line in lines[8:] for word in line.split()])
    assert values.size == np.prod(counts)
    assert values.sum() * SPACING**3 == pytest.approx(2, abs=0.02)

"""PySCF for real, on small molecules: every number of a record against PySCF's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("pyscf")

from torchimplicit.recipes.density import compute, integrals, storage
from torchimplicit.recipes.density.chemistry import from_angstrom, named
from torchimplicit.recipes.density.integrals import check_functional
from torchimplicit.recipes.density.prepare import prepare
from torchimplicit.recipes.density.settings import ChemistrySettings
from torchimplicit.recipes.runtime.errors import UserError

SETTINGS = ChemistrySettings()


@pytest.fixture(scope="module")
def water():
    return compute.compute(named("H2O"), SETTINGS)


def pyscf_molecule(record):
    from pyscf import gto

    atoms = list(zip(("O", "H", "H"), record.geometry.positions, strict=True))
    return gto.M(atom=atoms, unit="Bohr", basis="def2-svp", verbose=0)


def test_the_basis_is_that_of_pyscf(water):
    from pyscf import df, dft

    fitting = df.addons.make_auxmol(pyscf_molecule(water), df.aug_etb(pyscf_molecule(water), beta=2.5))
    points = np.random.default_rng(0).normal(size=(50, 3))
    theirs = torch.from_numpy(dft.numint.eval_ao(fitting, points, deriv=1))
    values, gradients = water.basis.evaluate(torch.from_numpy(points))
    assert torch.allclose(values, theirs[0], atol=1e-13)
    assert torch.allclose(gradients, theirs[1:], atol=1e-12)
    assert fitting.ao_labels(fmt=False)[10][2] == "2p"  # the order of l is that of the record
    assert water.basis.sizes.sum() == fitting.nao == 134


@pytest.mark.parametrize(("name", "size"), [("H2", 40), ("NH3", 154), ("CH4", 174)])
def test_sizes_of_the_bases(name, size):
    from pyscf import df, gto

    geometry = named(name)
    atoms = list(zip(geometry.charges, geometry.positions, strict=True))
    mol = gto.M(atom=atoms, unit="Bohr", basis="def2-svp", verbose=0)
    assert df.addons.make_auxmol(mol, df.aug_etb(mol, beta=2.5)).nao == size


def test_densities_hold_the_electrons(water):
    molecule = water.molecule()
    for p in (water.reference, water.guess):
        assert float(molecule.count(p)) == pytest.approx(10, abs=1e-8)
        assert float(molecule.quadrature @ molecule.density(p)) == pytest.approx(10, abs=1e-3)
        assert float(molecule.density(p).min()) > -1e-8


def test_energies_are_those_of_a_calculation_by_hand(water):
    from pyscf import dft

    mol = pyscf_molecule(water)
    field = dft.RKS(mol, xc="lda,pw").run(conv_tol=1e-10)
    one, density = field.scf_summary["e1"], field.make_rdm1()
    assert water.energy == pytest.approx(field.e_tot, abs=1e-8)
    assert water.repulsion == pytest.approx(mol.energy_nuc(), abs=1e-10)
    assert water.kinetic + water.attraction == pytest.approx(one, abs=1e-4)
    assert water.hartree == pytest.approx(field.scf_summary["coul"], abs=1e-4)
    assert water.exchange_correlation == pytest.approx(field.scf_summary["exc"], abs=1e-4)
    assert float(np.vdot(mol.intor("int1e_kin"), density)) == pytest.approx(water.kinetic, abs=1e-4)


def test_the_fit_has_the_energies_of_the_orbitals(water):
    """The attraction is held, of both densities; a fit that holds the electrons alone is 20 mHa off, of 199 Ha. The
    Coulomb energy is as good as even-tempered functions of ratio 2.5 can do."""
    mol, p = pyscf_molecule(water), water.reference
    assert float(water.external @ p) == pytest.approx(water.attraction, abs=1e-8)
    assert float(p @ water.coulomb @ p) / 2 == pytest.approx(water.hartree, abs=5e-3)
    from pyscf import dft

    guess = np.vdot(mol.intor("int1e_nuc"), dft.RKS(mol).get_init_guess(key="minao"))
    assert float(water.external @ water.guess) == pytest.approx(guess, abs=1e-8)


def test_another_grid(water):
    """It is PySCF's of that level, and all else is kept."""
    fine = water.on_grid(2)
    assert torch.equal(fine.points, compute.compute(water.geometry, replace(SETTINGS, grid=2, scf_grid=0)).points)
    assert fine.settings.grid == 2
    assert len(fine.quadrature) > 2 * len(water.quadrature)
    assert torch.equal(fine.reference, water.reference)
    assert float(fine.molecule().quadrature @ fine.molecule().density(water.reference)) == pytest.approx(10, abs=1e-5)


def test_attraction_against_a_fine_grid():
    """Every angular momentum, off the nuclei and on them; the grid of level 5 integrates the overlaps to 1e-5."""
    settings = replace(SETTINGS, grid=5, scf_grid=0)
    molecule = compute.compute(named("HF"), settings).molecule()
    q = molecule.quadrature
    assert torch.allclose(molecule.basis.products(q[None, None]), molecule.overlap, atol=2e-5)
    distance = torch.linalg.vector_norm(molecule.points[:, None] - molecule.positions, dim=-1)
    potential = -(molecule.charges / distance).sum(dim=1)
    assert torch.allclose((q * potential) @ molecule.basis.dense()[0], molecule.external, atol=1e-4)


def test_blocks_of_integrals_make_no_difference(water, monkeypatch):
    monkeypatch.setattr(integrals, "AT_ONCE", 7)
    other = compute.compute(water.geometry, SETTINGS)
    assert torch.allclose(other.reference, water.reference, atol=1e-9)
    assert torch.allclose(other.guess, water.guess, atol=1e-9)


def test_ions_can_be_computed(tmp_path):
    hydroxide = from_angstrom("OH", [("O", (0, 0, 0)), ("H", (0, 0, 0.97))], charge=-1)
    storage.write(tmp_path / "oh.npz", compute.compute(hydroxide, replace(SETTINGS, grid=0, scf_grid=1)))
    molecule = storage.load(tmp_path / "oh.npz")
    assert float(molecule.count(molecule.reference)) == pytest.approx(10, abs=1e-8)


def test_a_closed_shell_with_a_narrow_gap_is_doubted(water, tmp_path):
    methylene = from_angstrom("CH2", [("C", (0, 0, 0)), ("H", (0, 0.86, 0.6)), ("H", (0, -0.86, 0.6))])
    (done,) = prepare([methylene], SETTINGS, tmp_path)
    (again,) = prepare([methylene], SETTINGS, tmp_path)
    assert "an open shell may have less energy" in done.note
    assert again.note == done.note
    assert not water.doubt
    assert compute.orbital_gap(np.zeros(1), 2) == np.inf  # no orbital is empty


def test_a_calculation_that_does_not_converge(water):
    with pytest.raises(compute.NotComputedError, match="did not converge to 1e-09 hartree in 1 cycles"):
        compute.compute(water.geometry, replace(SETTINGS, scf_cycles=1))


@pytest.mark.parametrize("name", ["b3lyp", "hf", "scan", "nonsense", "lda,nonsense"])
def test_functionals_that_are_refused(name):
    with pytest.raises(UserError, match="--functional"):
        check_functional(name)


def test_elements_without_a_basis():
    with pytest.raises(UserError, match=r"basis nonsense has nothing for H; choose another --orbital-basis"):
        compute.compute(named("H2"), replace(SETTINGS, orbital_basis="nonsense"))
    krypton = from_angstrom("Kr", [("Kr", (0, 0, 0))])
    with pytest.raises(UserError, match=r"basis 6-31g\*\* has nothing for Kr"):
        compute.compute(krypton, replace(SETTINGS, orbital_basis="6-31g**"))

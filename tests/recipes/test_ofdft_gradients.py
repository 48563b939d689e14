"""The table ofdft-gradients: what is measured at a small molecule, and what the table makes of it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("submitit")
pytest.importorskip("tyro")
pytest.importorskip("numpy")

from tests.conftest import H2
from torchimplicit.diagnostics import curvature
from torchimplicit.gradients import Implicit
from torchimplicit.linear import Dense
from torchimplicit.models.orbital_free import OrbitalFree, OrbitalFreeConfig
from torchimplicit.models.orbital_free.on_grid import OnGrid
from torchimplicit.recipes.density import gradients as gathered
from torchimplicit.recipes.density import integrals
from torchimplicit.recipes.density.adjoint_solvers import ways
from torchimplicit.recipes.density.adjoints import check, load, measured, softest
from torchimplicit.recipes.density.chemistry import named
from torchimplicit.recipes.density.gradient_figures import MoleculeGradientsConfig, MoleculeResults, slope
from torchimplicit.recipes.density.gradients import TABLE, TableConfig
from torchimplicit.recipes.density.optimum import Optimum, made
from torchimplicit.recipes.density.settings import ChemistrySettings
from torchimplicit.recipes.density.storage import file_name
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, RunOptions, create
from torchimplicit.recipes.runtime.settings import from_plain
from torchimplicit.recipes.runtime.table import Plan

SMALL = MoleculeGradientsConfig(
    sigma=0.0,
    grid=1,
    training_steps=2,
    directions=2,
    nudges=(0.3, 0.1, 0.01, 1e-3),
    loss_nudges=(0.1, 1e-2, 1e-3, 1e-4),
    loose=(1e-4, 1e-8),
    beyond=(0.1, 2.0),
    softness=(1.0, 1e-3, -1e-3),
    descent_steps=200,
    repeats=1,
)


@pytest.fixture(autouse=True)
def _slow_machine(one_thread):
    pass


@pytest.fixture(scope="module")
def small(h2):
    """Hydrogen in its s functions, on every fourth point of the grid."""
    s = h2.angular == 0
    points = slice(0, None, 4)
    return replace(
        h2,
        overlap=h2.overlap[s][:, s],
        coulomb=h2.coulomb[s][:, s],
        basis=OnGrid.of(*(one[..., points, :][..., s] for one in h2.basis.dense())),
        quadrature=4 * h2.quadrature[points],
        points=h2.points[points],
        **{
            name: getattr(h2, name)[s]
            for name in ("weight", "external", "atom", "angular", "shell", "reference", "guess")
        },
    )


@pytest.fixture(scope="module")
def results(small) -> MoleculeResults:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measured(SMALL, small)
    finally:
        torch.set_num_threads(before)


class TestMeasurement:
    def test_the_minimum(self, results):
        assert results.point.least > 0
        assert results.point.raw_condition > results.point.condition > 1

    def test_finite_differences(self, results):
        assert results.difference.error < 1e-6

    def test_the_orders_of_propagation(self, results):
        assert results.slope("one_sided") == pytest.approx(1, abs=0.2)
        assert results.slope("symmetric") == pytest.approx(2, abs=0.2)
        assert results.automatic["symmetric"] < 1e-3
        assert [one.nudge for one in results.nudged] == [0.3, 0.1, 0.01, 1e-3]

    def test_minimizations_that_end_too_early(self, results):
        found = {(one.nudge, one.tolerance): one.symmetric for one in results.loosened}
        assert found[1e-4, 1e-4] > 0.5
        assert found[1e-3, 1e-8] < 0.01

    def test_beyond_the_least_eigenvalue(self, results):
        inside, outside = results.beyond
        assert inside.error < 0.1
        assert outside.status != "CONVERGED" or outside.error > 0.1

    def test_the_damped_identity(self, results):
        assert all(one.apart < 0.025 for one in results.damped)
        assert results.damped[-1].apart < results.damped[0].apart

    def test_a_soft_mode(self, results):
        before, soft, saddle = results.softened
        assert before.norm["implicit"] == pytest.approx(1)
        assert before.cosine["implicit"] == pytest.approx(1)
        assert soft.norm["implicit"] > 50
        assert saddle.cosine["implicit"] < 0
        for name in ("damped", "one-sided, whole loss"):
            assert saddle.cosine[name] > 0.5
            assert saddle.norm[name] < 20

    def test_the_adjoint(self, results):
        for coordinates, found in results.adjoint.items():
            assert found["dense"].error < 1e-9
            for name, one in found.items():
                if name not in ("dense", "gradient descent, least squares", "Adam, least squares"):
                    assert one.status == "CONVERGED", (coordinates, name)
                    assert one.error < 1e-4, (coordinates, name)
            assert found["CG"].products < found["gradient descent, least squares"].products
        assert "CG, reference Hessian" in results.adjoint["overlap"]
        assert "CG, reference Hessian" not in results.adjoint["raw"]
        assert results.adjoint["raw"]["Adam, least squares"].error > 0.01

    def test_survives_the_disk(self, results, tmp_path):
        run = create("ofdft-gradients-molecule", RunOptions(output=tmp_path / "run"))
        run.write_json("results.json", results)
        assert from_plain(MoleculeResults, run.read_json("results.json")) == results


def test_slopes_use_what_is_a_power_law():
    nudges = (1.0, 0.1, 0.01, 1e-3)
    assert slope(nudges, (0.9, 1e-3, 1e-5, 1e-12)) == pytest.approx(2)
    assert slope(nudges, (0.9, 1e-3, 1e-5, 1e-4)) == pytest.approx(2)  # it rises again
    assert math.isnan(slope(nudges, (0.9, 0.5, 1e-9, 1e-12)))


def test_the_trained_functional_is_another_one(small):
    optimum = made(replace(SMALL, state="trained"), small)
    assert optimum.functional.config.weizsaecker == 0.05
    assert optimum.estimate(Implicit(linear_solver=Dense())).status == "CONVERGED"


def test_the_softest_mode_is_one_that_the_gradient_feels(small):
    optimum = made(SMALL, small)
    exact = optimum.estimate(Implicit(linear_solver=Dense())).gradient
    operator, right = optimum.system(optimum.problem)
    adjoint = torch.linalg.lstsq(operator.dense()[0], right[0], driver="gelsd").solution
    torch.testing.assert_close(optimum.pulled(adjoint), exact, rtol=1e-6, atol=1e-10)
    eigenvalue, vector = softest(optimum, exact)
    assert eigenvalue >= float(curvature(optimum.problem, optimum.value).least) * (1 - 1e-6)
    part = optimum.pulled(vector * (optimum.cotangent @ vector) / eigenvalue)
    assert float(part @ exact) >= 0.05 * float(exact @ exact)


def test_a_saddle_is_left(small, monkeypatch):
    """At the minimum of one energy, where another is stationary and no minimum."""
    functional = OrbitalFree(OrbitalFreeConfig(hidden=0))
    middle = Optimum(small, functional, 1e-9)
    odd = small.weight * torch.where(small.atom == 0, 1.0, -1.0).double()

    def tilted(p, molecule, tangent=None):
        moment = odd @ (p - middle.value)
        return OrbitalFree.forward(functional, p, molecule) - 0.05 * moment.square() + moment**4

    monkeypatch.setattr(functional, "forward", tilted)
    # stationary for either energy
    optimum = Optimum(replace(small, guess=middle.value), functional, 1e-8)
    assert optimum.saddles > 0
    assert float(curvature(optimum.problem, optimum.value).least) > 0
    assert abs(float(odd @ (optimum.value - middle.value))) > 0.05


class TestMolecules:
    def test_a_file_needs_no_pyscf(self, tmp_path, monkeypatch):
        monkeypatch.setattr(integrals, "find_spec", lambda name: None)
        config = replace(SMALL, data_dir=tmp_path)
        with pytest.raises(UserError, match=r"torchimplicit\[chemistry\]"):
            check(config)
        shutil.copyfile(H2, tmp_path / file_name(named("H2"), ChemistrySettings(grid=1)))
        check(config)
        assert load(config).name == "H2"
        with pytest.raises(UserError, match=r"torchimplicit\[chemistry\]"):
            load(replace(config, sigma=0.04))

    def test_an_unknown_molecule(self):
        with pytest.raises(UserError, match="there is no molecule or file 'H3O'"):
            TABLE.check(TableConfig(molecules=("H3O",)))


class TestTable:
    config = TableConfig(molecules=("H2",), plan=Plan(seeds=2))

    @pytest.fixture
    def runs(self, tmp_path, results) -> dict[str, Run]:
        """What a table's runs leave, for the settings of the table; one run is missing."""
        settings = gathered.settings_of(self.config, "H2", "fitted", 0)

        def spread(entries, wanted, name):
            return [replace(entries[min(i, len(entries) - 1)], **{name: value}) for i, value in enumerate(wanted)]

        factors = sorted(settings.softness, reverse=True)
        whole = replace(
            results,
            nudged=spread(results.nudged, sorted(settings.nudges, reverse=True), "nudge"),
            beyond=spread(results.beyond, sorted(settings.beyond), "share"),
            softened=spread(results.softened, [f * results.softest for f in factors], "eigenvalue"),
            loosened=[
                replace(results.loosened[0], nudge=nudge, tolerance=tolerance)
                for tolerance in sorted(settings.loose, reverse=True)
                for nudge in sorted(settings.loss_nudges, reverse=True)
            ],
        )
        found = {}
        for job in gathered.jobs(self.config)[:-1]:
            found[job.name] = create(job.recipe, RunOptions(output=tmp_path / job.name))
            found[job.name].write_json("results.json", whole)
        return found

    def test_makes_sense_of_what_is_there(self, runs):
        summary = TABLE.summarize(self.config, runs)
        assert "Not measured: H2-trained-seed1." in summary.notes
        for sheet in summary.sheets:
            assert all(len(row) == len(sheet.table.columns) for row in sheet.table.rows), sheet.title
        assert [d.name for d in summary.drawings] == ["error-over-nudge", "soft-mode", "adjoint-over-products"]
        claims = {claim.statement: claim for claim in summary.claims}
        assert next(c for s, c in claims.items() if s.startswith("Finite differences")).holds
        # every tolerance has the figures of the loosest one here
        assert not next(c for s, c in claims.items() if s.startswith("With a weight of 1e-4")).holds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nudges": (0.1,)}, "--nudges must be positive numbers, two at least"),
        ({"loose": (1e-3, 0.0)}, "--loose must be positive"),
        ({"softness": (0.5, -0.1)}, "--softness must hold 1"),
        ({"repeats": 0}, "--repeats must be positive"),
        ({"sigma": -1.0}, "--sigma must not be negative"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        MoleculeGradientsConfig(**options)


def test_every_way_has_its_name():
    names = [way.name for way in ways(None)]
    assert len(set(names)) == len(names)

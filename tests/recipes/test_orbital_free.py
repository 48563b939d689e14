"""Orbital-free recipes on hydrogen: the splits, exact derivatives of the loss, penalties, training, resume, faults."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from rich.console import Console
from running import trained

from tests.conftest import H2
from torchimplicit.diagnostics import curvature
from torchimplicit.models.orbital_free.on_grid import OnGrid
from torchimplicit.recipes.density import split as data
from torchimplicit.recipes.density import storage
from torchimplicit.recipes.density import training as runner
from torchimplicit.recipes.density.case import Case
from torchimplicit.recipes.density.chemistry import named
from torchimplicit.recipes.density.objective import DensityFit
from torchimplicit.recipes.density.penalties import floor_residual
from torchimplicit.recipes.density.quality import quality, summarized
from torchimplicit.recipes.density.settings import ChemistrySettings, Molecules, OrbitalFreeTraining
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.run import Run, RunOptions, create

pytestmark = pytest.mark.usefixtures("one_thread")

HYDROGEN = named("H2")
SETTINGS = ChemistrySettings(grid=1)


@pytest.fixture
def folder(tmp_path, h2):
    """With hydrogen's data file, so that nothing has to be computed."""
    path = tmp_path / "molecules"
    path.mkdir()
    shutil.copy(H2, path / storage.file_name(HYDROGEN, SETTINGS))
    return path


@pytest.fixture(scope="module")
def coarse(h2):
    """On every fifth point of the grid: not what hydrogen is, but as good to take derivatives of."""
    return replace(
        h2,
        basis=OnGrid.of(*(one[..., ::5, :] for one in h2.basis.dense())),
        quadrature=5 * h2.quadrature[::5],
        points=h2.points[::5],
    )


def settings(folder=None, **changes) -> OrbitalFreeTraining:
    molecules = Molecules(sources=("H2",), chemistry=SETTINGS, data_dir=folder)
    made = OrbitalFreeTraining(molecules=molecules, hidden=4, iterations=2, measure_every=1, page=False)
    return replace(made, **changes)


def fitted(h2, config, spread=0.05):
    """A functional whose network is not nought."""
    functional = runner.started(config, [Case.of(h2)])
    if functional.factor is not None:
        torch.manual_seed(1)
        torch.nn.init.normal_(functional.factor[-1].weight, std=spread)
    return functional


# -- the molecules -----------------------------------------------------------------------------------------------------


def test_copies_are_in_one_split_each():
    config = Molecules(sources=("H2", "H2O"), train_copies=2, validation_copies=1, test_copies=3)
    found, refused = data.geometries(config)
    names = {split: [one.name for one in ones] for split, ones in found.items()}
    assert not refused
    assert names["train"] == ["H2", "H2-d1", "H2-d2", "H2O", "H2O-d1", "H2O-d2"]
    assert names["validation"] == ["H2-d3", "H2O-d3"]
    assert names["test"] == [f"{name}-d{copy}" for name in ("H2", "H2O") for copy in (4, 5, 6)]
    other, _ = data.geometries(replace(config, geometry_seed=1))
    assert other["test"][0].positions != found["test"][0].positions


def test_molecules_are_held_out_whole():
    config = Molecules(sources=("H2", "H2O", "H2CO", "CH4", "C2H4"), held_out=1, train_copies=1)
    found, _ = data.geometries(config)
    assert [len(found[split]) for split in data.SPLITS] == [6, 1, 1]
    formulas = [{one.name.split("-")[0] for one in found[split]} for split in data.SPLITS]
    assert not formulas[0] & formulas[1]
    assert not formulas[1] & formulas[2]
    with pytest.raises(UserError, match="held-out"):
        data.geometries(replace(config, held_out=3))


def test_molecules_with_an_element_that_training_lacks_are_left_out():
    config = Molecules(sources=("H2", "H2O", "NH3", "CH4", "HF"), held_out=1, train_copies=1)
    found, refused = data.geometries(config)
    assert [len(found[split]) for split in data.SPLITS] == [6, 0, 0]
    assert refused == ["NH3: no training molecule has N", "HF: no training molecule has F"]


# -- the loss and its derivatives --------------------------------------------------------------------------------------

CONFIGS = {
    "plain": {"tail_weight": 0.0, "pairs": False},
    "tails and pairs": {},
    "energies": {"energy_weight": 0.1},
    "floor": {"cold": True, "floor_weight": 1.0, "floor": 50.0},
    "iterates as minima": {"cold": True, "correction": 2},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_jacobian_and_gradient_are_those_of_the_residuals(coarse, changes):
    config = settings(inner_tolerance=1e-11, **changes)
    with DensityFit(fitted(coarse, config), [coarse], config) as fit:
        at = fit.weights
        residuals, jacobian = fit.residuals(at), fit.jacobian(at)
        loss, gradient = fit.loss_and_gradient(at)
        assert loss == pytest.approx(0.5 * residuals @ residuals, rel=1e-8)
        if config.floor_weight:  # a least eigenvalue between none and the floor, which moves with the density too
            assert 0 < residuals[coarse.size] < 2**0.5
        np.testing.assert_allclose(jacobian.T @ residuals, gradient, atol=1e-6 * np.abs(gradient).max())
        if config.correction:  # an iterate is no minimum, and does not move as one
            return
        direction = np.random.default_rng(0).standard_normal(len(at))
        step = 1e-4
        slope = (fit.residuals(at + step * direction) - fit.residuals(at - step * direction)) / (2 * step)
        np.testing.assert_allclose(slope, jacobian @ direction, atol=1e-5 * np.abs(slope).max())
        assert (fit.evaluations, fit.jacobians, fit.rejected) == (4, 1, 0)


def test_iterates_that_a_correction_lacks_are_nought(coarse):
    config = settings(correction=100, cold=True)
    with DensityFit(fitted(coarse, config), [coarse], config) as fit:
        residuals = fit.residuals(fit.weights)
        assert len(residuals) == len(fit.jacobian(fit.weights)) > 101 * coarse.size
        assert not residuals[50 * coarse.size : 101 * coarse.size].any()


@pytest.mark.parametrize("estimator", ["damped", "eqprop", "eqprop-one-sided"])
def test_the_estimators_agree_where_the_minimum_is_sound(coarse, estimator):
    gradients = []
    for name in ("implicit", estimator):
        config = settings(optimizer="adam", gradient=name, inner_tolerance=1e-11)
        with DensityFit(fitted(coarse, config), [coarse], config) as fit:
            gradients.append(fit.loss_and_gradient(fit.weights)[1])
    exact, found = gradients
    cosine = exact @ found / np.linalg.norm(exact) / np.linalg.norm(found)
    assert cosine > (0.99 if estimator == "eqprop-one-sided" else 1 - 1e-5)


def test_processes_share_the_molecules(coarse):
    heavier = replace(coarse, name="again", reference=coarse.guess, guess=coarse.reference)
    config = settings(energy_weight=0.1)
    found = []
    for count in (1, 2):
        functional = fitted(coarse, config)
        with DensityFit(functional, [coarse, heavier], replace(config, processes=count)) as fit:
            at = fit.weights
            found.append((np.sort(fit.residuals(at)), *fit.loss_and_gradient(at), fit.work.steps))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-10)


def test_the_correction_adds_iterates(coarse):
    losses = {}
    for count in (0, 3):
        config = settings(optimizer="adam", inner="descent", inner_tolerance=1e-2, inner_steps=1000, correction=count)
        with DensityFit(fitted(coarse, config), [coarse], config) as fit:
            losses[count], gradient = fit.loss_and_gradient(fit.weights)
            assert np.isfinite(gradient).all()
    assert losses[3] > losses[0]


def test_penalties_know_the_spectrum_and_its_slope(coarse):
    config = settings(optimizer="adam", inner_tolerance=1e-11, cold=True)
    functional = fitted(coarse, config, spread=0.5)
    case = Case.of(coarse)
    p = case.solved(functional, config).value.detach()
    expected = float(curvature(case.problem(functional), p).least)
    config = replace(config, floor_weight=1.0, floor=2 * expected)
    lacking, _ = floor_residual(config, case, functional, p, case.curvature(functional, p))
    assert float(lacking.detach()) == pytest.approx(2**0.5 * 0.5, rel=1e-4)

    with DensityFit(functional, [coarse], replace(config, hessian_weight=1e-3)) as fit:
        without = DensityFit(functional, [coarse], replace(config, floor_weight=0.0))
        at = fit.weights
        direction = np.random.default_rng(0).standard_normal(len(at))

        def drawn(step: float) -> tuple[float, float]:
            """Loss and slope with the same random vector at every point."""
            fit._share.generator.manual_seed(0)
            loss, gradient = fit.loss_and_gradient(at + step * direction)
            return loss, gradient @ direction

        (more, _), (less, _), (loss, slope) = drawn(1e-5), drawn(-1e-5), drawn(0.0)
        assert slope == pytest.approx((more - less) / 2e-5, rel=1e-4)  # the density moves
        assert loss > without.loss_and_gradient(at)[0] + 0.2


def test_a_density_that_is_not_found_is_rejected(coarse):
    config = settings(inner="descent", inner_steps=2)
    with DensityFit(fitted(coarse, config), [coarse], config) as fit:
        assert np.isinf(fit.residuals(fit.weights)).all()
        assert fit.rejected == 1


def test_quality(coarse):
    config = settings()
    found = quality(Case.of(coarse), fitted(coarse, config), config, spectrum=True)
    assert found.converged
    assert found.least > 0
    assert found.better == (found.loss < found.guess_loss and found.l1 < found.guess_l1)
    assert not replace(found, loss=0.0, l1=0.0, converged=False).better
    whole = summarized([found, replace(found, loss=3 * found.loss, steps=99)])
    assert whole.loss == pytest.approx(2 * found.loss)
    assert whole.steps == 99


def test_a_finer_grid_is_looked_at_too(h2):
    """A functional whose minimum is the same there is as good; one whose is not, is not better than its guess."""
    pytest.importorskip("pyscf")
    config = settings(check_grid=2)
    found = quality(Case.of(h2), fitted(h2, config), config, file=H2)
    assert found.finer is not None
    assert (found.finer.level, found.finer.converged) == (2, True)
    assert found.finer.loss == pytest.approx(found.loss, rel=0.05)
    assert found.finer.energy_error == pytest.approx(found.energy_error, abs=1e-4)
    assert 0 < found.finer.moved < 0.05 * found.loss
    assert found.better
    assert not replace(found, finer=replace(found.finer, loss=2 * found.guess_loss)).better
    assert not replace(found, finer=replace(found.finer, converged=False)).better
    assert summarized([found]).finer_loss == found.finer.loss


def test_energies_by_the_constants_that_training_had(h2):
    config = settings()
    functional, constants = runner.started(config, [Case.of(h2)]), torch.zeros(37, dtype=torch.float64)
    constants[1] = functional.constants[1].detach() + 0.25
    found = quality(Case.of(h2), functional, config, constants=constants)
    assert found.trained_energy_error - found.energy_error == pytest.approx(2 * 0.25)


def test_the_functional_is_that_of_the_labels():
    def asked(name):
        return settings(molecules=Molecules(sources=("H2",), chemistry=replace(SETTINGS, functional=name)))

    assert [runner.exchange_correlation(asked(name)) for name in ("lda,pw", "PBE", "pbe, pbe")] == ["lda", "pbe", "pbe"]
    with pytest.raises(UserError, match=r"functional b88,p86: densities and energies of that exchange and correlation"):
        runner.check(asked("b88,p86"))


# -- runs --------------------------------------------------------------------------------------------------------------


def begun(path, config) -> Run:
    run = create("ofdft-small", RunOptions(output=path))
    run.describe("ofdft-small", config)
    return run


@pytest.mark.parametrize("optimizer", ["least-squares", "l-bfgs", "adam"])
def test_training_lowers_the_loss(tmp_path, folder, optimizer):
    config = settings(folder, optimizer=optimizer, iterations=4, pairs=False, spectrum=optimizer == "adam")
    run = trained("ofdft-small", config, tmp_path / "run")
    results = run.read_json("results.json")
    assert results["state"] == "complete"
    assert results["looks"][-1]["loss"] < results["looks"][0]["loss"]
    assert results["train"][0]["converged"]
    assert results["free_energies"]  # one molecule, and a constant of its element
    assert abs(results["train"][0]["energy_error"]) < 1e-8 < abs(results["train"][0]["trained_energy_error"])
    assert len(results["looks"]) == results["iterations"] + 1
    runner.evaluate(config, run, Console(quiet=True))
    assert run.read_json("evaluation.json")["train"][0]["loss"] == pytest.approx(results["train"][0]["loss"])


def test_weights_are_selected_by_what_is_trained(h2):
    """By energies too, where the loss has them: half the squared error per electron."""
    case = Case.of(h2)
    found = [quality(case, fitted(h2, settings()), settings())]
    by_density = runner._score(found, [case], settings())
    by_both = runner._score([replace(found[0], energy_error=0.02)], [case], settings(energy_weight=30.0))
    assert by_density == found[0].loss
    assert by_both == pytest.approx(found[0].loss + 0.5 * 30 * 0.01**2)


def test_a_run_goes_on_where_it_was_stopped(tmp_path, folder, monkeypatch):
    config = settings(folder, iterations=4, optimizer="adam")
    run = begun(tmp_path / "run", config)
    wanted = runner.optimize

    def interrupted(objective, name, rate, spent, step):
        def twice(weights, loss):
            share = step(weights, loss)
            if share >= 0.5:
                raise KeyboardInterrupt
            return share

        wanted(objective, name, rate, spent, twice)

    monkeypatch.setattr(runner, "optimize", interrupted)
    assert not runner.train(config, run, Console(quiet=True))
    assert not (run.path / "results.json").exists()
    assert run.read_json("progress.json")["done"] == 2
    monkeypatch.setattr(runner, "optimize", wanted)
    assert runner.train(config, run, Console(quiet=True))
    results = run.read_json("results.json")
    assert results["iterations"] == 4
    assert [look["iteration"] for look in results["looks"]] == [0, 1, 2, 3, 4]


def test_the_page_shows_lines_and_planes(tmp_path, folder):
    config = settings(folder, iterations=1, page=True, spectrum=True)
    run = trained("ofdft-small", config, tmp_path / "run")
    assert {path.stem for path in (run.path / "figures").glob("*.png")} == {"line", "plane", "training", "inner"}
    page = (run.path / "index.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "∫|ρ−ρ_gs|/N" in page


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient": "eqprop"}, "--gradient eqprop"),
        ({"hessian_weight": 1.0}, "--hessian-weight"),
        ({"correction": 2}, "needs --cold"),
        ({"iterations": 0}, "--iterations"),
        ({"correction_gamma": 0.0}, "--correction-gamma"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_sources_that_are_refused(tmp_path):
    with pytest.raises(UserError, match="sources"):
        Molecules(sources=())
    with pytest.raises(UserError, match="xyz"):
        runner.check(settings(molecules=Molecules(sources=(str(tmp_path),))))


def test_an_evaluation_before_training_is_refused(tmp_path, folder):
    config = settings(folder)
    with pytest.raises(UserError, match="nothing was trained"):
        runner.evaluate(config, begun(tmp_path / "run", config), Console(quiet=True))

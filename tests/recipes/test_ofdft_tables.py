"""The tables of trained density functionals: their runs, and what they make of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from rich.console import Console

from torchimplicit.recipes.chemistry import storage
from torchimplicit.recipes.chemistry.geometry import distorted
from torchimplicit.recipes.chemistry.known import named
from torchimplicit.recipes.chemistry.settings import ChemistrySettings
from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.ofdft_molecules import config as molecules
from torchimplicit.recipes.ofdft_molecules import rows as molecules_rows
from torchimplicit.recipes.ofdft_molecules.table import TABLE as MOLECULES
from torchimplicit.recipes.ofdft_molecules.table import summarize as summarize_molecules
from torchimplicit.recipes.ofdft_runs import ratio, results_of, seconds_to, shown, told
from torchimplicit.recipes.ofdft_single import config as single
from torchimplicit.recipes.ofdft_single import gathered as single_runs
from torchimplicit.recipes.ofdft_single.table import summarize as summarize_single
from torchimplicit.recipes.ofdft_stability import config as stability
from torchimplicit.recipes.ofdft_stability import rows as stability_rows
from torchimplicit.recipes.ofdft_stability.claims import claims as stability_claims
from torchimplicit.recipes.ofdft_stability.growth import own
from torchimplicit.recipes.ofdft_stability.table import summarize as summarize_stability
from torchimplicit.recipes.plain import from_plain, to_plain
from torchimplicit.recipes.registry import runner, settings
from torchimplicit.recipes.reproduce.jobs import prepare
from torchimplicit.recipes.runtime.table import Plan

H2 = Path(__file__).parents[1] / "data" / "h2.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """H2, and "distorted" copies whose densities are its own, so that nothing is computed."""
    made = tmp_path_factory.mktemp("molecules")
    record, asked, middle = storage.read(H2), ChemistrySettings(grid=1), named("H2")
    record = replace(record, points=record.points[::4], quadrature=4 * record.quadrature[::4])  # quick, if coarse
    for geometry in (middle, *(distorted(middle, 0.04, 0, copy) for copy in (1, 2, 3))):
        storage.write(made / storage.file_name(geometry, asked), replace(record, geometry=geometry))
    return made


def run_all(jobs, where):
    """The runs of the jobs, by their names."""
    runs = {}
    for job in jobs:
        runs[job.name] = prepare(job, where)
        assert runner(job.recipe).train(job.config, runs[job.name], Console(quiet=True))
        runs[job.name].mark("complete")
    return runs


def well_formed(summary, runs):
    assert summary.sheets
    for sheet in summary.sheets:
        assert sheet.table.rows
        assert all(len(row) == len(sheet.table.columns) for row in sheet.table.rows), sheet.title
    assert set(summary.runs) == set(runs)
    json.dumps(summary.runs, allow_nan=False)
    assert len({drawing.name for drawing in summary.drawings}) == len(summary.drawings)


@pytest.mark.parametrize("name", ["ofdft-single", "ofdft-molecules", "ofdft-stability"])
def test_jobs_are_sound(name):
    config = settings(name)
    made = {"ofdft-single": single_runs, "ofdft-molecules": molecules_rows, "ofdft-stability": stability_rows}[name]
    jobs = made.jobs(config)
    assert len({job.name for job in jobs}) == len(jobs)
    assert len(jobs) % config.plan.seeds == 0
    for job in jobs:
        assert type(settings(job.recipe)) is type(job.config)
        assert from_plain(type(job.config), json.loads(json.dumps(to_plain(job.config)))) == job.config


def test_one_molecule(folder, tmp_path):
    config = single.SingleConfig(
        plan=Plan(seeds=1), molecule="H2", optimizers=("l-bfgs",), l_bfgs_iterations=1, grid=1, data_dir=folder
    )
    config = replace(config, estimators=("implicit", "eqprop"))
    runs = run_all(single_runs.jobs(config), tmp_path)
    summary = summarize_single(config, runs)
    well_formed(summary, runs)
    assert [drawing.name for drawing in summary.drawings] == ["loss", "line"]
    assert len(summary.sheets[0].table.rows) == 2 + 2
    assert len(summary.claims) == 2
    one = dict(list(runs.items())[:1])
    assert any("1 of 2 runs are missing" in note for note in summarize_single(config, one).notes)
    assert not summarize_single(config, {}).sheets


def test_claims_of_one_molecule_follow_the_figures(folder, tmp_path):
    config = single.SingleConfig(plan=Plan(seeds=1), molecule="H2", l_bfgs_iterations=1, grid=1, data_dir=folder)
    job = single_runs.jobs(config)[0]
    one = results_of(run_all([job], tmp_path)[job.name])

    def row(estimator, end, seconds):
        first, last = one.looks[0], replace(one.looks[-1], loss=end * one.looks[0].loss, seconds=seconds)
        return single_runs.Row(estimator, "l-bfgs", {0: replace(one, looks=[first, last])})

    from torchimplicit.recipes.ofdft_single.claims import claims

    made = claims(config, [row("implicit", 0.5, 1.0), row("eqprop", 0.51, 2.0), row("eqprop-one-sided", 0.58, 1.0)])
    assert [claim.holds for claim in made] == [True, False, True]
    made = claims(config, [row("implicit", 0.7, 1.0), row("eqprop", 0.7, 2.0)])
    assert [claim.holds for claim in made] == [False, False]


def test_several_molecules(folder, tmp_path):
    config = molecules.MoleculesConfig(
        plan=Plan(seeds=1),
        molecules=("H2",),
        rows=("gauss-newton", "energy"),
        test_copies=1,
        seconds=1e-3,
        qm9_limit=0,
        grid=1,
        data_dir=folder,
    )
    MOLECULES.check(config)
    runs = run_all(molecules_rows.jobs(config), tmp_path)
    summary = summarize_molecules(config, runs)
    well_formed(summary, runs)
    assert len(summary.claims) == 5
    assert [drawing.name for drawing in summary.drawings] == ["along-training", "test"]
    assert len(summary.sheets[0].table.rows) == 2 + 2
    one = results_of(runs["gauss-newton-0"])
    assert 0 < ratio(one) < 1.5
    assert math.isnan(seconds_to(one, 1e-9))


def test_inner_iterations(folder, tmp_path):
    config = stability.StabilityConfig(
        plan=Plan(seeds=1),
        molecules=("H2",),
        rows=("descent-plain", "l-bfgs-plain", "l-bfgs-even", "l-bfgs-floor"),
        iterations=1,
        measure_every=1,
        descent_steps=400,
        grid=1,
        data_dir=folder,
    )
    runs = run_all(stability_rows.jobs(config), tmp_path)
    summary = summarize_stability(config, runs)
    well_formed(summary, runs)
    assert len(summary.claims) == 5
    assert [drawing.name for drawing in summary.drawings] == ["by-l-bfgs", "by-descent", "by-eigenvalue"]
    row = next(row for row in stability_rows.read(config, runs) if row.name == "l-bfgs-plain")
    assert own(row.results[0]) >= 1
    assert row.results[0].looks[0].train.least > 0

    def grown(name, ours, descent):
        """That row, its steps and those of gradient descent multiplied, the latter after training."""
        inner, help_ = stability_rows.all_rows(config)[name]
        (first, last), before = row.results[0].looks[:2], row.counted[0]
        last = replace(last, train=replace(last.train, mean_steps=ours * first.train.mean_steps, unconverged=0.0))
        after = [replace(one, steps=int(descent * one.steps)) for one in before.descent_before]
        results = replace(row.results[0], looks=[first, last])
        return stability_rows.Row(inner, help_, {0: results}, {0: replace(before, descent_after=after)})

    rows = [grown("descent-plain", 5, 5), grown("l-bfgs-plain", 1.5, 6), grown("l-bfgs-even", 1.5, 3)]
    assert [claim.holds for claim in stability_claims(rows)] == [True, True, True, True]
    rows = [grown("descent-plain", 3, 3), grown("l-bfgs-plain", 3, 3), grown("l-bfgs-even", 3, 3)]
    assert [claim.holds for claim in stability_claims(rows)] == [False, False, False, False]


def test_settings_that_make_no_sense():
    with pytest.raises(UserError, match="--estimators must be different names"):
        single.SingleConfig(estimators=("implicit", "implicit"))
    with pytest.raises(UserError, match="takes 16 of --qm9-limit 12 away"):
        molecules.MoleculesConfig(qm9_limit=12)
    with pytest.raises(UserError, match="no row 'newton'; the rows are gauss-newton"):
        molecules_rows.jobs(molecules.MoleculesConfig(rows=("newton",)))
    with pytest.raises(UserError, match="no row 'sgd'; the rows are l-bfgs-plain"):
        stability_rows.jobs(stability.StabilityConfig(rows=("sgd",)))
    with pytest.raises(UserError, match="row 'l-bfgs-hessian' is drawn at random"):
        stability_rows.jobs(stability.StabilityConfig(rows=("l-bfgs-hessian",)))
    drawn = stability.StabilityConfig(rows=("l-bfgs-hessian",), optimizer="adam")
    assert len(stability_rows.jobs(drawn)) == 3
    with pytest.raises(UserError, match="--molecules must be different"):
        stability.StabilityConfig(molecules=())


def test_figures_in_words():
    assert shown(0.0123456, 3) == "0.0123"
    assert shown(1234.5, 2) == "1234"
    assert shown(2e-7, 2) == "2.0e-07"
    assert told([1.0, math.nan, 3.0], 2) == "2 (1–3)"
    assert told([math.nan]) == "–"

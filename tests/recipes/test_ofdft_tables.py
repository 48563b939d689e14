"""The tables of trained density functionals: their runs, and what they make of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

pytest.importorskip("scipy")

from rich.console import Console
from running import run_jobs

from tests.conftest import H2
from torchimplicit.recipes.density import finetuning, gradients, molecules, single, stability, storage
from torchimplicit.recipes.density.chemistry import distorted, named
from torchimplicit.recipes.density.results import ratio, seconds_to, shown, told
from torchimplicit.recipes.density.settings import ChemistrySettings, Molecules
from torchimplicit.recipes.registry import runner
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.table import Plan, Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """H2, and "distorted" copies whose densities are its own, so that nothing is computed."""
    made = tmp_path_factory.mktemp("molecules")
    record, asked, middle = storage.read(H2), ChemistrySettings(grid=1), named("H2")
    record = replace(record, points=record.points[::4], quadrature=4 * record.quadrature[::4])  # quick, if coarse
    for geometry in (middle, *(distorted(middle, 0.04, 0, copy) for copy in (1, 2, 3))):
        storage.write(made / storage.file_name(geometry, asked), replace(record, geometry=geometry))
    return made


def well_formed(summary, runs):
    assert summary.sheets
    for sheet in summary.sheets:
        assert sheet.table.rows
        assert all(len(row) == len(sheet.table.columns) for row in sheet.table.rows), sheet.title
    assert set(summary.runs) == set(runs)
    json.dumps(summary.runs, allow_nan=False)
    assert len({drawing.name for drawing in summary.drawings}) == len(summary.drawings)


def test_one_molecule(folder, tmp_path):
    config = single.SingleConfig(
        plan=Plan(seeds=1), molecule="H2", optimizers=("l-bfgs",), l_bfgs_iterations=1, grid=1, data_dir=folder
    )
    config = replace(config, estimators=("implicit", "eqprop"))
    runs = run_jobs(single.jobs(config), tmp_path)
    summary = single.TABLE.summarize(config, runs)
    well_formed(summary, runs)
    assert [drawing.name for drawing in summary.drawings] == ["loss", "line"]
    assert len(summary.sheets[0].table.rows) == 2 + 2
    assert len(summary.claims) == 3
    one = dict(list(runs.items())[:1])
    assert any("1 of 2 runs are missing" in note for note in single.TABLE.summarize(config, one).notes)


def test_claims_of_one_molecule_follow_the_figures():
    config = single.SingleConfig(plan=Plan(seeds=1), optimizers=("l-bfgs",))

    def holding(**rows):
        figures = {
            f"{name.replace('_', '-')}-l-bfgs-0": {"loss": [1.0, end], "losses": [[0.0, 1.0], [seconds, end]]}
            for name, (end, seconds) in rows.items()
        }
        return [claim.holds for claim in single.claims(config, Runs.made_by(single.jobs(config), figures))]

    assert holding(implicit=(0.5, 1.0), eqprop=(0.51, 2.0), eqprop_one_sided=(0.58, 1.0)) == [True, True, False, True]
    # times to a loss that is not reached cannot be compared
    assert holding(implicit=(0.7, 1.0), eqprop=(0.7, 2.0)) == [False, True, None]
    assert holding(implicit=(0.95, 1.0), eqprop=(0.95, 2.0)) == [False, None, None]


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
    molecules.TABLE.check(config)
    runs = run_jobs(molecules.jobs(config), tmp_path)
    summary = molecules.TABLE.summarize(config, runs)
    well_formed(summary, runs)
    assert len(summary.claims) == 5
    assert [drawing.name for drawing in summary.drawings] == ["along-training", "test"]
    assert len(summary.sheets[0].table.rows) == 2 + 2
    line = Runs.made_by(molecules.jobs(config), summary.runs)[0]
    assert 0 < ratio(line) < 1.5
    assert math.isnan(seconds_to(line, 1e-9))


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
    runs = run_jobs(stability.jobs(config), tmp_path)
    summary = stability.TABLE.summarize(config, runs)
    well_formed(summary, runs)
    assert len(summary.claims) == 5
    assert [drawing.name for drawing in summary.drawings] == ["by-l-bfgs", "by-descent", "by-eigenvalue"]
    plain = summary.runs["l-bfgs-plain-0"]
    assert plain["growth"] >= 1
    assert plain["looks"][0]["least"] > 0

    def holding(**rows):
        """The growth of each row, and how many times as many steps gradient descent takes after training."""
        figures = {}
        for name, (growth, descent) in rows.items():
            before = plain["counted"]["descent_before"]
            after = [{**one, "steps": int(descent * one["steps"])} for one in before]
            counted = {**plain["counted"], "descent_after": after}
            figures[f"{name.replace('_', '-')}-0"] = {**plain, "growth": growth, "counted": counted}
        return [claim.holds for claim in stability.claims(config, Runs.made_by(stability.jobs(config), figures))]

    assert holding(descent_plain=(5, 5), l_bfgs_plain=(1.5, 6), l_bfgs_even=(1.5, 3)) == [True] * 4
    assert holding(descent_plain=(3, 3), l_bfgs_plain=(3, 3), l_bfgs_even=(3, 3)) == [False] * 4


def test_settings_that_make_no_sense():
    with pytest.raises(UserError, match="--estimators must be different names"):
        single.SingleConfig(estimators=("implicit", "implicit"))
    with pytest.raises(UserError, match="takes 16 of --qm9-limit 12 away"):
        molecules.MoleculesConfig(qm9_limit=12)
    with pytest.raises(UserError, match="no row newton; the rows are gauss-newton"):
        molecules.jobs(molecules.MoleculesConfig(rows=("newton",)))
    with pytest.raises(UserError, match="no row sgd; the rows are l-bfgs-plain"):
        stability.jobs(stability.StabilityConfig(rows=("sgd",)))
    with pytest.raises(UserError, match="row 'l-bfgs-hessian' has a loss that is drawn at random"):
        stability.jobs(stability.StabilityConfig(rows=("l-bfgs-hessian",)))
    drawn = stability.StabilityConfig(rows=("l-bfgs-hessian",), optimizer="adam")
    assert len(stability.jobs(drawn)) == 3
    for config in (stability.StabilityConfig, molecules.MoleculesConfig, gradients.TableConfig):
        for twice in ((), ("H2", "H2")):
            with pytest.raises(UserError, match="--molecules must be different"):
                config(molecules=twice)


def test_a_remedy_where_nothing_ails_is_not_tested():
    config = stability.StabilityConfig(plan=Plan(seeds=1), rows=("l-bfgs-plain", "l-bfgs-floor"))

    def verdict(*after):
        counts = [{f"descent_{when}": [{"steps": n, "converged": True}]} for n in after for when in ("after",)]
        figures = {
            f"{row}-0": {
                "counted": {"descent_before": [{"steps": 100, "converged": True}], **count},
                "least": 1.0,
                "loss": [1.0, 0.5],
                "growth": 1.0,
            }
            for row, count in zip(("l-bfgs-plain", "l-bfgs-floor"), counts, strict=True)
        }
        return [*stability.claims(config, Runs.made_by(stability.jobs(config), figures))][-1].verdict

    assert [verdict(100, 90), verdict(1000, 200), verdict(1000, 900)] == ["Not tested", "Holds", "Fails"]


def test_figures_in_words():
    assert shown(0.0123456, 3) == "0.0123"
    assert shown(1234.5, 2) == "1234"
    assert shown(2e-7, 2) == "2.0e-07"
    assert told([1.0, math.nan, 3.0], 2) == "2 (1–3)"
    assert told([math.nan]) == "–"


def test_pretrained_and_fine_tuned(folder, tmp_path):
    copies = {"train_copies": 1, "validation_copies": 1, "test_copies": 1}
    config = finetuning.FinetuneConfig(
        plan=Plan(seeds=1),
        molecules=Molecules(sources=("H2",), data_dir=folder, **copies),
        kinds=("potential", "density"),
        rows=("implicit", "damped", "descent", "descent-one"),
        pretraining_steps=4,
        finetuning_steps=2,
        descent_steps=300,
        check_grid=1,
    )
    runs = run_jobs(finetuning.jobs(config), tmp_path)
    summary = finetuning.TABLE.summarize(config, runs)
    well_formed(summary, runs)
    assert [len(one.table.rows) for one in summary.sheets] == [2 + 2, 6, 4]
    assert len(summary.claims) == 2 + 1 + 2 + 2
    assert [drawing.name for drawing in summary.drawings] == ["validation"]
    assert not any("not done" in note for note in summary.notes)
    assert set(summary.runs["potential-0"]) == {
        "pretrained",
        "pretrained_longer",
        "implicit",
        "damped",
        "descent",
        "descent_one",
    }
    (job, *_) = finetuning.jobs(config)
    before = (runs[job.name].path / "implicit" / "results.json").read_bytes()
    assert runner(job.recipe).train(job.config, runs[job.name], Console(quiet=True))  # all is there
    assert (runs[job.name].path / "implicit" / "results.json").read_bytes() == before


def test_claims_of_fine_tuning_follow_the_figures():
    config = finetuning.FinetuneConfig(plan=Plan(seeds=1), kinds=("potential",))

    def holding(implicit, longer, eqprop, one=(100.0, 100.0), many=(100.0, 100.0)):
        def way(loss, steps=(10.0, 10.0)):
            glances = [{"L": 1.0, "steps": k, "unconverged": 0.0, "step": place} for place, k in enumerate(steps)]
            return {"test": {"loss": loss}, "glances": glances, "selected": 1}

        figures = {
            "pretrained": {"test": {"loss": 1.0, "l1": 0.1, "better": 1.0}, "spurious": 0.0},
            "pretrained_longer": {"test": {"loss": longer}},
            "implicit": way(implicit),
            "eqprop": way(eqprop),
            "descent": way(1.0, many),
            "descent_one": way(1.0, one),
        }
        runs = Runs.made_by(finetuning.jobs(config), {"potential-0": figures})
        return [claim.holds for claim in finetuning.claims(config, runs)][2:]

    assert holding(0.9, 2.0, 0.9) == [
        False,
        True,
        False,
        None,
    ]  # that more pre-training harms is no merit of fine-tuning
    assert holding(0.6, 1.0, 0.61) == [True, True, False, None]
    assert holding(0.9, 1.0, 1.0) == [False, False, False, None]
    assert holding(0.6, 1.0, 0.6, many=(100.0, 500.0)) == [True, True, True, True]
    assert holding(0.6, 1.0, 0.6, many=(100.0, 500.0), one=(100.0, 500.0)) == [True, True, False, True]

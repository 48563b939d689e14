"""The tables of implicit representations."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("lightning")
pytest.importorskip("submitit")
pytest.importorskip("tyro")

from running import run_jobs

from torchimplicit.recipes.representations import generalization, gradients, signals
from torchimplicit.recipes.representations.cost import FieldCostConfig
from torchimplicit.recipes.representations.cost import measured as measured_costs
from torchimplicit.recipes.representations.generalization import GeneralizationConfig
from torchimplicit.recipes.representations.gradients import GradientsConfig
from torchimplicit.recipes.representations.signals import SignalsConfig
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.settings import Machine, to_plain
from torchimplicit.recipes.runtime.step_cost import StepCost
from torchimplicit.recipes.runtime.table import Plan

HERE = Machine(device="cpu", tensorboard=False)
SHORT = {"size": 16, "width": 4, "steps": 2, "machine": HERE}
SMALL = GeneralizationConfig(
    plan=Plan(seeds=1),
    natural=(),
    texts=("text-0",),
    rows=(
        *(f"fourier-{kind}-1L{free}" for kind in ("implicit", "explicit") for free in ("", "-free")),
        *("fourier-explicit-4L", "fourier-implicit-1L-full", "cost"),
    ),
    **SHORT,
)
SIGNALS = SignalsConfig(
    plan=Plan(seeds=1),
    sound_seconds=0.2,
    sound_rate=1000,
    video_frames=2,
    video_size=10,
    width=4,
    steps=2,
    rows=(*(f"{kind}-fourier-{which}" for kind in signals.KINDS for which in ("implicit", "explicit")), "cost"),
    machine=HERE,
)
CUTS = GradientsConfig(plan=Plan(seeds=1), pictures=("text-0",), products=(0, 1), **SHORT)


@pytest.fixture(autouse=True)
def _slow_machine(one_thread):
    pass


def less(config):
    """The cost of few steps."""
    if not isinstance(config, FieldCostConfig):
        return config
    return replace(config, warm_steps=1, rounds=1, steps_a_turn=2)


def run_here(jobs, folder):
    """The runs of a table in this process."""
    return run_jobs(jobs, folder, less)


class TestGeneralization:
    def test_the_rows_are_those_of_the_paper(self):
        assert len(generalization.OF_THE_TABLE) == 18
        row = generalization.ROWS["gabor-explicit-4L"]
        assert row.label(256) == "Gabor-MFN 4L-256"
        assert row.published("natural") == 24.65
        assert generalization.ROWS["siren-implicit-1L-wide"].published("text") == 26.81

    def test_the_papers_scale_is_the_papers(self):
        config = GeneralizationConfig(plan=Plan(scale="paper"))
        one = generalization.training(
            config, generalization.ROWS["fourier-implicit-1L-wide"], generalization.Subject("camera", "natural"), 0
        )
        assert (one.size, one.representation.width, one.optimization.steps) == (512, 512, 2000)
        assert (one.optimization.learning_rate, one.equilibria.phantom_steps) == (1e-3, 2)
        assert one.representation.amortize == "refresh"

    def test_twins_differ_in_being_implicit_alone(self):
        subject = generalization.Subject("camera", "natural")
        one, other = (
            generalization.training(GeneralizationConfig(), generalization.ROWS[f"siren-{kind}-4L"], subject, 1)
            for kind in ("implicit", "explicit")
        )
        assert replace(one, representation=replace(one.representation, implicit=False)) == other

    def test_full_solves_are_run_once_a_kind(self):
        names = [job.name for job in generalization.jobs(GeneralizationConfig())]
        assert sum("full" in name for name in names) == 6
        assert names.count("cost") == 1
        assert max(names.index(name) for name in names if name.endswith("seed0")) < min(
            names.index(name) for name in names if name.endswith("seed1")
        )

    def test_a_folder_of_pictures(self, tmp_path):
        with pytest.raises(UserError, match="holds no PNG"):
            generalization.jobs(replace(SMALL, data_dir=tmp_path))
        (tmp_path / "zebra.png").write_bytes(b"")
        (subject, *_) = generalization.subjects(replace(SMALL, data_dir=tmp_path))
        assert (subject.name, subject.kind) == ("zebra", "natural")
        assert generalization.jobs(replace(SMALL, data_dir=tmp_path))[0].config.file == tmp_path / "zebra.png"

    def test_the_record(self, tmp_path):
        runs = run_here(generalization.jobs(SMALL), tmp_path)
        summary = generalization.TABLE.summarize(SMALL, runs)
        assert [sheet.title for sheet in summary.sheets] == [
            "PSNR of pixels that were not trained on",
            "With and without the spectral bound",
            "A training step",
            "Steps and time to the final PSNR of the explicit one-layer network",
            "One evaluation per step against full solves",
        ]
        assert {drawing.name for drawing in summary.drawings} == {"training"}
        assert any("1.5 dB above that of Fourier-MFN 1L-4" in claim.statement for claim in summary.claims)
        assert any("twice as fast as with full" in claim.statement for claim in summary.claims)
        assert len(summary.runs) == 7
        assert any("stronger of its explicit counterparts" in claim.statement for claim in summary.claims)
        json.dumps(to_plain(summary.runs), allow_nan=False)

    def test_it_is_made_of_what_is_there(self, tmp_path):
        runs = run_here(generalization.jobs(replace(SMALL, rows=("fourier-implicit-1L",))), tmp_path)
        summary = generalization.TABLE.summarize(SMALL, runs)
        assert not summary.claims
        assert len(summary.sheets[0].table.rows) == 18


class TestGradients:
    def test_the_cuts(self):
        names = [row.name for row in gradients.rows(CUTS, "siren")]
        assert names == ["siren-T0", "siren-T1", "siren-converged"]
        settings = [job.config for job in gradients.jobs(CUTS)][:3]
        assert [one.equilibria.phantom_steps for one in settings[:2]] == [1, 2]
        assert settings[2].equilibria.gradient == "implicit"

    def test_bad_cuts_are_refused(self):
        for bad in ((), (1, 1), (-1,)):
            with pytest.raises(UserError, match="--products"):
                GradientsConfig(products=bad)

    def test_the_record(self, tmp_path):
        runs = run_here(gradients.jobs(CUTS), tmp_path)
        summary = gradients.TABLE.summarize(CUTS, runs)
        assert [sheet.title for sheet in summary.sheets] == ["iSIREN", "Fourier-iMFN", "Gabor-iMFN"]
        assert len(summary.claims) == 6
        assert [drawing.name for drawing in summary.drawings] == ["products"]
        costs = summary.runs["cost"]
        assert costs["siren-T0"]["cosine"] < costs["siren-converged"]["cosine"]


def test_costs():
    jobs = generalization.jobs(replace(SMALL, width=16, size=32))
    (config,) = (job.config for job in jobs if job.name == "cost")
    names = ("fourier-implicit-1L", "fourier-explicit-1L", "fourier-implicit-1L-full")
    chosen = FieldCostConfig(
        names=names,
        fits=tuple(config.fits[config.names.index(name)] for name in names),
        warm_steps=2,
        rounds=1,
        steps_a_turn=2,
    )
    amortized, explicit, full = measured_costs(chosen).values()
    assert isinstance(amortized, StepCost)
    assert (amortized.forward, amortized.backward) == (1, 1)
    assert full.forward > 3
    assert (explicit.forward, explicit.backward) == (0, 0)
    assert amortized.parameters == explicit.parameters == full.parameters
    assert explicit.megabytes < amortized.megabytes < full.megabytes
    assert full.cosine > 0.9999
    assert 0.9 < amortized.cosine < 1


class TestSignals:
    def test_the_rows(self):
        assert len(signals.ROWS) == 12
        assert signals.PUBLISHED_VIDEO["gabor"][1] == 26.15
        assert signals.ROWS["sound-siren-implicit"].twin.name == "sound-siren-explicit"

    def test_the_papers_scale_is_the_papers(self):
        config = SignalsConfig(plan=Plan(scale="paper"))
        heard = signals.heard(config, signals.ROWS["sound-fourier-implicit"], 0)
        seen = signals.seen(config, signals.ROWS["video-fourier-implicit"], 0)
        assert (heard.rate, heard.seconds, heard.representation.width, heard.optimization.steps) == (
            44100,
            7,
            256,
            3000,
        )
        assert heard.representation.amortize == "refresh"
        assert (seen.size, seen.representation.width, seen.optimization.steps) == (512, 1024, 10000)
        assert (seen.optimization.batch_size, seen.representation.frequencies) == (65536, 128)
        assert seen.representation.amortize == "off"

    def test_twins_differ_in_being_implicit_alone(self):
        for kind, fit in (("sound", signals.heard), ("video", signals.seen)):
            row = signals.ROWS[f"{kind}-siren-implicit"]
            one, other = (fit(SignalsConfig(), which, 1) for which in (row, row.twin))
            assert replace(one, representation=replace(one.representation, implicit=False)) == other

    def test_the_record(self, tmp_path):
        runs = run_here(signals.jobs(SIGNALS), tmp_path)
        summary = signals.TABLE.summarize(SIGNALS, runs)
        assert [sheet.title for sheet in summary.sheets] == ["The sound", "The video", "A training step"]
        assert [len(sheet.table.rows) for sheet in summary.sheets] == [6, 6, 12]
        assert {drawing.name for drawing in summary.drawings} == {"training", "sound", "video"}
        assert len(summary.claims) == 4
        assert len(summary.runs) == 5
        json.dumps(to_plain(summary.runs), allow_nan=False)

    def test_it_is_made_of_what_is_there(self, tmp_path):
        chosen = replace(SIGNALS, rows=("sound-siren-implicit",))
        summary = signals.TABLE.summarize(chosen, run_here(signals.jobs(chosen), tmp_path))
        assert not summary.claims
        assert {drawing.name for drawing in summary.drawings} == {"training"}
        assert len(signals.TABLE.summarize(chosen, {}).sheets) == 2

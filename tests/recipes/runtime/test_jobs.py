"""Tables of many runs: jobs through a real scheduler, the record, the page, and what happens when runs fail."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("submitit")

from rich.console import Console

from torchimplicit import cli
from torchimplicit.recipes import registry
from torchimplicit.recipes.phantom.demo import DigitsConfig
from torchimplicit.recipes.runtime import table
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.execution import terminated_like_interrupted
from torchimplicit.recipes.runtime.jobs import command, run_all, write
from torchimplicit.recipes.runtime.page import axes
from torchimplicit.recipes.runtime.run import Run
from torchimplicit.recipes.runtime.table import (
    CaptionedFigure,
    Cell,
    Claim,
    Column,
    Job,
    Plan,
    Runs,
    Table,
    TitledTable,
    spread,
)


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """A table of one-step runs."""

    plan: Plan = field(default_factory=lambda: Plan(seeds=2, parallel=2))
    epochs: int = 1
    """Of the runs."""


def toy() -> ToyConfig:
    return ToyConfig()


def jobs(config: ToyConfig) -> list[Job]:
    return [
        Job(f"digits-{seed}", "digits", DigitsConfig(max_steps=1, epochs=config.epochs, seed=seed))
        for seed in config.plan.all_seeds
    ]


def figures(config: ToyConfig, run: Run) -> float:
    return run.read_json("results.json")["estimators"]["implicit"]["track"]["validations"][-1]["accuracy"]


def protocol(config: ToyConfig, runs: Runs) -> str:
    return "one step"


def sheets(config: ToyConfig, runs: Runs) -> list[TitledTable]:
    return [table.sheet("Accuracy", ["all"], [Cell("Row", str), Cell("Ours", lambda _: spread(accuracies(runs)))])]


def accuracies(runs: Runs) -> list[float]:
    return [line.figures for line in runs]


def claims(config: ToyConfig, runs: Runs) -> list[Claim]:
    return [Claim("accuracy is at least 0", f"{min(accuracies(runs))}", True)]


def notes(config: ToyConfig, runs: Runs) -> list[str]:
    return ["a note"]


def drawings(config: ToyConfig, runs: Runs, folders: Mapping[str, Run]) -> list[CaptionedFigure]:
    figure, (plot,) = axes()
    plot.plot(accuracies(runs))
    return [CaptionedFigure("accuracy", figure, "Accuracy.")]


TABLE = table.published(globals(), title="A toy", source="nowhere")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchimplicit.recipes.toy_table", sys.modules[__name__])
    monkeypatch.setitem(registry.TABLES, "toy", registry.Entry("toy_table", "toy", "TABLE", "A toy."))


def test_a_table_from_its_runs_to_its_record(tmp_path, capsys):
    output, records = tmp_path / "toy", tmp_path / "records"
    argv = ["reproduce", "toy", "--output", str(output), "--record", str(records)]
    assert cli.main(argv) == 0, capsys.readouterr().err
    run = Run(output)
    record = run.read_json("record.json")
    assert set(record["runs"]) == {"digits-0", "digits-1"}
    assert record["command"] == "torchimplicit reproduce toy"
    assert record["seconds"] > 0
    assert "<svg" in (output / "index.html").read_text(encoding="utf-8")
    assert (records / "toy" / "record.json").is_file()
    assert (records / "toy" / "accuracy.png").is_file()
    before = (output / "runs" / "digits-0" / "results.json").stat().st_mtime_ns
    assert cli.main(["evaluate", str(output)]) == 0
    run.mark("interrupted")
    assert cli.main(["resume", str(output)]) == 0
    assert (output / "runs" / "digits-0" / "results.json").stat().st_mtime_ns == before, "what is done is not run again"


def test_runs_of_other_settings_are_not_taken_for_these(tmp_path):
    config = ToyConfig(plan=Plan(seeds=1))
    (job,) = jobs(config)
    folder = tmp_path / "runs"
    run = Run(folder / job.name)
    run.path.mkdir(parents=True)
    run.describe(job.recipe, replace(job.config, seed=5))
    with pytest.raises(UserError, match="other settings"):
        run_all([job], folder, config.plan, Console(quiet=True))


def test_a_run_that_fails_does_not_take_the_others_along(tmp_path, capsys):
    good = jobs(ToyConfig(plan=Plan(seeds=1)))[0]
    folder = tmp_path / "runs"
    bad = replace(good, name="bad")
    (folder / "bad" / "checkpoints").mkdir(parents=True)
    (folder / "bad" / "logs").mkdir()
    run = Run(folder / "bad")
    run.describe(bad.recipe, bad.config)
    run.checkpoint.write_bytes(b"broken")
    console = Console(width=200)
    runs = run_all([bad, good], folder, Plan(seeds=1), console)
    assert runs[good.name].read()["state"] == "complete"
    assert runs["bad"].read()["state"] != "complete"
    reason = runs["bad"].read()["reason"]
    assert f"bad failed: {reason}; see" in capsys.readouterr().out


def test_a_table_that_is_terminated_stops_its_run_and_can_be_resumed(tmp_path):
    """SIGTERM reaches the run's process, which saves what is done, though it is not this one's child."""
    (job,) = jobs(ToyConfig(plan=Plan(seeds=1)))
    job = replace(job, config=replace(job.config, max_steps=None, epochs=10_000))  # it would take hours
    run = Run(tmp_path / "runs" / job.name)

    def wait_for(state):
        for _ in range(600):
            time.sleep(0.2)
            if run.description.is_file() and run.read()["state"] == state:
                return
        raise AssertionError(f"the run is {run.read()['state']}")

    def terminate():
        wait_for("running")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(KeyboardInterrupt), terminated_like_interrupted():
        run_all([job], tmp_path / "runs", Plan(seeds=1), Console(quiet=True))
    thread.join()
    wait_for("interrupted")
    assert "Interrupted" in (run.path / "log.txt").read_text(encoding="utf-8")


def test_runs_that_share_a_process(tmp_path, capsys):
    first, second = jobs(ToyConfig())
    bad = replace(first, name="bad")
    folder = tmp_path / "runs"
    (folder / "bad" / "checkpoints").mkdir(parents=True)
    (folder / "bad" / "logs").mkdir()
    run = Run(folder / "bad")
    run.describe(bad.recipe, bad.config)
    run.checkpoint.write_bytes(b"broken")
    runs = run_all([first, bad, second], folder, Plan(together=3), Console(width=200))
    assert [runs[name].read()["state"] for name in (first.name, second.name)] == ["complete"] * 2
    assert runs["bad"].read()["state"] != "complete"
    said = capsys.readouterr().out
    assert "bad failed" in said
    assert f"{second.name}: complete" in said
    assert len(list((folder / "scheduler").glob("*_submitted.pkl"))) == 1


def test_the_command_names_what_differs():
    plan = Plan(seeds=5, parallel=2, record=Path("x"))
    assert command("toy", ToyConfig(plan=plan, epochs=3)) == "torchimplicit reproduce toy --seeds 5 --epochs 3"


def test_spread():
    assert spread([0.85, 0.87], scale=100) == "86.0 ± 1.4"
    assert spread([1.0]) == "1.0"
    assert spread([]) == "–"


def test_markdown():
    shown = Table([Column("Row"), Column("Ours", "%", "measured")], [["a|b", "1"]])
    assert shown.markdown() == "| Row | Ours (%) |\n| --- | ---: |\n| a\\|b | 1 |\n\n- **Ours**: measured"


def test_the_documentation_shows_a_record(tmp_path, monkeypatch):
    pytest.importorskip("markdown")
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "docs")
    module = import_module("extensions.records")
    run = Run(tmp_path / "toy")
    run.path.mkdir()
    run.describe("toy", ToyConfig())
    made = Run(tmp_path / "digits")
    made.path.mkdir()
    made.write_json("results.json", {"estimators": {"implicit": {"track": {"validations": [{"accuracy": 0.5}]}}}})
    write(TABLE, ToyConfig(), {"digits-0": made}, run, Console(quiet=True))
    text = module.record_text(module.load(tmp_path, "toy"), "../records/toy")
    assert "| all | 0.5 |" in text
    assert "- **Holds**: accuracy is at least 0. 0.5" in text
    assert "![Accuracy.](../records/toy/accuracy.png)" in text
    assert "torchimplicit reproduce toy" in text

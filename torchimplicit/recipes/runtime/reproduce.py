"""The runner of every table."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from torchimplicit.recipes.registry import runner, settings
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.files import replacing
from torchimplicit.recipes.runtime.jobs import finished, run_all
from torchimplicit.recipes.runtime.page import record_page, saved, styled
from torchimplicit.recipes.runtime.run import Environment, Run
from torchimplicit.recipes.runtime.settings import from_plain, to_plain
from torchimplicit.recipes.runtime.table import Job, Picture, Record, Summary

FOLDERS = ("record", "data_dir")
FILES = ("sound_file", "video_file", "mesh_file")
"""Settings that are paths."""


class Reproduction:
    """Runs a table.

    Args:
        jobs: the runs that the settings ask for.
        summarize: what the runs, by the jobs' names, come to. A run may have diverged (its ``run.json`` says so), and
            one that failed is missing.
    """

    def __init__(self, jobs: Callable[[Any], list[Job]], summarize: Callable[[Any, dict[str, Run]], Summary]):
        self._jobs = jobs
        self._summarize = summarize

    def check(self, config: Any) -> None:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`: one job of every recipe is checked."""
        for job in {job.recipe: job for job in self._jobs(config)}.values():
            runner(job.recipe).check(job.config)

    def train(self, config: Any, run: Run, console: Console) -> bool:
        """See :class:`~torchimplicit.recipes.runtime.run.Runner`."""
        jobs = self._jobs(config)
        console.print(
            f"{len(jobs)} runs, {config.plan.parallel} at a time; Ctrl-C stops and 'torchimplicit resume {run}' goes "
            "on.",
            highlight=False,
        )
        began = time.monotonic()
        before = self._spent(run)
        try:
            runs = run_all(jobs, run.path / "runs", config.plan, console)
        finally:  # a table that is stopped has spent its time too
            run.write_json("seconds.json", {"seconds": before + time.monotonic() - began})
        left = [name for name, one in runs.items() if not finished(one)]
        self._write(config, {name: one for name, one in runs.items() if name not in left}, run, console)
        if left:
            console.print(
                f"[red]{len(left)} of {len(jobs)} runs are not done[/red]: {', '.join(left)}", highlight=False
            )
        return not left

    def evaluate(self, config: Any, run: Run, console: Console) -> None:
        """Make the record again from the runs that are there, training nothing."""
        runs = {job.name: Run(run.path / "runs" / job.name) for job in self._jobs(config)}
        there = {name: one for name, one in runs.items() if one.description.is_file() and finished(one)}
        if not there:
            raise UserError(f"{run} has no finished runs; resume it first")
        self._write(config, there, run, console)
        run.write_json("evaluation.json", {"runs": sorted(there)})

    def _spent(self, run: Run) -> float:
        """Seconds of earlier attempts."""
        return float(run.read_json("seconds.json")["seconds"]) if (run.path / "seconds.json").is_file() else 0.0

    def _write(self, config: Any, runs: dict[str, Run], run: Run, console: Console) -> None:
        if not runs:
            return
        with styled():
            summary = self._summarize(config, runs)
            pictures = saved(summary.drawings, run)
        name = run.read()["recipe"]
        record = Record(
            name=name,
            title=summary.title,
            source=summary.source,
            protocol=summary.protocol,
            sheets=summary.sheets,
            claims=summary.claims,
            pictures=[Picture(f"{d.name}.png", d.caption) for d in summary.drawings],
            notes=summary.notes,
            command=command(name, config),
            seconds=self._spent(run),
            environment=Environment.of(_device(config)),
            settings=_without_paths(to_plain(config)),
            runs=summary.runs,
        )
        run.write_json("record.json", record)
        run.write_text("index.html", record_page(record, pictures))
        for sheet in record.sheets:
            console.print(f"[bold]{sheet.title}")
            console.print(sheet.table.rich_rows())
        for claim in record.claims:
            colour = {None: "yellow", True: "green", False: "red"}[claim.holds]
            console.print(f"[{colour}]{claim.verdict}[/{colour}]: {claim.statement}: {claim.measured}", highlight=False)
        if config.plan.record is not None:
            _copy(run, record, config.plan.record / name)


def _copy(run: Run, record: Record, folder: Any) -> None:
    """The record and its figures, for the documentation."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    for place, name in (
        ("record.json", "record.json"),
        *((f"figures/{one.file}", one.file) for one in record.pictures),
    ):
        with replacing(folder / name) as draft:
            shutil.copyfile(run.path / place, draft)


def command(name: str, config: Any) -> str:
    """The command that gives these settings: those that differ from the table's own."""
    default = settings(name)
    words = [f"torchimplicit reproduce {name}"]
    for key, (value, usual) in _leaves(to_plain(config), to_plain(default)).items():
        if value != usual and key not in FOLDERS + FILES:
            words.append(_word(key, value))
    return " ".join(words)


def _without_paths(plain: dict[str, Any]) -> dict[str, Any]:
    """The settings without what says where this machine keeps things, for a record is published: of a file its name
    is kept."""
    return {
        key: _without_paths(value) if isinstance(value, dict) else _name(key, value)
        for key, value in plain.items()
        if key not in FOLDERS
    }


def _name(key: str, value: Any) -> Any:
    return Path(value).name if value and key in FILES else value


def _leaves(plain: dict[str, Any], usual: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            found |= _leaves(value, usual[key])
        else:
            found[key] = (value, usual[key])
    return found


def _word(key: str, value: Any) -> str:
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    if isinstance(value, list):
        return " ".join([f"--{name}", *map(str, value)])
    return f"--{name} {value}"


def _device(config: Any) -> torch.device:
    wanted = getattr(getattr(config, "machine", None), "device", "auto")
    return torch.device("cuda" if torch.cuda.is_available() and wanted != "cpu" else "cpu")


def load_record(run: Run) -> Record:
    """The record that a run has written."""
    plain = run.read_json("record.json")
    return replace(
        from_plain(Record, {**plain, "settings": {}, "runs": {}}), settings=plain["settings"], runs=plain["runs"]
    )

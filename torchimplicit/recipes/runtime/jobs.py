"""Schedules the runs of a table as local processes or Slurm jobs, and makes the record from them."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import submitit
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from torchimplicit.recipes.registry import runner, settings
from torchimplicit.recipes.runtime.errors import DivergedError, UserError
from torchimplicit.recipes.runtime.execution import INTERRUPTED, go, opened, terminated_like_interrupted
from torchimplicit.recipes.runtime.files import replacing, say_once, sum_of
from torchimplicit.recipes.runtime.markdown import record_readme
from torchimplicit.recipes.runtime.page import record_page, saved, styled
from torchimplicit.recipes.runtime.run import Environment, Run, RunOptions, create
from torchimplicit.recipes.runtime.settings import to_plain
from torchimplicit.recipes.runtime.table import Job, Picture, Plan, Published, Record

POLL = 1.0
"""Seconds between two checks of the runs."""


def run_all(jobs: Sequence[Job], folder: Path, plan: Plan, console: Console) -> dict[str, Run]:
    """Run all unfinished jobs, each in a folder of its name; stopped runs are resumed.

    Returns:
        the runs by the jobs' names; some may have diverged, or failed, which their ``run.json`` says.

    Raises:
        KeyboardInterrupt: after the runs have been told to stop too.
    """
    owner = Run(folder.parent)
    table = sum_of(owner.read()["config"]) if owner.description.is_file() else ""
    runs = {job.name: prepare(job, folder, table) for job in jobs}
    waiting = [job for job in jobs if not finished(runs[job.name])]
    if not waiting:
        return runs
    names = [job.name for job in waiting]
    bundles = [tuple(names[i : i + plan.together]) for i in range(0, len(names), plan.together)]
    started: dict[tuple[str, ...], submitit.Job[None]] = {}
    executor = _executor(folder / "scheduler", plan, waiting)

    def submitted(bundle: tuple[str, ...]) -> submitit.Job[None]:
        return executor.submit(work, *(str(runs[name].path.resolve()) for name in bundle))

    if plan.cluster == "slurm":  # its array does the waiting
        with executor.batch():
            started = {bundle: submitted(bundle) for bundle in bundles}
        bundles = []
    try:
        with _bars(console, len(jobs)) as bars:
            while bundles or started:
                while bundles and len(started) < plan.parallel:
                    bundle = bundles.pop(0)
                    started[bundle] = submitted(bundle)
                time.sleep(POLL)
                for bundle in [bundle for bundle, process in started.items() if process.done()]:
                    error = started.pop(bundle).exception()
                    for name in bundle:
                        _say_how_it_ended(console, runs[name], error)
                _show(bars, runs, [name for bundle in started for name in bundle if not finished(runs[name])])
    except BaseException:
        for process in started.values():
            with suppress(Exception):
                _stop(process, plan)
        raise
    return runs


def _stop(process: submitit.Job[None], plan: Plan) -> None:
    """Stop a process gently, so that its run can save: submitit itself kills a local process after a second."""
    if plan.cluster == "local":
        os.kill(int(process.job_id), signal.SIGTERM)  # the number of the process that looks after it, and passes it on
    else:
        process.cancel(check=False)


def prepare(job: Job, folder: Path, table: str = "") -> Run:
    """The job's run directory, made if it is not there.

    A run that was prepared for the same settings of the table keeps its own, where defaults are others by now.

    Args:
        job: the job.
        folder: folder of all jobs.
        table: the checksum of the table's settings; empty: there is no table.

    Raises:
        UserError: the directory holds a run with other settings.
    """
    run = Run(folder / job.name)
    if not run.description.is_file():
        run = create(job.recipe, RunOptions(output=folder / job.name))
        run.describe(job.recipe, job.config, table)
        run.mark("interrupted", "not begun yet")
    elif (read := run.read())["config"] != to_plain(job.config, exact=True):
        if table and read.get("table") == table:
            say_once(f"{run.path.parent}: the runs keep the settings of their beginning; some defaults are others now")
            return run
        raise UserError(f"{run} was made with other settings; delete it, or choose a new --output")
    return run


def finished(run: Run) -> bool:
    """Return whether nothing is left to do."""
    return run.read()["state"] in ("complete", "diverged")


def work(*paths: str) -> None:
    """Entry point of a scheduled process: continue its runs one after another until one is interrupted.

    Raises:
        Exception: the first that a run failed with, when all have had their turn.
    """
    failures: list[Exception] = []
    with terminated_like_interrupted():
        for path in paths:
            try:
                if _go_on(path) == INTERRUPTED:
                    break
            except Exception as error:
                with (Path(path) / "log.txt").open("a", encoding="utf-8") as log:
                    log.write(f"failed: {error}\n")
                failures.append(error)
    if failures:
        raise failures[0]


def _go_on(path: str) -> int:
    run, runner, settings = opened(Path(path))
    with (run.path / "log.txt").open("a", encoding="utf-8") as log:
        console = Console(file=log, width=120)
        try:
            return go(runner, settings, run, console)
        except DivergedError as error:
            console.print(f"diverged: {error}")
            return 1


def _executor(folder: Path, plan: Plan, jobs: Sequence[Job]) -> submitit.AutoExecutor:
    executor = submitit.AutoExecutor(folder=folder, cluster=plan.cluster)
    machines = [getattr(job.config, "machine", None) for job in jobs]
    devices = max((machine.devices for machine in machines if machine is not None), default=1)
    on_gpu = any(machine is None or machine.device != "cpu" for machine in machines) and _has_gpu(plan)
    executor.update_parameters(
        name="torchimplicit",
        timeout_min=max(1, round(60 * plan.hours)),
        gpus_per_node=devices if on_gpu else 0,
        cpus_per_task=max(1, max((machine.threads for machine in machines if machine is not None), default=1)),
        stderr_to_stdout=True,
    )
    if plan.cluster == "slurm":
        executor.update_parameters(slurm_array_parallelism=plan.parallel, slurm_partition=plan.partition)
    return executor


def _has_gpu(plan: Plan) -> bool:
    return plan.cluster == "slurm" or torch.cuda.is_available()


def _say_how_it_ended(console: Console, run: Run, error: BaseException | None) -> None:
    noted = run.read()
    if error is None or finished(run):
        console.print(f"{run.path.name}: {noted['state']}", highlight=False)
        return
    # a process that was killed has left no reason, and the last line of its error names its log
    reason = noted.get("reason") or str(error).strip().splitlines()[-1].strip(" -")
    console.print(f"[red]{run.path.name} failed[/red]: {reason}; see {run}/log.txt", highlight=False, soft_wrap=True)


def _bars(console: Console, total: int) -> Progress:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=not console.is_terminal,
    )
    progress.add_task("[bold]runs", total=total, status="")
    return progress


def _show(bars: Progress, runs: dict[str, Run], started: Sequence[str]) -> None:
    """Show a bar for all runs, and one for each that is in progress."""
    whole, *parts = bars.tasks
    bars.update(whole.id, completed=sum(finished(run) for run in runs.values()))
    shown = {task.description: task for task in parts}
    for name, task in shown.items():
        if name not in started:
            bars.remove_task(task.id)
    for name in started:
        with suppress(OSError, ValueError, KeyError, UserError):
            noted = runs[name].read_json("progress.json")
            if name not in shown:
                bars.add_task(name, total=noted["total"], status="")
                continue
            bars.update(shown[name].id, completed=noted["done"], status=noted["status"])


# -- What a table does as a runner: see :class:`torchimplicit.recipes.runtime.run.Runner` ------------------------------


FOLDERS = ("record", "data_dir")
FILES = ("sound_file", "video_file", "mesh_file")
"""Settings that are paths."""


def check(table: Published[Any], config: Any) -> None:
    """Check one job of every recipe."""
    for job in {job.recipe: job for job in table.jobs(config)}.values():
        runner(job.recipe).check(job.config)


def train(table: Published[Any], config: Any, run: Run, console: Console) -> bool:
    """Run all unfinished runs and write the record; return whether all are done."""
    jobs = table.jobs(config)
    console.print(
        f"{len(jobs)} runs, {config.plan.parallel} at a time; Ctrl-C stops and 'torchimplicit resume {run}' continues.",
        highlight=False,
    )
    began, before = time.monotonic(), _spent(run)
    try:
        runs = run_all(jobs, run.path / "runs", config.plan, console)
    finally:  # a table that is stopped has spent its time too
        run.write_json("seconds.json", {"seconds": before + time.monotonic() - began})
    left = [name for name, one in runs.items() if not finished(one)]
    write(table, config, {name: one for name, one in runs.items() if name not in left}, run, console)
    if left:
        console.print(f"[red]{len(left)} of {len(jobs)} runs are not done[/red]: {', '.join(left)}", highlight=False)
    return not left


def evaluate(table: Published[Any], config: Any, run: Run, console: Console) -> None:
    """Write the record again from the existing runs, without training."""
    runs = {job.name: Run(run.path / "runs" / job.name) for job in table.jobs(config)}
    there = {name: one for name, one in runs.items() if one.description.is_file() and finished(one)}
    if not there:
        raise UserError(f"{run} has no finished runs; resume it first")
    write(table, config, there, run, console)
    run.write_json("evaluation.json", {"runs": sorted(there)})


def _spent(run: Run) -> float:
    """Seconds of earlier attempts."""
    return float(run.read_json("seconds.json")["seconds"]) if (run.path / "seconds.json").is_file() else 0.0


def write(table: Published[Any], config: Any, runs: dict[str, Run], run: Run, console: Console) -> None:
    """Write the record of these runs, its page, and its copy for the documentation if asked for."""
    if not runs:
        return
    with styled():
        summary = table.summarize(config, runs)
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
        seconds=_spent(run),
        environment=Environment.of(_device(config)),
        settings=_without_paths(to_plain(config)),
        runs=summary.runs,
    )
    run.write_json("record.json", record)
    run.write_text("index.html", record_page(record, pictures))
    for sheet in record.sheets:
        console.print(f"[bold]{sheet.title}")
        console.print(sheet.table.rich_rows(console.width))
    for claim in record.claims:
        colour = {None: "yellow", True: "green", False: "red"}[claim.holds]
        console.print(f"[{colour}]{claim.verdict}[/{colour}]: {claim.statement}: {claim.measured}", highlight=False)
    if config.plan.record is not None:
        _copy(run, record, config.plan.record / name)


def _copy(run: Run, record: Record, folder: Any) -> None:
    """Copy the record and its figures for the documentation."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.png"):
        stale.unlink()
    for place, name in (
        ("record.json", "record.json"),
        *((f"figures/{one.file}", one.file) for one in record.pictures),
    ):
        with replacing(folder / name) as draft:
            shutil.copyfile(run.path / place, draft)
    (folder / "README.md").write_text(record_readme(record), encoding="utf-8")


def command(name: str, config: Any) -> str:
    """The command for these settings, naming those that differ from the table's defaults."""
    default = settings(name)
    words = [f"torchimplicit reproduce {name}"]
    for key, (value, usual) in _leaves(to_plain(config), to_plain(default)).items():
        if value != usual and key not in FOLDERS + FILES:
            words.append(_word(key, value))
    return " ".join(words)


def _without_paths(plain: dict[str, Any]) -> dict[str, Any]:
    """The settings without local paths, as records are published; of a file, its name is kept."""
    return {
        key: _without_paths(value) if isinstance(value, dict) else _name(key, value)
        for key, value in plain.items()
        if key not in FOLDERS
    }


def _name(key: str, value: Any) -> Any:
    return Path(value).name if value and key in FILES else value


def _leaves(plain: dict[str, Any], usual: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    leaves: dict[str, tuple[Any, Any]] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            leaves |= _leaves(value, usual[key])
        else:
            leaves[key] = (value, usual[key])
    return leaves


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

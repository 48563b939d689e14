"""The commands: :func:`parse` turns arguments into a :class:`Command`, whose ``run`` does the work."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import reduce
from importlib import import_module
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from torchimplicit.recipes import registry
from torchimplicit.recipes.runtime.errors import UserError
from torchimplicit.recipes.runtime.execution import as_it_began, go, opened, terminated_like_interrupted
from torchimplicit.recipes.runtime.run import Exporter, Run, Runner, RunOptions, create

R = TypeVar("R")
W = TypeVar("W")


class Command(Protocol):
    """A parsed command."""

    def run(self, console: Console) -> int:
        """Run the command and return the exit code."""


@dataclass(frozen=True)
class List:
    """List the recipes and the tables, a line each."""

    def run(self, console: Console) -> int:
        for command, about, entries in (
            ("train", "recipes", registry.RECIPES),
            ("reproduce", "published tables and figures", registry.TABLES),
        ):
            console.print(f"[bold]{about.capitalize()}[/bold]: torchimplicit {command} NAME; settings: ... NAME --help")
            table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
            for name, entry in entries.items():
                table.add_row(f"  [bold]{name}", entry.summary)
            console.print(table)
        return 0


@dataclass(frozen=True)
class Start(Generic[R]):
    """Start a run of a recipe."""

    settings: R
    where: RunOptions = field(default_factory=RunOptions)
    recipe: tyro.conf.Suppress[str] = ""

    def run(self, console: Console) -> int:
        runner = registry.runner(self.recipe)
        runner.check(self.settings)
        run = create(self.recipe, self.where)
        return go(runner, self.settings, run, console, begins=self.recipe)


@dataclass(frozen=True)
class Deferred:
    """Stands for a recipe that was not asked for and is therefore not imported."""


@dataclass(frozen=True)
class Train(Generic[W]):
    """Train a recipe."""

    start: W

    def run(self, console: Console) -> int:
        assert isinstance(self.start, Start)
        return self.start.run(console)


@dataclass(frozen=True)
class Reproduce(Generic[W]):
    """Reproduce a published table or figure: run all its rows with several seeds and write a page of the results."""

    start: W

    def run(self, console: Console) -> int:
        assert isinstance(self.start, Start)
        return self.start.run(console)


@dataclass(frozen=True)
class Resume:
    """Continue an interrupted run from its last checkpoint, with its own settings."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The run's directory."""

    def run(self, console: Console) -> int:
        run, runner, settings = opened(self.path, again=False)
        runner.check(settings)
        return go(runner, settings, run, console)


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run again, from its last checkpoint."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The run's directory."""

    export_size: tuple[int, ...] = ()
    """Train nothing: sample a fitted field at this resolution and write the result beside the run. Pictures: pixels of
    the longest side, or height and width. Sounds: samples per second. Videos: frames, height, width. Shapes: grid cells
    along the longest side."""

    def run(self, console: Console) -> int:
        run, runner, settings = opened(self.path)
        with as_it_began(run):
            written = self._evaluated(run, runner, settings, console)
        console.print(f"Written to {written}", highlight=False, soft_wrap=True)
        return 0

    def _evaluated(self, run: Run, runner: Runner, settings: Any, console: Console) -> object:
        """Re-evaluate or export, and return the name of the file written."""
        if not self.export_size:
            runner.check(settings)
            runner.evaluate(settings, run, console)
            return f"{run}/evaluation.json"
        if not isinstance(runner, Exporter):
            raise UserError(f"{run} fits no field that --export-size could sample")
        return runner.export(settings, self.export_size, run, console)


@dataclass(frozen=True)
class ReportRuns:
    """Compare finished training runs: a table, learning curves, and an HTML page with both."""

    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(name="runs", metavar="RUN [RUN ...]")]
    """The runs' directories."""

    page: Path = Path("report.html")
    """Where to write the page. An existing report there is replaced; any other file is not."""

    def run(self, console: Console) -> int:
        from torchimplicit.recipes.runtime import report

        if not self.paths:
            raise UserError("report needs the directory of at least one run, such as runs/digits/001")
        if self.page.exists() and report.TITLE not in self.page.read_text(encoding="utf-8", errors="ignore"):
            raise UserError(f"--page {self.page} exists and is no report; choose another file")
        runs = [report.finished(path) for path in self.paths]
        console.print(report.comparison(runs).rich_rows())
        report.write(runs, self.page)
        console.print(f"Open in a browser: {self.page.resolve().as_uri()}", soft_wrap=True)
        return 0


COMMANDS = {
    "demo": "Compare gradient estimators on handwritten digits, with a page of results (under three minutes).",
    "list": "List the recipes and the tables.",
    "molecules": "Compute data files of molecules for density functionals.",
    "density": "Find molecules' densities, energies and forces with a trained density functional.",
    "pretrain": "Train a density functional on Kohn-Sham calculations, without minimizing it.",
    "finetune": "Fine-tune a pre-trained density functional on the densities at its minima.",
    "train": "Train a recipe.",
    "reproduce": "Reproduce a published table or figure.",
    "restore": "Restore a degraded picture with a decoder trained on similar ones.",
    "resume": "Continue an interrupted run.",
    "evaluate": "Measure a trained run again.",
    "report": "Compare finished runs: a table, learning curves, and a page with both.",
}
"""The commands, each with the line that the help shows."""


def parse(argv: list[str]) -> Command:
    """Return the command that the arguments name.

    Raises:
        UserError: for an unknown command or recipe, for arguments that do not parse, and for settings that make no
            sense.
        SystemExit: after help.
    """
    named = argv[0] if argv and not argv[0].startswith("-") else None
    if named is not None and named not in COMMANDS:
        raise UserError(f"there is no command '{named}'; the commands are {', '.join(COMMANDS)}; see --help")
    chosen: dict[str, str | None] = {"train": None, "reproduce": None}
    if named in chosen and len(argv) > 1 and not argv[1].startswith("-"):
        chosen[named] = argv[1]
        if named == "train":
            registry.entry(argv[1], registry.RECIPES)
        else:
            registry.entry(argv[1], registry.TABLES, "table")
    kinds: dict[str, Any] = {
        "list": List,
        "molecules": _of("density.command", "Molecules") if named == "molecules" else Deferred,
        "density": _of("density.apply", "Apply") if named == "density" else Deferred,
        "train": Train[_one_of(registry.RECIPES, chosen["train"])],  # type: ignore[misc]
        "reproduce": Reproduce[_one_of(registry.TABLES, chosen["reproduce"])],  # type: ignore[misc]
        "restore": _of("joint.restore", "Restore") if named == "restore" else Deferred,
        "resume": Resume,
        "evaluate": Evaluate,
        "report": ReportRuns,
    }
    choices = [
        _start(name) if named == name else Annotated[Deferred, _named(name, COMMANDS[name])]
        for name in ("demo", "pretrain", "finetune")
    ]
    # a command that is asked for shows its own docstring, in full
    choices += [
        Annotated[kind, _named(name, None if name == named else COMMANDS[name])] for name, kind in kinds.items()
    ]
    kind: Any = reduce(or_, choices)
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            parsed: Command = tyro.cli(
                kind,
                args=argv,
                prog="torchimplicit",
                description="Implicit layers for PyTorch: the demo and the recipes.",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_one_line(complaint.getvalue())) from None
    return parsed


def _one_line(box: str) -> str:
    """Turn tyro's error box into one line: without the frame, and with semicolons for rules."""
    inner = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    text = " ".join(";" if line and set(line) <= {"─", "-"} else line for line in inner)
    parts = [" ".join(part.split()).rstrip(".") for part in text.split(";")]
    line = "; ".join(part for part in parts if part and not part.startswith("Argument helptext"))
    line = line.replace("For full helptext, ", "for help, ")
    return line[:1].lower() + line[1:]


def _one_of(entries: dict[str, registry.Entry], chosen: str | None) -> Any:
    """A subcommand for each entry. Only the chosen one is imported."""
    choices = [
        _start(name) if name == chosen else Annotated[Deferred, _named(name, entry.summary)]
        for name, entry in entries.items()
    ]
    return reduce(or_, choices)


def _of(module: str, command: str) -> Any:
    """Import a command of a wing; called only if it is asked for."""
    return getattr(import_module(f"torchimplicit.recipes.{module}"), command)


def _start(name: str) -> Any:
    """The type of one recipe's subcommand."""
    settings = registry.settings(name)
    default = Start(settings, recipe=name)
    return Annotated[Start[type(settings)], _named(name, registry.entry(name).summary, default)]  # type: ignore[misc]


def _named(name: str, description: str | None, default: Any = tyro.MISSING_NONPROP) -> Any:
    return tyro.conf.subcommand(name, description=description, default=default)


def main(argv: list[str]) -> int:
    """Parse and run; errors are left to the caller."""
    console = Console(file=sys.stdout)
    try:
        command = parse(argv or ["--help"])
    except SystemExit as end:  # help has been shown
        return int(end.code or 0)
    with terminated_like_interrupted():
        return command.run(console)

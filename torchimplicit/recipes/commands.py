"""The commands: :func:`parse` turns arguments into a :class:`Command`, whose ``run`` does the work."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import textwrap
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import reduce
from importlib import import_module
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Protocol, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from torchimplicit.recipes import registry
from torchimplicit.recipes.runtime.errors import UserError, meant
from torchimplicit.recipes.runtime.execution import as_it_began, go, opened
from torchimplicit.recipes.runtime.launch import environment, spread
from torchimplicit.recipes.runtime.run import Exporter, Run, Runner, RunOptions, create

if TYPE_CHECKING:
    from torchimplicit.recipes.runtime.report import Finished

R = TypeVar("R")
W = TypeVar("W")


class Command(Protocol):
    """A parsed command."""

    def run(self, console: Console) -> int:
        """Run the command and return the exit code."""


@dataclass(frozen=True)
class List:
    """List the recipes and the tables, one line each."""

    json: bool = False
    """Print JSON instead: a list of objects with name, command and summary."""

    def run(self, console: Console) -> int:
        if self.json:
            named = (("train", registry.RECIPES), ("reproduce", registry.TABLES))
            lines = [
                {"name": name, "command": command, "summary": entry.summary}
                for command, entries in named
                for name, entry in entries.items()
            ]
            print(json.dumps(lines, indent=2, ensure_ascii=False))
            return 0
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

    settings: Annotated[R, tyro.conf.arg(name="")]
    where: Annotated[RunOptions, tyro.conf.arg(name="output")] = field(default_factory=RunOptions)
    recipe: tyro.conf.Suppress[str] = ""

    def run(self, console: Console) -> int:
        runner, settings = registry.runner(self.recipe), self.settings
        if environment() is not None:
            settings = spread(runner, settings)
            if self.where.output is None:
                raise UserError("--output is required under torchrun and srun: a job that starts anew resumes the run")
            if self.settings.machine.devices > 1:  # type: ignore[attr-defined]
                raise UserError("--devices: torchrun or srun has started the processes already; leave it out")
        runner.check(settings)
        run = create(self.recipe, self.where)
        return go(runner, settings, run, console, begins=self.recipe)


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
        settings = spread(runner, settings)
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
            raise UserError(f"--page {self.page} exists and is not a report; choose another file")
        runs = [_known(report.finished(path), console) for path in self.paths]
        console.print(report.comparison(runs).rich_rows(console.width))
        report.write(runs, self.page)
        console.print(f"Open in a browser: {self.page.resolve().as_uri()}", soft_wrap=True)
        return 0


def _known(run: Finished, console: Console) -> Finished:
    """``run``, said to be of an unknown recipe where this version has none of that name. It is compared all the same:
    its folder holds all that the report shows."""
    if run.recipe in registry.RECIPES:
        return run
    console.print(f"{run.name} is a run of '{run.recipe}', which is no recipe of this version", markup=False)
    return replace(run, recipe=f"{run.recipe} (unknown)")


COMMANDS = {
    "demo": "Compare gradient estimators on handwritten digits, with a page of results (under three minutes).",
    "list": "List the recipes and the tables.",
    "molecules": "Compute data files of molecules for density functionals.",
    "density": "Find molecules' densities, energies and forces with a trained density functional.",
    "pretrain": "Train a density functional on Kohn-Sham calculations, without minimizing it.",
    "finetune": "Fine-tune a pre-trained density functional on the densities at its minima.",
    "train": "Train a recipe.",
    "reproduce": "Reproduce a published table or figure.",
    "generate": "Continue a text with a trained language model.",
    "restore": "Restore a degraded picture with a decoder trained on similar ones.",
    "resume": "Continue an interrupted run.",
    "evaluate": "Measure a trained run again.",
    "report": "Compare finished runs: a table, learning curves, and a page with both.",
}
"""The commands, each with the line that the help shows."""

WHOLE_HELP = "--help-all"
"""Shows the help with every option explained; ``--help`` only names those that recipes share."""


def parse(argv: list[str]) -> Command:
    """Return the command that the arguments name.

    Raises:
        UserError: for an unknown command or recipe, for arguments that do not parse, and for settings that make no
            sense.
        SystemExit: after help.
    """
    named = argv[0] if argv and not argv[0].startswith("-") else None
    if named is not None and named not in COMMANDS:
        hint = meant(named, COMMANDS) or f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command '{named}'; {hint}")
    short = WHOLE_HELP not in argv and not {"-h", "--help"}.isdisjoint(argv)
    argv = ["--help" if argument == WHOLE_HELP else argument for argument in argv]
    chosen: dict[str, str | None] = {"train": None, "reproduce": None}
    if named in chosen and len(argv) == 1:
        kind_of = "recipe" if named == "train" else "table"
        raise UserError(f"{named} needs the name of a {kind_of}; 'torchimplicit list' shows all")
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
        "generate": _of("phantom.generate", "Generate") if named == "generate" else Deferred,
        "restore": _of("joint.restore", "Restore") if named == "restore" else Deferred,
        "resume": Resume,
        "evaluate": Evaluate,
        "report": ReportRuns,
    }
    # a command that is asked for shows its own docstring, in full
    choices = [
        _start(name)
        if name == named and name not in kinds
        else Annotated[kinds.get(name, Deferred), _named(name, None if name == named else about)]
        for name, about in COMMANDS.items()
    ]
    kind: Any = reduce(or_, choices)
    complaint, help_text = io.StringIO(), _Boxed()
    try:
        with redirect_stderr(complaint), redirect_stdout(help_text) if short else nullcontext():
            parsed: Command = tyro.cli(
                kind,
                args=argv,
                prog="torchimplicit",
                description="Implicit layers for PyTorch: the demo and the recipes. "
                "'torchimplicit COMMAND --help' explains a command.",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as end:
        if not end.code:
            if short:
                print(_shortened(help_text.getvalue(), "NAME" if named else "COMMAND"))
            raise
        place = ["torchimplicit", *filter(None, (named, chosen.get(named or "")))]
        raise UserError(_one_line(complaint.getvalue(), " ".join(place))) from None
    return parsed


class _Boxed(io.StringIO):
    """Takes tyro's help with its boxes, whatever the terminal."""

    encoding = "utf-8"


def _shortened(text: str, subcommand: str) -> str:
    """A command's help in which groups that recipes share are listed by the names of their options, and whose usage
    has ``subcommand`` in place of the names of all subcommands."""
    text = re.sub(r"\{[\w,-]{60,}\}", subcommand, text, count=1)
    kept: list[str] = []
    groups: dict[str, list[str]] = {}
    names: list[str] | None = None
    for line in text.rstrip().splitlines():
        if line.startswith("╭─ "):
            title = line[3:].split(" options")[0]
            names = None if title.rstrip("─╮ ") in ("options", "subcommands", "positional arguments") else []
            if names is not None:
                groups[title] = names
        if names is None:
            kept.append(line)
        else:
            names += re.findall(r"^│ (--[\w-]+)", line)
    if groups:
        width = max(map(len, groups)) + 4
        kept += ["", f"Further options, explained by {WHOLE_HELP}:"]
        for title, listed in groups.items():
            columns = shutil.get_terminal_size().columns - width
            lines = textwrap.wrap(" ".join(listed), max(columns, 30), break_on_hyphens=False)
            kept += [f"  {title if not number else '':{width - 2}}{line}" for number, line in enumerate(lines)]
    return "\n".join(kept)


def _one_line(box: str, place: str) -> str:
    """Turn tyro's error box into one line: without the frame, and with semicolons for rules. ``place`` is the command
    whose help explains the options."""
    inner = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    text = " ".join(";" if line and set(line) <= {"─", "-"} else line for line in inner)
    parts = [" ".join(part.split()).rstrip(".") for part in text.split(";")]
    line = "; ".join(part for part in parts if part and not part.startswith("Argument helptext"))
    line = re.sub("For full helptext, .*$", f"for help, run {place} --help", line)
    if unknown := re.search(r"Unrecognized options: (--?[\w-]+)(.*)", line, re.IGNORECASE):
        hint = meant(unknown[1], re.findall(r"--[\w-]+", unknown[2].partition("Perhaps you meant")[2]))
        return f"there is no option {unknown[1]}; {hint or f'for help, run {place} --help'}"
    if choice := re.search(r"invalid choice '(.*?)'.* Expected one of (\(.*?\))", line, re.IGNORECASE):
        hint = meant(choice[1], re.findall(r"'(.*?)'", choice[2]))
        line = line.replace("; for help", f"; {hint}; for help") if hint else line
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
    return command.run(console)

"""What the commands do. :mod:`torchimplicit.cli` parses them and calls :meth:`Command.run`."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from torchimplicit.recipes import registry
from torchimplicit.recipes.errors import UserError
from torchimplicit.recipes.plain import from_plain
from torchimplicit.recipes.recipe import Recipe
from torchimplicit.recipes.run import Run, RunOptions, create

INTERRUPTED = 130
"""The exit code of a process ended by Ctrl-C: 128 + SIGINT."""

R = TypeVar("R", bound=Recipe)
W = TypeVar("W")


class Command(Protocol):
    """A parsed command."""

    def run(self, console: Console) -> int:
        """Do it, and give the exit code."""


@dataclass(frozen=True)
class List:
    """List the recipes, a line each."""

    def run(self, console: Console) -> int:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
        for name, entry in registry.RECIPES.items():
            table.add_row(f"[bold]{name}", entry.summary)
        console.print(table)
        console.print("\nTrain one with 'torchimplicit train NAME'; its settings: 'torchimplicit train NAME --help'.")
        return 0


@dataclass(frozen=True)
class Start(Generic[R]):
    """Begin a run of a recipe."""

    settings: R
    where: RunOptions = field(default_factory=RunOptions)
    recipe: tyro.conf.Suppress[str] = ""

    def run(self, console: Console) -> int:
        self.settings.check()
        run = create(self.recipe, self.where)
        run.describe(self.recipe, self.settings)
        return go(self.settings, run, console)


@dataclass(frozen=True)
class Deferred:
    """A recipe that was not asked for, and so is not imported."""


@dataclass(frozen=True)
class Train(Generic[W]):
    """Train a recipe."""

    start: W

    def run(self, console: Console) -> int:
        assert isinstance(self.start, Start)
        return self.start.run(console)


@dataclass(frozen=True)
class Resume:
    """Go on with a run that was interrupted, from its last checkpoint and with its own settings."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The run's directory."""

    def run(self, console: Console) -> int:
        run, settings = opened(self.path)
        if run.read()["state"] == "complete":
            raise UserError(f"{run} is complete; to measure it again: torchimplicit evaluate {run}")
        settings.check()
        run.mark("running")
        return go(settings, run, console)


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run again, from its last checkpoint."""

    path: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The run's directory."""

    def run(self, console: Console) -> int:
        run, settings = opened(self.path)
        settings.check()
        settings.evaluate(run, console)
        console.print(f"Written to {run}/evaluation.json", highlight=False, soft_wrap=True)
        return 0


def go(settings: Recipe, run: Run, console: Console) -> int:
    """Train into ``run``, and say where the results are, whichever way it ends."""
    console.print(f"Writing to {run}", highlight=False, soft_wrap=True)
    finished = False
    try:
        finished = settings.train(run, console)
    except KeyboardInterrupt:
        pass
    finally:
        run.mark("complete" if finished else "interrupted")
    if not finished:
        console.print(
            f"Interrupted. What was done is in {run}; go on with: torchimplicit resume {run}",
            highlight=False,
            soft_wrap=True,
        )
        return INTERRUPTED
    written = [name for name in ("index.html", "results.json", "figures") if (run.path / name).exists()]
    console.print(f"Done: {', '.join(written)} in {run}", highlight=False, soft_wrap=True)
    if "index.html" in written:
        console.print(f"Open in a browser: {(run.path / 'index.html').resolve().as_uri()}", soft_wrap=True)
    return 0


def opened(path: Path) -> tuple[Run, Recipe]:
    """The run in a directory, and its settings.

    Raises:
        UserError: if there is none, or if its settings are not those of the recipe's present version.
    """
    run = Run(path)
    read = run.read()
    kind = type(registry.load(read["recipe"]))
    try:
        return run, from_plain(kind, read["config"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{run.description} does not fit recipe '{read['recipe']}' ({error}); train again") from None


COMMANDS = {
    "demo": "Compare gradient estimators on handwritten digits, and draw a page about it (under three minutes).",
    "list": "List the recipes.",
    "train": "Train a recipe.",
    "resume": "Go on with an interrupted run.",
    "evaluate": "Measure a trained run again.",
}
"""The commands, with a line each for the help."""


def parse(argv: list[str]) -> Command:
    """The command that the arguments name.

    Raises:
        UserError: for an unknown command or recipe, for arguments that do not parse, and for settings that make no
            sense.
        SystemExit: after help.
    """
    named = argv[0] if argv and not argv[0].startswith("-") else None
    if named is not None and named not in COMMANDS:
        raise UserError(f"there is no command '{named}'; the commands are {', '.join(COMMANDS)}; see --help")
    recipe = None
    if named == "train" and len(argv) > 1 and not argv[1].startswith("-"):
        recipe = argv[1]
        registry.entry(recipe)
    kinds: dict[str, Any] = {"list": List, "train": _train(recipe), "resume": Resume, "evaluate": Evaluate}
    choices = [_start("demo") if named == "demo" else Annotated[Deferred, _named("demo", COMMANDS["demo"])]]
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
    """What tyro says in a box, as one line: no frame, and rules become semicolons."""
    inner = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    text = " ".join(";" if line and set(line) == {"─"} else line for line in inner)
    parts = [" ".join(part.split()).rstrip(".") for part in text.split(";")]
    line = "; ".join(part for part in parts if part and not part.startswith("Argument helptext"))
    line = line.replace("For full helptext, ", "for help, ")
    return line[:1].lower() + line[1:]


def _train(recipe: str | None) -> Any:
    """The type of ``train``: one subcommand a recipe, of which only the chosen one is imported."""
    choices = [
        _start(name) if name == recipe else Annotated[Deferred, _named(name, entry.summary)]
        for name, entry in registry.RECIPES.items()
    ]
    return Train[reduce(or_, choices)]  # type: ignore[misc]


def _start(name: str) -> Any:
    """The type of one recipe's subcommand."""
    settings = registry.load(name)
    default = Start(settings, recipe=name)
    return Annotated[Start[type(settings)], _named(name, registry.entry(name).summary, default)]  # type: ignore[misc]


def _named(name: str, description: str | None, default: Any = tyro.MISSING) -> Any:
    return tyro.conf.subcommand(name, description=description, default=default)


def main(argv: list[str]) -> int:
    """Parse and run; errors are left to the caller."""
    console = Console(file=sys.stdout)
    try:
        command = parse(argv or ["--help"])
    except SystemExit as end:  # help has been shown
        return int(end.code or 0)
    return command.run(console)

"""A run, from its directory to its end: for the commands, and for the processes that a scheduler starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from torchimplicit.errors import SolveError
from torchimplicit.recipes import registry
from torchimplicit.recipes.errors import DivergedError, UserError
from torchimplicit.recipes.plain import from_plain
from torchimplicit.recipes.recipe import Runner
from torchimplicit.recipes.run import Run, State

INTERRUPTED = 130
"""The exit code of a process ended by Ctrl-C: 128 + SIGINT."""


def go(runner: Runner, settings: Any, run: Run, console: Console) -> int:
    """Train into ``run``, say where the results are, whichever way it ends, and give the exit code."""
    with run.claimed():
        return _go(runner, settings, run, console)


def _go(runner: Runner, settings: Any, run: Run, console: Console) -> int:
    state: State = "interrupted"
    try:
        run.mark("running")
        console.print(f"Writing to {run}", highlight=False, soft_wrap=True)
        state = "complete" if runner.train(settings, run, console) else "interrupted"
    except KeyboardInterrupt:
        pass
    except (DivergedError, SolveError):
        state = "diverged"
        raise
    finally:
        run.mark(state)
    if state != "complete":
        console.print(
            f"Interrupted. What was done is in {run}; go on with: torchimplicit resume {run}",
            highlight=False,
            soft_wrap=True,
        )
        return INTERRUPTED
    written = [name for name in (*PAGES, *run.products()) if (run.path / name).exists()]
    console.print(f"Done: {', '.join(written)} in {run}", highlight=False, soft_wrap=True)
    if "index.html" in written:
        console.print(f"Open in a browser: {(run.path / 'index.html').resolve().as_uri()}", soft_wrap=True)
    return 0


PAGES = ("index.html", "results.json", "record.json", "figures")
"""What a run may leave for people to look at, beside its products."""


def opened(path: Path) -> tuple[Run, Runner, Any]:
    """The run in a directory, what runs it, and its settings.

    Raises:
        UserError: if there is none, or if its settings are not those of the recipe's present version.
    """
    run = Run(path)
    read = run.read()
    kind = type(registry.settings(read["recipe"]))
    try:
        return run, registry.runner(read["recipe"]), from_plain(kind, read["config"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{run.description} does not fit recipe '{read['recipe']}' ({error}); train again") from None

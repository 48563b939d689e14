"""A run, from its directory to its end: for the commands, and for the processes that a scheduler starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from torchimplicit.errors import SolveError
from torchimplicit.recipes import defaults, registry
from torchimplicit.recipes.environment import version
from torchimplicit.recipes.errors import DivergedError, StorageError, UserError
from torchimplicit.recipes.files import FULL, say_once
from torchimplicit.recipes.plain import from_plain, missing, to_plain
from torchimplicit.recipes.recipe import Runner
from torchimplicit.recipes.run import Run, State
from torchimplicit.recipes.stopping import stopped_by

INTERRUPTED = 130
"""The exit code of a process ended by Ctrl-C: 128 + SIGINT."""


def go(runner: Runner, settings: Any, run: Run, console: Console, begins: str | None = None) -> int:
    """Train into ``run``, say where the results are, whichever way it ends, and give the exit code.

    Args:
        runner, settings, run, console: see :class:`~.recipe.Runner`.
        begins: the recipe of a run that begins; ``None``: the run has its ``run.json``.
    """
    with run.claimed():
        if begins is not None:
            run.describe(begins, settings)
        with as_it_began(run):
            return _go(runner, settings, run, console)


def _go(runner: Runner, settings: Any, run: Run, console: Console) -> int:
    state: State = "interrupted"
    reason = ""
    try:
        if run.read()["state"] == "complete":  # by another process, since this one had looked
            state = "complete"
            raise UserError(_complete(run))
        run.mark("running")
        console.print(f"Writing to {run}", highlight=False, soft_wrap=True)
        state = "complete" if runner.train(settings, run, console) else "interrupted"
        reason = stopped_by() or ("some of its runs are not done" if (run.path / "runs").is_dir() else "Ctrl-C")
    except KeyboardInterrupt:
        reason = stopped_by() or "Ctrl-C"
    except (DivergedError, SolveError) as error:
        state, reason = "diverged", _line(error)
        raise
    except OSError as error:
        reason = f"the disk is full ({error.strerror})" if error.errno in FULL else _line(error)
        if error.errno not in FULL:
            raise
        raise StorageError(error.errno, f"{reason}; make room, and go on with: torchimplicit resume {run}") from None
    except BaseException as error:
        reason = _line(error)
        raise
    finally:
        run.mark(state, "" if state == "complete" else reason)
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


def opened(path: Path, again: bool = True) -> tuple[Run, Runner, Any]:
    """The run in a directory, what runs it, and its settings: those that it was written with, whatever is the default
    by now. What another version wrote is told.

    Args:
        path: the run's directory.
        again: whether a run that is complete may be opened.

    Raises:
        UserError: if there is none, or if its settings are not those of the recipe's present version.
    """
    run = Run(path)
    read = run.read()
    kind = type(registry.settings(read["recipe"]))
    try:
        settings = from_plain(kind, read["config"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{run.description} does not fit recipe '{read['recipe']}' ({error}); train again") from None
    if not again and read["state"] == "complete":
        raise UserError(_complete(run))
    _tell(run, read, settings)
    with as_it_began(run):
        return run, registry.runner(read["recipe"]), settings


@contextmanager
def as_it_began(run: Run) -> Iterator[None]:
    """Within it the library's own defaults are those that the run noted when it began."""
    with defaults.of_run(run.read().get("defaults", {})):
        yield


def _tell(run: Run, read: dict[str, Any], settings: Any) -> None:
    """What a person should know of a run that another version wrote."""
    wrote, ours = read.get("torchimplicit_version"), version()
    if wrote is None:
        say_once(
            f"{run} was written by an earlier version, which noted neither its number, nor checksums, nor the "
            "library's own defaults: its settings are taken as they are, and the rest is this version's"
        )
    elif wrote != ours:
        say_once(
            f"{run} was written by torchimplicit {wrote}, and this is {ours}: the run's settings and defaults are "
            "kept, and what the program makes of them may differ"
        )
    new = missing(read["config"], to_plain(settings, exact=True))
    if new:
        say_once(f"{run} names no {', '.join(new)}, which were no settings then: this version's defaults are taken")


def _complete(run: Run) -> str:
    return f"{run} is complete; to measure it again: torchimplicit evaluate {run}"


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

"""Executes a run in its directory and records how it ends, for commands and for scheduled processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from torchimplicit.errors import SolveError
from torchimplicit.recipes import registry
from torchimplicit.recipes.runtime import run as defaults
from torchimplicit.recipes.runtime.errors import DivergedError, StorageError, UserError
from torchimplicit.recipes.runtime.files import FULL, say_once
from torchimplicit.recipes.runtime.launch import spread
from torchimplicit.recipes.runtime.run import Distributed, Run, Runner, State, version
from torchimplicit.recipes.runtime.settings import from_plain, missing, to_plain

# -- A run, from its directory to its end: for the commands, and for the processes that a scheduler starts -------------


INTERRUPTED = 130
"""The exit code of a process ended by Ctrl-C: 128 + SIGINT."""


def go(runner: Runner, settings: Any, run: Run, console: Console, begins: str | None = None) -> int:
    """Train into ``run``, report where the results are however it ends, and return the exit code.

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
        raise StorageError(error.errno, f"{reason}; make room, and continue with: torchimplicit resume {run}") from None
    except BaseException as error:
        reason = _line(error)
        raise
    finally:
        run.mark(state, "" if state == "complete" else reason)
    if state != "complete":
        console.print(
            f"Interrupted. Results so far are in {run}; continue with: torchimplicit resume {run}",
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
"""Pages that a run may have, in addition to its products."""


def opened(path: Path, again: bool = True) -> tuple[Run, Runner, Any]:
    """The run in a directory, its runner, and the settings with which it was written, independent of today's defaults.
    Differences to another version are reported.

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


def follow(path: Path) -> None:
    """Take part in training the run in a directory; see :func:`~.launch.together`."""
    run, runner, settings = opened(path)
    assert isinstance(runner, Distributed)
    with as_it_began(run):
        runner.follow(spread(runner, settings), run)


@contextmanager
def as_it_began(run: Run) -> Iterator[None]:
    """Use the library's defaults that the run recorded when it began."""
    with defaults.of_run(run.read().get("defaults", {})):
        yield


def _tell(run: Run, read: dict[str, Any], settings: Any) -> None:
    """Report differences to a run that another version wrote."""
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


# -- What ends a process early: Ctrl-C, and what a scheduler, ``kill`` or a closed terminal sends in its place ---------


_NAMES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP: the terminal was closed"}

_last = ""


def stopped_by() -> str:
    """The signal that told this process to stop, as text; empty if there was none."""
    return _last


def note_signal(number: int) -> None:
    """Record the signal for :func:`stopped_by`."""
    global _last
    name = signal.Signals(number).name
    _last = _NAMES.get(name, name)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP like Ctrl-C at a terminal, including for child processes.

    Slurm, Docker and ``kill`` send SIGTERM, and a terminal that is closed SIGHUP, at which Python by itself would end
    without saving anything. Where SIGHUP is ignored, as below ``nohup``, it stays so.
    """
    global _last
    _last = ""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        taken.append(signal.SIGHUP)
    before = [(number, signal.signal(number, _interrupt)) for number in taken]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    note_signal(number)
    if signal.Signals(number).name == "SIGHUP":
        _leave_terminal()
    for process in multiprocessing.active_children():
        if process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(number, frame)
    else:  # a shell's background job, to which Ctrl-C is not to get through
        raise KeyboardInterrupt


def _leave_terminal() -> None:
    """Detach from a terminal that is gone, where writing would fail while results are still being saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):  # it has been one
                os.dup2(nowhere, stream)
    os.close(nowhere)

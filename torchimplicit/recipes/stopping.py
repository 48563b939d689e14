"""What ends a process early: Ctrl-C, and what a scheduler, ``kill`` or a closed terminal sends in its place."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_NAMES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP: the terminal was closed"}

_last = ""


def stopped_by() -> str:
    """Which signal has told this process to stop, in words; nothing if none has."""
    return _last


def note_signal(number: int) -> None:
    """For :func:`stopped_by`."""
    global _last
    name = signal.Signals(number).name
    _last = _NAMES.get(name, name)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP do what Ctrl-C does at a terminal, where the signal reaches the processes of this
    one, too.

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
    """Writing to a terminal that is gone is an error, amid what is still to be saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):  # it has been one
                os.dup2(nowhere, stream)
    os.close(nowhere)

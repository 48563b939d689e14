"""What ends a process early: Ctrl-C, and what a scheduler, a service or ``kill`` sends in its place."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Within it SIGTERM does what Ctrl-C does at a terminal, where the signal reaches the processes of this one, too.

    Slurm, Docker and ``kill`` send SIGTERM, at which Python by itself would end without saving anything.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    for process in multiprocessing.active_children():
        if process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(number, frame)
    else:  # a shell's background job, to which Ctrl-C is not to get through
        raise KeyboardInterrupt

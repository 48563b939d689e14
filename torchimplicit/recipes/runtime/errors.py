"""Errors that the person at the command line can fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """One line that says what is wrong, why, and what to do. The command line prints it and exits with 2."""


class DamagedFileError(UserError):
    """A file is not what was written: truncated, damaged or changed."""


class StorageError(OSError):
    """A file cannot be written, for example because the disk is full. The command line prints it and exits with 1."""

    def __str__(self) -> str:
        """The message alone, without the error number."""
        return str(self.strerror)


class DivergedError(Exception):
    """Training produced non-finite numbers. The command line prints it and exits with 1."""


def meant(name: str, known: Iterable[str]) -> str:
    """``did you mean '...'?`` with the known name closest to ``name``; empty if none is close."""
    close = get_close_matches(name, list(known), n=1)
    return f"did you mean '{close[0]}'?" if close else ""

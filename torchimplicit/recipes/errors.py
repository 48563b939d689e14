"""What goes wrong for reasons that the person at the command line can mend."""

from __future__ import annotations


class UserError(Exception):
    """One line that says what is wrong, why, and what to do. The command line prints it and exits with 2."""


class DivergedError(Exception):
    """Training came upon numbers that are not finite. The command line prints it and exits with 1."""

"""Kinds that are known to come out wrong, each with the reason. An entry goes when its kind is mended."""

from __future__ import annotations

from collections.abc import Callable

from tests.truth.case import Case

KNOWN: tuple[tuple[str, str, Callable[[Case], bool]], ...] = ()
"""Why, words that the verdict has, and the cases."""


def known(case: Case, verdict: str = "") -> str:
    """Why the case may come out wrong in these words; nothing where it must not. Without words: why it may at all."""
    return "; ".join(reason for reason, words, applies in KNOWN if applies(case) and (not verdict or words in verdict))

"""Kinds that are known to come out wrong, each with the reason. An entry goes when its kind is mended."""

from __future__ import annotations

from collections.abc import Callable

from tests.truth.case import Case

KNOWN: tuple[tuple[str, Callable[[Case], bool]], ...] = ()


def known(case: Case) -> str:
    """Why the case may come out wrong; nothing where it must not."""
    return "; ".join(reason for reason, applies in KNOWN if applies(case))

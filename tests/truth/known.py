"""Kinds that are known to come out wrong, each with the reason. An entry goes when its kind is mended."""

from __future__ import annotations

from collections.abc import Callable

from tests.truth.case import Case

KNOWN: tuple[tuple[str, Callable[[Case], bool]], ...] = (
    (
        "samples that see each other: a sample that has stopped is not judged again, and steps are taken row by row",
        lambda case: bool(case.coupling) and case.batched,
    ),
    (
        "tolerances depend on the unit of the residual or the energy, and leaves are judged by one norm",
        lambda case: case.of in ("residual", "energy", "leaf") or (case.kind != "fixed_point" and case.of == "state"),
    ),
    (
        "the residual of a root or a minimum is judged by the first one alone",
        lambda case: case.kind in ("root", "minimum") and case.start in ("far", "random"),
    ),
    (
        "a nested solve under forward mode, or under two transforms",
        lambda case: case.style == "nested" and case.mode in ("double", "jvp", "dual", "jacfwd", "hessian"),
    ),
    (
        "functional_call over a layer whose map is a closure or a method",
        lambda case: case.style in ("functional-call", "functional-method"),
    ),
)


def known(case: Case) -> str:
    """Why the case may come out wrong; nothing where it must not."""
    return "; ".join(reason for reason, applies in KNOWN if applies(case))

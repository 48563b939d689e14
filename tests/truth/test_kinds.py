"""Kinds of use, each in many variants: here only the right answer will do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.truth.case import COUPLINGS, LINEAR, MODES, OPEN_STYLES, STYLES, TREES, UNITS, Case
from tests.truth.data import Data
from tests.truth.judge import Outcome, judged
from tests.truth.known import known
from tests.truth.reference import Reference
from tests.truth.statement import Statement

pytestmark = pytest.mark.usefixtures("one_thread")


def cases(kind: str) -> list[object]:
    """The variants, told apart by what differs from the plainest case."""
    return [pytest.param(case, id=str(case)[5:-1].replace("number=", "")) for case in _KINDS[kind]()]


def coupled() -> Iterator[Case]:
    """Samples that see each other."""
    plain = Case(number=1, batch=5, dim=3, inputs=2)
    for number, coupling in enumerate(COUPLINGS):
        case = replace(plain, number=10 + number, coupling=coupling)
        for linear in LINEAR["fixed_point"]:
            yield replace(case, linear=linear)
        yield replace(case, batched=False)
        yield replace(case, dtype="float32")
        yield replace(case, tolerance=1e-12)
        for mode in ("double", "jvp", "hessian", "vmap-grad", "jacrev"):
            yield replace(case, mode=mode)
        for solver in ("plain", "broyden", "newton"):
            yield replace(case, solver=solver)
        yield replace(case, estimator="shared-inverse", solver="broyden")
        yield replace(case, estimator="neumann-phantom")
        yield replace(case, estimator="adaptive-phantom")
        root = replace(case, kind="root")
        for linear in LINEAR["root"]:
            yield replace(root, linear=linear)
        yield replace(root, solver="newton-bicgstab", mode="jvp")
        if coupling in COUPLINGS[:5]:
            minimum = replace(case, kind="minimum")
            for linear in LINEAR["minimum"]:
                yield replace(minimum, linear=linear)
            yield replace(minimum, solver="newton")
            yield replace(minimum, solver="newton-dense", mode="double")
            yield replace(minimum, constraint="shared")
            yield replace(minimum, constraint="own", eliminate=True, mode="jvp")


def units() -> Iterator[Case]:
    """The state, the residual or the energy in other units."""
    plain = Case(number=2, dim=3, inputs=2)
    for unit in UNITS:
        for dtype in ("float32", "float64"):
            case = replace(plain, unit=unit, dtype=dtype)
            yield replace(case, of="state")
            yield replace(case, of="leaf", tree="tuple")
            yield replace(case, of="state", solver="broyden")
            for of in ("state", "residual"):
                yield replace(case, kind="root", of=of)
                yield replace(case, kind="root", of=of, solver="broyden")
            for of in ("state", "energy"):
                yield replace(case, kind="minimum", of=of)
                yield replace(case, kind="minimum", of=of, solver="newton")
                yield replace(case, kind="minimum", of=of, constraint="shared")
                yield replace(case, kind="joint", of=of, gain=0.3)


def cotangents() -> Iterator[Case]:
    """Incoming gradients of every size."""
    for size in (1e-30, 1e-23, 1e-15, 1e10, 1e20):
        for kind in ("fixed_point", "root", "minimum"):
            case = Case(number=3, kind=kind, dtype="float32", cotangent=size)
            for linear in LINEAR[kind]:
                yield replace(case, linear=linear)
        for estimator in ("one-step", "neumann-phantom", "adaptive-phantom", "unbiased-neumann", "unrolled-phantom"):
            yield Case(number=3, dtype="float32", cotangent=size, estimator=estimator)
        yield Case(number=3, dtype="float32", cotangent=size, estimator="shared-inverse", solver="broyden")
        yield Case(number=3, dtype="float32", cotangent=size, batched=False)
        yield Case(number=3, dtype="float32", cotangent=size, kind="joint", dim=2)


def captured() -> Iterator[Case]:
    """Every style in every mode."""
    for style in STYLES:
        for mode in MODES:
            yield Case(number=4, style=style, mode=mode)
        for kind in ("root", "minimum", "joint"):
            if not (kind == "joint" and style == "nested"):
                yield Case(number=4, kind=kind, dim=3, style=style, gain=0.3)
        if style in OPEN_STYLES:
            yield Case(number=4, batch=6, style=style, rowwise=True)


def structured() -> Iterator[Case]:
    """Every structure of the state."""
    for tree in TREES:
        for kind in ("fixed_point", "root", "minimum", "joint"):
            case = Case(number=5, kind=kind, tree=tree, gain=0.3)
            yield case
            yield replace(case, batched=False)
            yield replace(case, batch=6, rowwise=True, noncontiguous=True)
        for constraint in ("shared", "own"):
            for metric in (False, True):
                for eliminate in (False, True):
                    minimum = Case(number=5, kind="minimum", tree=tree, constraint=constraint)
                    yield replace(minimum, metric=metric, eliminate=eliminate)
                    yield replace(minimum, metric=metric, eliminate=eliminate, batched=False)
        yield Case(number=5, kind="joint", tree=tree, constraint="box")
        yield Case(number=5, kind="joint", tree=tree, constraint="ball")


_KINDS = {
    "coupled": coupled,
    "units": units,
    "cotangents": cotangents,
    "captured": captured,
    "structured": structured,
}


def right(case: Case) -> None:
    """Or a kind that is known to be wrong."""
    verdict = judged(case)
    if verdict.outcome is not Outcome.RIGHT and (reason := known(case, verdict.why)):
        pytest.xfail(f"{reason}: {verdict.why}")
    assert verdict.outcome is Outcome.RIGHT, f"{verdict.outcome.value}: {verdict.why}\n{case}"


@pytest.mark.parametrize("case", cases("coupled"))
def test_samples_that_see_each_other(case):
    right(case)


@pytest.mark.parametrize("case", cases("units"))
def test_units(case):
    right(case)


@pytest.mark.parametrize("case", cases("units"))
def test_steps_do_not_depend_on_the_units(case):
    plain = replace(case, unit=1.0)
    taken = []
    for each in (plain, case):
        data = Data(each)
        statement = Statement(each, data)
        with torch.no_grad():
            statement.solve({name: t.to(statement.dtype) for name, t in data.tensors.items()})
        assert statement.solution is not None
        taken.append(statement.solution.steps)
    if not torch.equal(*taken) and (reason := known(case, "steps")):
        pytest.xfail(reason)
    assert (taken[0] - taken[1]).abs().max() <= 1, taken  # a decimal unit rounds


@pytest.mark.parametrize("case", cases("cotangents"))
def test_cotangents_of_every_size(case):
    right(case)


@pytest.mark.parametrize("case", cases("captured"))
def test_captures(case):
    right(case)


@pytest.mark.parametrize("case", cases("structured"))
def test_structures(case):
    right(case)


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        ("fixed_point", "anderson"),
        ("fixed_point", "broyden"),
        ("fixed_point", "newton"),
        ("root", "newton"),
        ("root", "broyden"),
        ("minimum", "lbfgs"),
        ("minimum", "newton"),
        ("joint", "anderson"),
    ],
)
def test_a_start_at_the_solution(kind, solver, number):
    case = Case(number=number, kind=kind, dim=3, solver=solver if solver != "newton" else "newton", start="solution")
    if kind == "root" and solver == "newton":
        case = replace(case, solver="default")
    data = Data(case)
    statement, reference = Statement(case, data), Reference(case, data)
    assert reference.find(torch.zeros_like(data.start), data.tensors)
    statement.start = reference.state
    with torch.no_grad():
        statement.solve(data.tensors)
    assert statement.solution is not None
    assert statement.solution.converged.all(), statement.solution.summary()
    assert int(statement.solution.steps.max()) == 0
    right(case)


def test_a_series_of_leaves_of_unlike_sizes():
    """Where one sample had such leaves, the truncated series of all was that of other units."""
    case = Case(number=92000883, kind="minimum", batch=17, dim=2, inputs=7, matrix="symmetric", tree="columns")
    right(replace(case, style="nested", tolerance=1e-12, estimator="neumann-phantom"))

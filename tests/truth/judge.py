"""What came out of a case: right, said, or wrong."""

from __future__ import annotations

import traceback
import warnings
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

import torchimplicit as ti
from tests.truth import modes, rule
from tests.truth.case import Case
from tests.truth.cores import Tensors
from tests.truth.data import Data, strided
from tests.truth.reference import Reference
from tests.truth.statement import Statement

SAID = (ti.ConvergenceWarning, ti.SmoothnessWarning)


class Outcome(Enum):
    RIGHT = "right"
    SAID = "said"
    WRONG = "wrong"
    UNJUDGED = "unjudged"
    """The reference has no solution, or the condition is such that any answer is within the bound."""


@dataclass(frozen=True)
class Verdict:
    """The outcome, why, and the largest error beside its bound."""

    outcome: Outcome
    why: str = ""


def judged(case: Case) -> Verdict:
    """Solve, differentiate and compare; of a dependable case, an error or a warning is wrong as well."""
    verdict = _judged(case)
    if verdict.outcome is Outcome.SAID and case.dependable:
        return Verdict(Outcome.WRONG, f"nothing is hard about the case, and it said: {verdict.why}")
    return verdict


def _judged(case: Case) -> Verdict:
    data = Data(case)
    tensors = {
        name: t.to(torch.float32 if case.dtype == "float32" else torch.float64) for name, t in data.tensors.items()
    }
    if case.noncontiguous:
        tensors |= {name: strided(tensors[name]) for name in ("x", "W")}
    statement, reference = Statement(case, data), Reference(case, data)
    if case.start in ("solution", "near"):
        if not reference.find(torch.zeros_like(data.start), data.tensors):
            return Verdict(Outcome.UNJUDGED, "no solution to start at")
        statement.start = reference.state + (1e-3 * data.cotangent if case.start == "near" else 0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            with torch.no_grad():
                value = statement.solve(tensors)
            plain = statement.solution
            derivatives = modes.differentiated(case.mode, statement.solve, tensors, data)
        except (ti.SolveError, ti.UnsupportedDerivativeError) as error:
            return Verdict(Outcome.SAID, str(error))
        except Exception as error:
            return _explained(error)
    assert plain is not None
    messages = [str(w.message) for w in told if issubclass(w.category, SAID)]
    if messages:
        return Verdict(Outcome.SAID, messages[0])
    if not bool(plain.converged.all()):
        return Verdict(Outcome.WRONG, f"no warning, and {plain.summary()}")
    return _compared(case, data, statement, reference, plain, value, derivatives)


def _compared(
    case: Case,
    data: Data,
    statement: Statement,
    reference: Reference,
    plain: ti.Solution,
    value: Tensor,
    derivatives: list[Tensor],
) -> Verdict:
    broken = rule.broken(case, data, value)
    if broken:
        return Verdict(Outcome.WRONG, f"CONVERGED, and {broken}")
    if not reference.find(value, data.tensors):
        return Verdict(Outcome.UNJUDGED, "no solution near the one found")
    eps = torch.finfo(value.dtype).eps
    condition = reference.condition
    bound = 200 * condition * (statement.forward_tolerance + 10 * eps)
    size = float(reference.state.norm())
    error = float((value.double() - reference.state).norm()) / max(size, 1e-3)
    if case.estimator != "unrolled-phantom" and not error <= bound:
        return Verdict(Outcome.WRONG, f"value off by {error:.1e}, bound {bound:.1e}")
    solution = statement.solution
    assert solution is not None
    if case.estimator in ("adaptive-phantom", "shared-inverse"):
        return _claims(case, data, reference, solution, derivatives, bound)
    expected = modes.differentiated(case.mode, reference.estimate(solution), data.tensors, data)
    bound *= 3 * condition if case.order == 2 else 1
    if bound > 0.3:
        return Verdict(Outcome.UNJUDGED, f"condition {condition:.1e}")
    worst = max(map(_error, derivatives, expected, [_largest(expected)] * len(expected)))
    if not worst <= bound:
        if case.mode.startswith("vmap") and _led_apart(data, statement, reference.estimate(solution), value.dtype):
            return Verdict(Outcome.UNJUDGED, "a copy that is a little different has another solution near its way")
        return Verdict(Outcome.WRONG, f"{case.mode} off by {worst:.1e}, bound {bound:.1e}")
    if broken := _adjoint(case, reference, solution, derivatives):
        return Verdict(Outcome.WRONG, broken)
    return Verdict(Outcome.RIGHT, f"value {error:.1e}, {case.mode} {worst:.1e}, bound {bound:.1e}")


def _led_apart(data: Data, statement: Statement, estimate: modes.Solve, dtype: torch.dtype) -> bool:
    """Whether a copy, solved by itself, comes to another solution than the one that the reference follows from the
    first: then each has a derivative of its own, and there is none to compare with."""
    own = modes.of_shared(statement.solve, {name: t.to(dtype) for name, t in data.tensors.items()})
    followed = modes.of_shared(estimate, data.tensors)
    with torch.no_grad():
        pairs = [(own(copy.to(dtype)).double(), followed(copy)) for copy in modes.several(data.tensors, data)]
    return any(float((a - b).norm()) > 0.03 * float(b.norm()) for a, b in pairs)


def _largest(tensors: list[Tensor]) -> float:
    return max(float(t.norm()) for t in tensors)


def _error(got: Tensor, expected: Tensor, largest: float) -> float:
    """Relative to the tensor itself, or to a hundredth of the largest one."""
    return float((got - expected).norm()) / max(float(expected.norm()), 0.01 * largest, 1e-300)


def _adjoint(case: Case, reference: Reference, solution: ti.Solution, derivatives: list[Tensor]) -> str:
    """What is false in the claims about the adjoint solve, by a product of the whole operator."""
    plain = case.kind in ("fixed_point", "root") and case.estimator == "implicit" and case.mode == "backward"
    if not plain or solution.adjoint is None:
        return ""
    # the probe p enters the residual as -p, so its gradient is the adjoint itself
    g = derivatives[_probe(case)].flatten()
    u = reference.matrix.mT @ g
    cotangent = (reference.data.cotangent + reference.state).flatten()
    off = float((u - cotangent).norm() / cotangent.norm())
    eps = torch.finfo(torch.float32 if case.dtype == "float32" else torch.float64).eps
    rtol = eps ** (2 / 3) if case.tolerance is None else case.tolerance
    claimed = max(float(solution.adjoint.residual.max()), rtol)
    # the matrix at the library's point is not quite that at the solution
    allowed = 10 * claimed + 100 * reference.condition * (rtol + 10 * eps)
    if off > allowed:
        return f"the adjoint's residual is {off:.1e}, and {solution.adjoint.summary()} was reported"
    return ""


def _claims(
    case: Case, data: Data, reference: Reference, solution: ti.Solution, derivatives: list[Tensor], bound: float
) -> Verdict:
    """Of estimators whose matrix is their own: the residual that they report, and the pullback of their vector."""
    report = solution.adjoint
    if report is None:
        return Verdict(Outcome.WRONG, "no report of the backward pass")
    g = derivatives[_probe(case)].flatten()
    cotangent = (data.cotangent + reference.state).flatten()
    units = Statement(case, data).units().double()  # a residual is told in those of the state's leaves
    off = (reference.matrix.mT @ g - cotangent).reshape(case.batch, -1) / units
    cotangent = cotangent.reshape(case.batch, -1) / units
    rows = off if case.batched else off.reshape(1, -1)
    true = rows.norm(dim=1) / cotangent.reshape(rows.shape).norm(dim=1)
    whole = (off.norm() / cotangent.norm()).expand_as(true)  # of samples that see each other
    reported = report.residual.double().flatten()
    if not any(torch.allclose(each, reported, rtol=1e-3, atol=bound) for each in (true, whole)):
        return Verdict(Outcome.WRONG, f"residuals {true.tolist()}, reported {reported.tolist()}")
    names = list(data.tensors)
    leaves = modes.leaves_of(data.tensors)
    moved = reference.residual(reference.v, leaves)
    expected = torch.autograd.grad(-(g * moved).sum(), list(leaves.values()), allow_unused=True)
    expected = [torch.zeros_like(t) if e is None else e for e, t in zip(expected, leaves.values(), strict=True)]
    worst = max(map(_error, derivatives, expected, [_largest(expected)] * len(names)))
    if not worst <= bound:
        return Verdict(Outcome.WRONG, f"the gradients differ by {worst:.1e} from the pullback, bound {bound:.1e}")
    return Verdict(Outcome.RIGHT, f"residual {float(true.max()):.1e}, pullback {worst:.1e}")


def _probe(case: Case) -> int:
    return list(Data(case).tensors).index("p")


def _explained(error: Exception) -> Verdict:
    """An error counts as said where the library raised it, and on purpose."""
    frames = traceback.extract_tb(error.__traceback__)
    own = "torchimplicit" in frames[-1].filename and (frames[-1].line or "").lstrip().startswith(("raise", ")"))
    words = f"{type(error).__name__}: {str(error)[:300]} ({frames[-1].filename}:{frames[-1].lineno})"
    if own and isinstance(error, (ValueError, TypeError, NotImplementedError, RuntimeError)):
        return Verdict(Outcome.SAID, words)
    return Verdict(Outcome.WRONG, words)


def tensors_of(case: Case) -> Tensors:
    """What the library is given, for looking into a case by hand."""
    return Data(case).tensors

"""What is tried, in words: one random case."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

SOLVERS = {
    "fixed_point": ("default", "plain", "anderson", "broyden", "newton"),
    "root": ("default", "plain", "anderson", "broyden", "newton-dense", "newton-bicgstab"),
    "minimum": ("default", "lbfgs", "descent", "newton", "newton-dense", "newton-cg", "broyden", "anderson"),
    "joint": ("default", "plain", "broyden", "newton"),
}
LINEAR = {
    "fixed_point": ("default", "dense", "gmres", "bicgstab", "lsmr", "neumann"),
    "root": ("default", "dense", "gmres", "bicgstab", "lsmr"),
    "minimum": ("default", "dense", "minres", "cg", "gmres", "lsmr"),
    "joint": ("default", "dense", "gmres", "bicgstab"),
}
MODES = (
    "backward",
    "double",
    "func-grad",
    "jvp",
    "dual",
    "vmap",
    "vmap-grad",
    "jacrev",
    "jacfwd",
    "hessian",
)
REVERSE = ("backward", "func-grad")
COUPLINGS = ("mean", "graph", "pair", "one-way", "weak", "attention", "batch-norm")
STYLES = (
    "arguments",
    "one-dict",
    "closure",
    "derived",
    "mixed",
    "partial",
    "method",
    "callable",
    "module",
    "functional-call",
    "functional-method",
    "nested",
)
OPEN_STYLES = ("arguments", "mixed", "method", "callable", "module")
"""Those in which all that carries the batch is an argument, as ``rowwise=True`` asks for."""
TREES = ("flat", "folded", "tuple", "dict", "nested", "columns")
ESTIMATORS = (
    "one-step",
    "neumann-phantom",
    "unrolled-phantom",
    "adaptive-phantom",
    "unbiased-neumann",
    "shared-inverse",
    "damped-implicit",
)
UNITS = (1e-12, 1e-8, 1e-4, 1e4, 1e8, 1e12)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem, how it is written down, how it is solved, how it is differentiated.

    Attributes:
        number: what the tensors are drawn from.
        kind: fixed_point, root, minimum or joint.
        batch, dim, inputs: of the state ``[batch, dim]`` and of x ``[batch, inputs]``.
        gain: about the norm of the map's Jacobian, without the coupling.
        coupling: how the samples see each other; ``""``: not at all.
        x_batched: whether x has a row for each sample, or is shared.
        tree, style: the state's structure, and how the function comes by its tensors.
        constraint: of a minimum ``"shared"`` or ``"own"`` (a weight for each sample); of a joint problem ``"box"`` or
            ``"ball"``.
        unit, of: the size of the unit in which the state, one of its leaves, the residual or the energy is given.
        start: zero, random, far, solution (the exact one) or near it.
        tolerance: relative, forward and adjoint; ``None``: the defaults.
        cotangent: its size.
        noncontiguous: whether x, W and the start are strided views.
    """

    number: int
    kind: str = "fixed_point"
    dtype: str = "float64"
    batch: int = 3
    dim: int = 4
    inputs: int = 3
    activation: str = "tanh"
    matrix: str = "orthogonal"
    gain: float = 0.5
    coupling: str = ""
    x_batched: bool = True
    tree: str = "flat"
    style: str = "arguments"
    batched: bool = True
    rowwise: bool = False
    constraint: str = ""
    eliminate: bool = False
    metric: bool = False
    unit: float = 1.0
    of: str = ""
    start: str = "zero"
    solver: str = "default"
    linear: str = "default"
    tolerance: float | None = None
    estimator: str = "implicit"
    mode: str = "backward"
    cotangent: float = 1.0
    noncontiguous: bool = False

    def __str__(self) -> str:
        """What differs from the plainest case."""
        plain = Case(number=self.number)
        said = [f"{name}={value!r}" for name, value in vars(self).items() if value != getattr(plain, name)]
        return f"Case(number={self.number}{''.join(', ' + each for each in said)})"

    @property
    def order(self) -> int:
        """Of the derivative that is asked for."""
        return 2 if self.mode in ("double", "hessian") else 1

    @property
    def dependable(self) -> bool:
        """Whether to say that it did not go well is not good enough: nothing about the case is hard."""
        return (
            self.kind in ("fixed_point", "minimum")
            and self.solver in ("default", "plain", "anderson", "lbfgs")
            and self.gain <= 0.7
            # an unbounded map that the coupling makes expand (0.7 + 0.4) may have no fixed point
            and not (self.coupling and self.gain > 0.5 and self.activation in ("softplus", "relu", "abs"))
            and self.start != "far"
            and (self.order == 1 or self.estimator in ("implicit", "unrolled-phantom"))
            and (self.order == 1 or self.activation not in ("relu", "abs", "hardtanh"))
            and self.tolerance in (None, 1e-6, 1e-5, 1e-3)
            and self.linear in ("default", "dense")
        )


def draw(number: int, seed: int = 0) -> Case:
    """A random case: a plain one of random size, made awkward in a few ways at once."""
    r = random.Random(f"{seed} {number}")
    kind = r.choice(("fixed_point", "fixed_point", "fixed_point", "root", "minimum", "minimum", "joint"))
    case = Case(
        number=1_000_000 * seed + number,
        kind=kind,
        dtype=r.choice(("float64", "float64", "float32")),
        batch=r.choice((1, 2, 3, 5)),
        dim=r.choice((2, 3, 4, 6)),
        inputs=r.choice((1, 2, 7)),
        activation=r.choice(("tanh", "tanh", "sin", "softplus", "sigmoid", "atan")),
        matrix=r.choice(("orthogonal", "gaussian", "symmetric", "rank-one", "triangular")),
        gain=r.choice((0.3, 0.5, 0.7, 0.9)),
        solver=r.choice(SOLVERS[kind]),
        linear=r.choice(("default", r.choice(LINEAR[kind]))),
        tolerance=r.choice((None, None, 1e-12)),
        tree=r.choice(("flat", r.choice(TREES))),
        style=r.choice(STYLES),
        mode=r.choice(MODES),
        rowwise=r.random() < 0.3,
        start=r.choice(("zero", "zero", "random")),
        x_batched=r.random() < 0.75,
    )
    awkward = [a for a in AWKWARD if kind in a.kinds]
    for chosen in r.sample(awkward, r.choice((0, 1, 1, 2, 3))):
        case = chosen.change(case, r)
    return consistent(case)


@dataclass(frozen=True)
class _Awkward:
    kinds: tuple[str, ...]
    change: object


def _coupled(case: Case, r: random.Random) -> Case:
    linear = COUPLINGS[:5]
    coupling = r.choice(linear if case.kind == "minimum" else COUPLINGS)
    return replace(case, coupling=coupling, batch=max(case.batch, 2), rowwise=False)


def _constrained(case: Case, r: random.Random) -> Case:
    if case.kind == "joint":
        return replace(case, constraint=r.choice(("box", "ball")))
    return replace(case, constraint=r.choice(("shared", "own")), eliminate=r.random() < 0.3, metric=r.random() < 0.3)


def _scaled(case: Case, r: random.Random) -> Case:
    of = {
        "fixed_point": ("state", "leaf"),
        "root": ("state", "residual"),
        "minimum": ("state", "energy"),
        "joint": ("state", "energy"),
    }[case.kind]
    return replace(case, unit=r.choice(UNITS), of=r.choice(of))


def _estimated(case: Case, r: random.Random) -> Case:
    names = [name for name in ESTIMATORS if name != "damped-implicit"]
    if case.kind == "minimum":
        names = ["one-step", "neumann-phantom", "unrolled-phantom", "damped-implicit"]
    if case.kind == "root":
        names = ["one-step", "neumann-phantom", "unrolled-phantom", "shared-inverse"]
    return replace(case, estimator=r.choice(names), mode=r.choice(MODES[:5]))


def _rough(case: Case, r: random.Random) -> Case:
    return replace(case, activation=r.choice(("relu", "abs", "hardtanh")))


_MAPS, _ALL = ("fixed_point", "root"), tuple(SOLVERS)
AWKWARD = (
    _Awkward(("fixed_point", "root", "minimum"), _coupled),
    _Awkward(("minimum",), _constrained),
    _Awkward(("minimum",), lambda c, r: replace(c, metric=True)),
    _Awkward(("joint",), _constrained),
    _Awkward(_ALL, _scaled),
    _Awkward(("fixed_point", "root", "minimum"), _estimated),
    _Awkward(("fixed_point",), _estimated),
    _Awkward(_MAPS, _rough),
    _Awkward(_ALL, lambda c, r: replace(c, start=r.choice(("far", "solution", "near")))),
    _Awkward(_ALL, lambda c, r: replace(c, batched=False)),
    _Awkward(_ALL, lambda c, r: replace(c, cotangent=r.choice((1e-23, 1e-9, 1e9, 1e20)), mode="backward")),
    _Awkward(_ALL, lambda c, r: replace(c, noncontiguous=True)),
    _Awkward(_ALL, lambda c, r: replace(c, dim=13)),
    _Awkward(_ALL, lambda c, r: replace(c, dim=1)),
    _Awkward(_ALL, lambda c, r: replace(c, batch=17)),
    _Awkward(_ALL, lambda c, r: replace(c, tolerance=r.choice((1e-3, 1e-6)))),
    _Awkward(_MAPS, lambda c, r: replace(c, gain=r.choice((0.99, 1.5, 2.5)))),
    _Awkward(_ALL, lambda c, r: replace(c, dtype="float32")),
)


def consistent(case: Case) -> Case:
    """The nearest case that makes sense."""
    change: dict[str, object] = {}
    if case.dim == 1 or (case.of == "leaf" and case.tree in ("flat", "folded")):
        change["tree"] = "flat" if case.dim == 1 else "tuple"
    if case.dim == 1 and (case.eliminate or case.constraint in ("shared", "own") or case.of == "leaf"):
        change |= {"eliminate": False, "constraint": "", "of": "", "unit": 1.0}
    if case.eliminate and case.constraint not in ("shared", "own"):
        change["eliminate"] = False
    if case.kind in ("minimum", "joint") and case.activation in ("relu", "abs", "hardtanh"):
        change["activation"] = "tanh"
    if case.kind == "joint":
        change |= {"coupling": "", "dim": min(case.dim, 4), "batch": min(case.batch, 3), "style": case.style}
        change["estimator"] = "implicit"
    if case.batch * case.dim > 60:
        change["batch"] = 3
    if case.estimator != "implicit" and case.kind != "fixed_point":
        # the estimator's matrix depends on the units and on the coordinates
        change |= {"of": "", "unit": 1.0, "metric": False, "constraint": "", "eliminate": False}
    if case.estimator == "shared-inverse":
        change["solver"] = "broyden"
    if case.estimator in ("adaptive-phantom", "unbiased-neumann", "shared-inverse"):
        change["mode"] = "backward"
    if case.tolerance is not None and case.dtype == "float32" and case.tolerance < 1e-5:
        change["tolerance"] = 1e-5
    if case.dtype == "float32" and case.cotangent not in (1.0,) and case.order == 2:
        change["cotangent"] = 1.0
    if case.style == "nested" and case.kind == "joint":
        change["style"] = "mixed"
    if case.rowwise and not _rows_apart(case):
        change["rowwise"] = False
    return replace(case, **change) if change else case


def _rows_apart(case: Case) -> bool:
    """Whether the promise holds, as it is documented: nothing shared among the arguments has the batch's size."""
    shared = {case.dim, case.inputs} if case.style == "arguments" else set()
    return (
        case.batched
        and not case.coupling
        and case.style in OPEN_STYLES
        and (case.x_batched or case.inputs != case.batch)
        and case.batch not in shared
        and not case.metric
    )

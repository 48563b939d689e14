"""The user's function as a graph, and what is compiled of it.

Dynamo reads the function, guards whatever the graph depends on (shapes, a module's attributes, what a lambda holds),
and makes every tensor that the function reaches an input. So the graph serves later solves, and other lambdas of the
same code, for as long as the guards hold; what they let through is right, and what they do not is read anew.

The graph is never run for the function's value: the loop around it is what is compiled, and what is run.
"""

from __future__ import annotations

import functools
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchimplicit.captured.adjoint import Adjoint, compiled_adjoint
from torchimplicit.captured.compiled import Compiled
from torchimplicit.captured.continued import Continuation, Continued, compiled_continuation
from torchimplicit.captured.forward import compiled_forward
from torchimplicit.captured.graph import Graph, Uncapturable
from torchimplicit.closure import is_transformed
from torchimplicit.errors import CaptureWarning
from torchimplicit.members import known_by, module_of
from torchimplicit.notices import notice
from torchimplicit.precision import TORCH_RELEASE, without_autocast
from torchimplicit.problems import Problem
from torchimplicit.solvers import Solver
from torchimplicit.state import Layout

compiling = threading.RLock()
"""Held where something may be compiled, or is run that dynamo has compiled: its tracing is a state of the process, and
threads would disturb each other."""


@dataclass(frozen=True)
class Plan:
    """What is compiled beside the function; another plan is another compilation.

    Attributes:
        problem: its class, and what it was stated with beside functions and tensors.
        layout: of the state.
        solver: of the forward loop.
        adjoint: of the backward loop; ``None`` for none.
        continuation: the steps from the solution that autograd is to see; ``None`` for none.
        needs_grad: which of the arguments' tensors a gradient is wanted in.
        several: whether the batch has more than one sample, and its size may vary.
        training: the mode of the function's module.
        lower: the dtype of autocast, or ``None``.
    """

    problem: tuple[Any, ...]
    layout: Layout
    solver: Solver = field(hash=False)  # tolerances may be given as lists
    adjoint: Adjoint | None
    continuation: Continuation | None
    needs_grad: tuple[bool, ...]
    several: bool
    training: bool
    lower: torch.dtype | None


@dataclass
class Artifact:
    """What was compiled of one graph.

    Attributes:
        slower: compiles the adjoint solve where the series is slow; ``None`` for none.
        slow: whether it was.
        broken: the parts that have raised.
    """

    graph: Graph
    forward: Compiled
    adjoint: Compiled | None
    slower: Callable[[], Compiled] | None
    continued: Continued | None
    needs_grad: tuple[bool, ...]
    slow: bool = False
    checked: bool = False
    broken: set[str] = field(default_factory=set)

    def run(self, what: str, part: Compiled | None, *inputs: Any) -> tuple[Any, ...] | None:
        """What ``part`` gives; ``None`` where there is none, or where making or running it has raised, now or before:
        whatever the compiler or its code stumbles over, the eager path does not need it.

        Args:
            what: names the part in a warning; empty for the whole solve.
        """
        if part is None or what in self.broken:
            return None
        try:
            return part(*inputs)
        except Exception as error:
            self.broken.add(what)
            tell(what + _reason(error))
            return None

    def adjoint_by(self, slow: bool) -> Compiled | None:
        """The adjoint solve; where the series is ``slow``, another one, which is compiled when it is first run."""
        if not slow:
            return self.adjoint
        if (slower := self.slower) is None:
            return None

        def run(*inputs: Any) -> tuple[Any, ...]:
            with compiling:
                way = slower()
            return way(*inputs)

        return run


@dataclass(frozen=True)
class Bound:
    """A graph with the tensors of one solve.

    Attributes:
        artifact: what is run.
        inputs: those of the graph but for the state; arguments are aliases.
        captured: the tensors among them that are not arguments and require grad.
        sources: for each input, the place of the tensor among the parameters of the solve; ``None`` for one that is
            none of them.
        versions: of the inputs, when they were bound.
    """

    artifact: Artifact
    inputs: tuple[Any, ...]
    captured: tuple[Tensor, ...]
    sources: tuple[int | None, ...]
    versions: tuple[int | None, ...]

    def inputs_at(self, all_tensors: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[Any, ...] | None:
        """The inputs with the parameters as an autograd node has them; ``None`` where there are no plain tensors, or
        where another input has been written to since."""
        if torch.is_grad_enabled() or any(map(is_transformed, all_tensors)) or versions(self.inputs) != self.versions:
            return None
        return tuple(
            tensor if source is None else params[source].detach()
            for tensor, source in zip(self.inputs, self.sources, strict=True)
        )


_count = 0


def compilations() -> int:
    """How many functions this process has compiled for captured solves, each with its loops."""
    return _count


class _Now(threading.local):
    """What the compiler's backend needs of the solve that is going on."""

    given: _Given | None = None
    found: tuple[Artifact, tuple[Any, ...]] | None = None

    def taken(self) -> tuple[Artifact, tuple[Any, ...]] | None:
        """What the compiled code has found, when it has run."""
        return self.found


@dataclass
class _Given:
    problem: Problem
    plan: Plan
    state: Any
    own: list[Tensor]
    originals: dict[int, Tensor] = field(default_factory=dict)


_now = _Now()
_names = itertools.count()


class Program:
    """The compiled forms of one function under one plan, which dynamo tells apart by its guards.

    Attributes:
        refused: why there are none; ``None`` for as long as the compiler has not failed.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.refused: str | None = None
        # by this name dynamo remembers which sizes and numbers have varied: another program's are none of its business
        code = _evaluate.__code__.replace(co_name=f"captured_{next(_names)}")
        function = types.FunctionType(code, _evaluate.__globals__, _evaluate.__name__)
        self.call = torch.compile(function, fullgraph=True, backend=_backend)

    def bind(self, problem: Problem, flat: Tensor, args: tuple[Any, ...]) -> Bound:
        """The graph at the state ``flat``, with what the function takes and captures."""
        seen_state = problem.state(self.plan.layout, problem.seen(self.plan.layout, flat.detach()))
        state, tree = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach(), seen_state), args
        leaves = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
        rows = len(flat)
        if self.plan.several:
            for leaf in leaves:
                torch._dynamo.maybe_mark_dynamic(leaf, 0)
        _now.given = now = _Given(problem, self.plan, state, [])
        aliases: list[Tensor] = []

        def alias(t: Tensor) -> Tensor:
            if type(t) not in (Tensor, nn.Parameter):
                raise Uncapturable(f"an argument is a {type(t).__name__}")
            alias = t.detach()
            if self.plan.several and t.ndim and t.shape[0] == rows and not isinstance(t, nn.Parameter):
                torch._dynamo.maybe_mark_dynamic(alias, 0)
            now.originals[id(alias)] = t
            aliases.append(alias)
            return alias

        tree = pytree.tree_map_only(Tensor, alias, args)
        set_tensors = now.own = [alias(t) for t in problem.constraint_tensors(self.plan.layout, rows)]
        _now.found = None
        try:
            # a number that varies would become a symbol, which the compiler rounds to single precision; and by default,
            # hooks that a module has been given since are not seen
            with (
                torch.no_grad(),
                torch._dynamo.config.patch(specialize_float=True, skip_nnmodule_hook_guards=False),
                _settled(problem.function) as function,
            ):
                leaves_out = self.call(function, state, tree, set_tensors)
            recorded = _now.taken()
        finally:
            _now.given = _now.found = None
        if recorded is None:
            raise Uncapturable("compiled code is not run here (torch.compiler.set_stance)")
        artifact, inputs = recorded
        if not artifact.checked:
            artifact.graph.check_outputs(leaves_out, inputs)
            artifact.checked = True
        inputs = artifact.graph.without_state(inputs)
        return _bound(artifact, inputs, aliases, now.originals)


def _bound(
    artifact: Artifact, inputs: tuple[Any, ...], aliases: Sequence[Tensor], originals: dict[int, Tensor]
) -> Bound:
    places = {id(alias): i for i, alias in enumerate(aliases)}
    captured: list[Tensor] = []
    sources: list[int | None] = []
    for tensor in inputs:
        place = places.get(id(tensor)) if isinstance(tensor, Tensor) else None
        if place is None and isinstance(tensor, Tensor) and tensor.requires_grad:
            place = len(aliases) + len(captured)
            captured.append(tensor)
        sources.append(place)
    return Bound(artifact, inputs, tuple(captured), tuple(sources), versions(inputs))


def _settled(function: Any) -> AbstractContextManager[Any]:
    """The function as the compiler can read it, where it has another form for that."""
    settled = getattr(function, "settled", None)
    return nullcontext(function) if settled is None else settled()


def versions(inputs: Sequence[Any]) -> tuple[int | None, ...]:
    """What tells whether tensors have been written to."""
    return tuple(t._version if isinstance(t, Tensor) and not t.is_inference() else None for t in inputs)


def _evaluate(
    function: Callable[..., Any], state: Any, args: tuple[Any, ...], set_tensors: list[Tensor]
) -> list[Tensor]:
    # copies, so that each leaf is an output of its own, be it the state itself
    return [leaf.clone() for leaf in (*pytree.tree_leaves(function(state, *args)), *set_tensors)]


def _backend(module: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    global _count
    solve = _now.given
    if solve is None:
        raise Uncapturable("it was read outside a solve")
    plan = solve.plan
    graph = Graph.of(module, examples, solve.problem, plan.layout, solve.state, solve.own, solve.originals)
    _count += 1
    needs_grad = graph.needs_grad
    with without_autocast(plan.layout.device):
        forward = compiled_forward(graph, plan.solver)
        adjoint, slower = None, None
        if plan.adjoint is not None and any(needs_grad):
            adjoint = compiled_adjoint(graph, plan.adjoint, needs_grad)
            if plan.adjoint.restart is not None:
                slower = functools.cache(
                    functools.partial(compiled_adjoint, graph, plan.adjoint, needs_grad, slow=True)
                )
        continued = None if plan.continuation is None else compiled_continuation(graph, plan.continuation, needs_grad)
    artifact = Artifact(graph, forward, adjoint, slower, continued, needs_grad)

    def call(*inputs: Any) -> tuple[Any, ...]:
        _now.found = artifact, inputs
        if artifact.checked:
            return (None,) * graph.outputs
        return tuple(module(*inputs))

    return call


_programs: weakref.WeakKeyDictionary[Any, dict[Plan, Program]] = weakref.WeakKeyDictionary()


def bind(problem: Problem, plan: Plan, differentiated: bool, flat: Tensor, args: tuple[Any, ...]) -> Bound | None:
    """The captured form of a solve; ``None`` where there is none, with a warning that says why.

    Args:
        differentiated: whether there can be a backward pass; if not, that of the plan is compiled no sooner.
    """
    if TORCH_RELEASE < (2, 13):
        tell("PyTorch 2.13 or newer is needed for that")
        return None
    try:
        programs = _programs.setdefault(known_by(problem.stated_by), {})
        program = programs.get(plan)
        if program is None and not differentiated:
            plan = replace(plan, adjoint=None, continuation=None)
            program = programs.get(plan)
    except TypeError as error:
        tell(f"nothing can be remembered for it ({error})")
        return None
    if program is None:
        program = programs[plan] = Program(plan)
    if program.refused is None:
        try:
            return program.bind(problem, flat, args)
        except Exception as error:  # whatever the compiler stumbles over, the eager loop does not need it
            program.refused = _reason(error)
    tell(program.refused)
    return None


def training(function: Any) -> bool:
    """The mode of the function's module; ``False`` where there is none."""
    module = module_of(function)
    return module is not None and module.training


def tell(reason: str) -> None:
    """Warn that a solve is not captured."""
    message = f"compile=True: this solve is not captured, and the eager loop serves: {reason}"
    notice(f"not captured: {reason}", message, CaptureWarning)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, Uncapturable):
            return str(inner)
        error, inner = inner, getattr(inner, "inner_exception", None) or inner.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"

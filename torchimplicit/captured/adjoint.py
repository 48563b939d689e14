"""The adjoint solve, compiled: products with the Jacobian traced once, and taken apart.

What a product takes from the point alone is computed before the loop, and what depends on the vector in its body. The
loop is that of the forward solve, for the map :math:`y\\mapsto y+(b-A^Ty)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from torchimplicit.captured.compiled import Compiled, compiled
from torchimplicit.captured.graph import Graph
from torchimplicit.captured.iteration import Rule, run
from torchimplicit.captured.steps import Accelerated, Plain, Step
from torchimplicit.linear import LinearSolver, Neumann
from torchimplicit.linear.confirmed import SLACK
from torchimplicit.precision import default_rtol
from torchimplicit.problems import Point
from torchimplicit.solution import Status
from torchimplicit.solvers import FixedPointIteration, Solver


@dataclass(frozen=True)
class Adjoint:
    """How the adjoint system is solved: by the series, or accelerated.

    Attributes:
        rtol, atol: of each sample.
        max_steps: the most that it may take.
        damping: of the series; ``None``: accelerated.
    """

    rtol: float
    atol: float
    max_steps: int
    damping: float | None

    @staticmethod
    def of(linear_solver: LinearSolver | None, solver: Solver, dtype: torch.dtype) -> Adjoint | None:
        """The captured form of ``linear_solver``; ``None`` where it has none.

        Where none is named, it is the one that goes with ``solver``: if the map contracts enough for plain iteration,
        so does its transpose, and nothing is as cheap.
        """
        if linear_solver is None:
            damping = solver.damping if isinstance(solver, FixedPointIteration) else None
            return Adjoint(default_rtol(dtype), 0.0, 200, damping)
        if isinstance(linear_solver, Neumann) and linear_solver.preconditioner is None and not linear_solver.truncated:
            return Adjoint(*linear_solver.tolerances(dtype), linear_solver.max_steps, linear_solver.damping)
        return None

    def step(self) -> Step:
        """The step of the loop."""
        return Accelerated(5, 1.0, None, 2.0) if self.damping is None else Plain(self.damping)


def compiled_adjoint(graph: Graph, adjoint: Adjoint, wanted: Sequence[bool]) -> Compiled:
    """``(z, u, *UnitRows.of(u), *inputs) -> (sound, steps, residual, condition, count, *grads)``.

    ``sound`` is a bool scalar: every sample is solved, as a product of the whole operator confirms, and the system is
    not nearly singular. Where it does not hold the rest is worth nothing. The figures are those of a
    :class:`~torchimplicit.solution.Report`, ``count`` the steps of the loop; of ``grads`` there is one for each wanted
    input.
    """
    asked = [w for w, given in zip(wanted, graph.others, strict=True) if isinstance(given, Tensor)]

    def products(v: Tensor, g: Tensor, z: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        system, params = graph.system(inputs)
        tape = system.linearize(z, params, asked)
        product = system.operator(tape, True).product(v)
        return product, *(grad for grad in system.pull(tape, g) if grad is not None)

    def solve(z: Tensor, u: Tensor, b: Tensor, factor: Tensor, finite: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        parts = _Parts.of(products, z, inputs)
        saved = parts.before(z, *inputs)
        scale = torch.linalg.vector_norm(b, dim=-1)

        def evaluate(y: Tensor, given: Any) -> Point:
            b, scale, saved = given
            return Point(y, b - parts.product(y, *saved), scale=scale)

        first = evaluate(b, (b, scale, saved))
        size = torch.linalg.vector_norm(b - first.residual, dim=-1) / torch.where(scale > 0, scale, 1)
        unbounded = torch.full_like(scale, torch.inf)
        rule = Rule(adjoint.atol * factor[:, 0], adjoint.rtol, unbounded, torch.ones_like(scale), False)
        found, count = run(adjoint.step(), evaluate, first, rule, (b, scale, saved), adjoint.max_steps)
        g = found.z / factor
        # of the whole operator, in the units of the cotangents: rows that depend on each other were solved in others
        left = (u - parts.product(g, *saved)) * factor
        true = torch.linalg.vector_norm(left, dim=-1)
        tolerance = SLACK * (rule.floor + adjoint.rtol * scale) + 16 * torch.finfo(u.dtype).eps * scale
        condition = size * torch.linalg.vector_norm(found.z, dim=-1) / torch.where(scale > 0, scale, 1)
        solved = (found.status == Status.CONVERGED) & (true <= tolerance) & finite[:, 0]
        solved = solved & (condition * adjoint.rtol < _DOUBT)
        relative = true / torch.where(scale > 0, scale, 1)
        grads = parts.after(g, *saved)
        return solved.all(), found.steps, relative, condition, count, *grads

    z = graph.flat()
    u, unit, factor = torch.empty_like(z), torch.empty_like(z), z.new_empty(z.shape[0], 1)
    return compiled(solve, (z, u, unit, factor, factor > 0, *graph.others))


_DOUBT = 1e-2
"""The relative error that a derivative may have by what is known of the condition."""


class _Parts(NamedTuple):
    """The graph of the products, taken apart.

    Attributes:
        before: ``(z, *inputs) -> saved``: what depends on neither vector.
        product: ``(v, *saved)``.
        after: ``(g, *saved)``, the gradients.
    """

    before: fx.GraphModule
    product: Any
    after: Any

    @staticmethod
    def of(products: Any, z: Tensor, inputs: Sequence[Any]) -> _Parts:
        from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

        with disable_proxy_modes_tracing():
            graph = make_fx(products)(torch.empty_like(z), torch.empty_like(z), z, *inputs)
        places = graph.graph.find_nodes(op="placeholder")
        (output,) = graph.graph.find_nodes(op="output")
        product, *grads = output.args[0]
        of_v, of_g = _dependents(graph, places[0]), _dependents(graph, places[1])
        late = of_v | of_g
        needed = [node for user in graph.graph.nodes if user in late or user is output for node in user.all_input_nodes]
        saved = list(dict.fromkeys(base for node in needed if node not in late for base in _bases(node)))
        before = _part(graph, places[2:], saved, lambda node: node not in late)
        return _Parts(
            before,
            _first(_part(graph, (places[0], *saved), [product], lambda node: node in of_v or _is_view(node))),
            _part(graph, (places[1], *saved), grads, lambda node: node in of_g or _is_view(node)),
        )


def _dependents(graph: fx.GraphModule, source: fx.Node) -> set[fx.Node]:
    """``source``, and the nodes whose values depend on it, but for the output."""
    found = {source}
    for node in graph.graph.nodes:
        if node.op != "output" and any(one in found for one in node.all_input_nodes):
            found.add(node)
    return found


def _is_view(node: fx.Node) -> bool:
    """Whether a node's value shares the memory of its input. What goes into a loop must not, so it is made there."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(one.alias_info is not None for one in schema.returns)


def _bases(node: fx.Node) -> list[fx.Node]:
    """What ``node`` is a view of; itself where it is none."""
    if not _is_view(node):
        return [node]
    return [base for given in node.all_input_nodes for base in _bases(given)]


def _part(graph: fx.GraphModule, given: Sequence[fx.Node], results: Sequence[fx.Node], chosen: Any) -> fx.GraphModule:
    """The function from ``given`` to ``results`` that the ``chosen`` nodes make up."""
    part = fx.Graph()
    known: dict[fx.Node, fx.Node] = {node: part.placeholder(f"given_{i}") for i, node in enumerate(given)}
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        if (
            node not in known
            and node.op not in ("output", "placeholder")
            and chosen(node)
            and known.keys() >= {*inputs}
        ):
            known[node] = part.node_copy(node, lambda n: known[n])
    part.output(tuple(known[node] for node in results))
    part.eliminate_dead_code()
    return fx.GraphModule(graph, part)


def _first(module: fx.GraphModule) -> Any:
    return lambda *inputs: module(*inputs)[0]

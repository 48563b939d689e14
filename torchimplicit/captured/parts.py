"""A traced function taken apart: what depends on one of its inputs, and what does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx


def dependents(graph: fx.GraphModule, source: fx.Node) -> set[fx.Node]:
    """``source``, and the nodes whose values depend on it, but for the output."""
    nodes = {source}
    for node in graph.graph.nodes:
        if node.op != "output" and any(one in nodes for one in node.all_input_nodes):
            nodes.add(node)
    return nodes


def needed_before(graph: fx.GraphModule, late: set[fx.Node]) -> list[fx.Node]:
    """What the ``late`` nodes and the output take from the others, views as what they are views of."""
    (output,) = graph.graph.find_nodes(op="output")
    needed = [node for user in graph.graph.nodes if user in late or user is output for node in user.all_input_nodes]
    return list(dict.fromkeys(base for node in needed if node not in late for base in _bases(node)))


def is_view(node: fx.Node) -> bool:
    """Whether a node's value shares the memory of its input. What goes into a loop must not, so it is made there."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(one.alias_info is not None for one in schema.returns)


def _bases(node: fx.Node) -> list[fx.Node]:
    """What ``node`` is a view of; itself where it is none."""
    if not is_view(node):
        return [node]
    return [base for source in node.all_input_nodes for base in _bases(source)]


def part(graph: fx.GraphModule, sources: Sequence[fx.Node], results: Sequence[fx.Node], chosen: Any) -> fx.GraphModule:
    """The function from ``sources`` to ``results`` that the ``chosen`` nodes make up."""
    piece = fx.Graph()
    known: dict[fx.Node, fx.Node] = {node: piece.placeholder(f"given_{i}") for i, node in enumerate(sources)}
    for node in graph.graph.nodes:
        inputs = node.all_input_nodes
        if (
            node not in known
            and node.op not in ("output", "placeholder")
            and chosen(node)
            and known.keys() >= {*inputs}
        ):
            known[node] = piece.node_copy(node, lambda n: known[n])
    piece.output(tuple(known[node] for node in results))
    piece.eliminate_dead_code()
    return fx.GraphModule(graph, piece)

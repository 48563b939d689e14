"""What the evaluations and products of a compiled training step take by themselves.

    python benchmarks/floors.py "IGNN, 32 graphs of 41 nodes"       # models of ``models.py``, by name; none: all

The floor is the step without what the solvers add: as many evaluations of the compiled map, as many compiled products
and one into the parameters, and the rest of the model as it is. CPU time, one thread, medians of calls in turn.
"""

from __future__ import annotations

import models  # isort: skip  (first: it sets the number of threads)

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from record import attempt

from torchimplicit.captured import program
from torchimplicit.captured.adjoint import Adjoint
from torchimplicit.captured.compiled import compiled
from torchimplicit.captured.graph import Graph
from torchimplicit.captured.linear import Parts
from torchimplicit.problems.image_system import ImageSystem

CHAINED = 5
"""So many products in a row, whose time less that of one tells what a product takes."""


class Watched:
    """Compiled code that keeps its last inputs and outputs, and adds up what its calls take."""

    def __init__(self, call: Callable[..., Any]):
        self.call, self.spent = call, 0.0
        self.inputs: tuple[Any, ...] = ()
        self.outputs: Any = None

    def __call__(self, *inputs: Any) -> Any:
        begin = time.process_time()
        self.inputs, self.outputs = inputs, self.call(*inputs)
        self.spent += 1e3 * (time.process_time() - begin)
        return self.outputs


class Layer:
    """One function's solves, beside its map and its products alone."""

    def __init__(self, forward: Watched, image: Callable[..., Any]):
        self.forward, self.image = forward, image
        self.adjoint: Watched | None = None
        self.products: dict[int, Callable[..., Any]] = {}

    def floor(self, ms: dict[Any, float]) -> float:
        """Of both passes, from the times of the pieces."""
        evaluations = 1 + int(self.forward.outputs[6][0])
        total = evaluations * ms[self, "map"]
        if self.adjoint is not None:
            one = (ms[self, CHAINED] - ms[self, 1]) / (CHAINED - 1)
            total += ms[self, 1] + (int(self.adjoint.outputs[5]) - 1) * one
        return total

    def calls(self) -> dict[Any, Callable[[], Any]]:
        """The pieces, at the last inputs."""
        calls: dict[Any, Callable[[], Any]] = {(self, "map"): lambda: self.image(*self.forward.inputs)}
        if self.adjoint is not None:
            z, u, *rest = self.adjoint.inputs
            for count, product in self.products.items():
                calls[self, count] = lambda product=product: product(u, z, *rest)
        return calls


def watch() -> list[Layer]:
    """From now on, what is compiled is watched: the list of it."""
    layers: list[Layer] = []
    forward_of, adjoint_of = program.compiled_forward, program.compiled_adjoint

    def forward(graph: Graph, solver: Any) -> Watched:
        def image(z: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
            system, params = graph.system(inputs)
            return (system.image(z, *params) if isinstance(system, ImageSystem) else system.at(z, params).residual,)

        layers.append(Layer(Watched(forward_of(graph, solver)), compiled(image, (graph.flat(), *graph.others))))
        return layers[-1].forward

    def adjoint(graph: Graph, way: Adjoint, needs_grad: Sequence[bool], slow: bool = False) -> Watched:
        asked = [w for w, given in zip(needs_grad, graph.others, strict=True) if isinstance(given, torch.Tensor)]

        def products(v: torch.Tensor, g: torch.Tensor, z: torch.Tensor, *inputs: Any) -> tuple[Any, ...]:
            system, params = graph.system(inputs)
            tape = system.linearize(z, params, asked)
            grads = system.vjp_params(tape, g)
            return system.operator(tape, True).product(v), *(grad for grad in grads if grad is not None)

        def chained(count: int) -> Callable[..., Any]:
            def run(v: torch.Tensor, z: torch.Tensor, *inputs: Any) -> tuple[Any, ...]:
                parts = Parts.of(products, z, inputs)
                saved = parts.before(z, *inputs)
                for _ in range(count):
                    v = parts.product(v, *saved)
                return tuple(parts.after(v, *saved))

            z = graph.flat()
            return compiled(run, (torch.empty_like(z), z, *graph.others))

        found = Watched(adjoint_of(graph, way, needs_grad, slow))
        if not slow:  # in the other case the compiler's stand-ins are gone, and the products are the same
            layers[-1].products = {count: chained(count) for count in (1, CHAINED)}
        next(layer for layer in reversed(layers) if layer.products).adjoint = found
        return found

    program.compiled_forward, program.compiled_adjoint = forward, adjoint
    return layers


def measured(case: models.Case, repeats: int = 7) -> dict[str, Any]:
    """The step, the floor, and TorchDEQ's step where it can express the model."""
    layers = watch()
    assert case.captured is not None
    step = case.captured("cpu")
    peer, _ = (None, "") if case.peer is None else attempt(lambda: case.peer("cpu"))
    for _ in range(2):
        step()
    times: dict[Any, list[float]] = {}
    for _ in range(repeats):
        for layer in layers:
            layer.forward.spent = 0.0
            if layer.adjoint is not None:
                layer.adjoint.spent = 0.0
        calls: dict[Any, Callable[[], Any]] = {"step": step, **({} if peer is None else {"TorchDEQ": peer})}
        for name, call in (*calls.items(), *(piece for layer in layers for piece in layer.calls().items())):
            begin = time.process_time()
            call()
            times.setdefault(name, []).append(1e3 * (time.process_time() - begin))
        solves = sum(w.spent for layer in layers for w in (layer.forward, layer.adjoint) if w is not None)
        times.setdefault("rest", []).append(times["step"][-1] - solves)
    ms = {name: median(taken) for name, taken in times.items()}
    floor = ms["rest"] + sum(layer.floor(ms) for layer in layers)
    row = {"model": case.name, "captured ms": ms["step"], "rest ms": ms["rest"], "floor ms": floor}
    row["captured / floor"] = ms["step"] / floor
    if peer is not None:
        row |= {"TorchDEQ ms": ms["TorchDEQ"], "TorchDEQ / floor": ms["TorchDEQ"] / floor}
    return row


def main() -> None:
    """Measure and print."""
    wanted = sys.argv[1:]
    warnings.simplefilter("ignore")
    for case in models.models(False):
        if case.captured is not None and (not wanted or case.name in wanted):
            row = measured(case)
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()

"""The graph of the user's function, as a function of the flat state."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from torchimplicit.precision import AutocastState
from torchimplicit.problems import JointInference, Minimum, Problem, System
from torchimplicit.problems.joint_system import JointSystem
from torchimplicit.problems.minimum import MinimumSystem, Stiffness
from torchimplicit.state import Layout


class Uncapturable(RuntimeError):
    """Why a function cannot be captured."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What dynamo has read of a function.

    Attributes:
        module: takes the inputs, gives the leaves of the function's value.
        examples: the inputs as the compiler has them: sizes may be symbols.
        needs_grad: of the inputs but for the state, whether a gradient may be asked in them; false for sizes.
        state: for each leaf of the state that the function depends on, its place among the inputs.
        pattern: what the function is called with, the numbers of those leaves in their places.
        own: for each tensor of the problem's own, its place among the inputs but for the state.
        outputs: how many tensors the module gives: the leaves of the function's value, and those of the problem.
    """

    module: torch.fx.GraphModule
    examples: tuple[Any, ...]
    needs_grad: tuple[bool, ...]
    state: tuple[int, ...]
    pattern: Any
    own: tuple[int, ...]
    outputs: int
    problem: Problem
    layout: Layout
    autocast: AutocastState

    @staticmethod
    def of(
        module: torch.fx.GraphModule,
        examples: Sequence[Any],
        problem: Problem,
        layout: Layout,
        state_seen: Any,
        constraint_tensors: Sequence[Tensor],
        originals: dict[int, Tensor],
    ) -> Graph:
        """The graph of the module and the examples that the compiler's backend gets.

        Args:
            module, examples: the graph, and what it was read with.
            problem, layout: what is solved.
            state_seen: what the function was called with.
            constraint_tensors: the tensors of the problem itself, such as those of a constraint.
            originals: by the ids of arguments' aliases, the tensors that they stand for.

        Raises:
            Uncapturable: it does more than to compute its value, or depends on what changes on the way.
        """
        leaves = [leaf for leaf in pytree.tree_leaves(state_seen) if isinstance(leaf, Tensor)]
        numbers = iter(range(len(leaves)))
        pattern = pytree.tree_map_only(Tensor, lambda _: next(numbers), state_seen)
        actual = []
        for node in module.graph.find_nodes(op="placeholder"):
            argument = node.meta.get("grapharg")
            actual.append(None if argument is None else argument.example)
        places = [[i for i, t in enumerate(actual) if t is leaf] for leaf in (*leaves, *constraint_tensors)]
        if any(len(candidates) != 1 for candidates in places):
            raise Uncapturable("the function does not depend on the whole of its state")
        state = [candidates[0] for candidates in places[: len(leaves)]]
        (output,) = module.graph.find_nodes(op="output")
        outputs = len(output.args[0])
        if outputs != _count(problem, pattern) + len(constraint_tensors):
            raise Uncapturable("the function keeps tensors that it computes, beside the value that it returns")
        needs_grad = tuple(
            isinstance(t, Tensor) and originals.get(id(t), t).requires_grad and isinstance(example, Tensor)
            for i, (t, example) in enumerate(zip(actual, examples, strict=True))
            if i not in state
        )
        # the function would keep alive what it captures
        functions = [name for name in ("f", "energy", "loss") if hasattr(problem, name)]
        problem = replace(problem, **dict.fromkeys(functions, _unread))  # type: ignore[type-var]
        others = [i for i in range(len(actual)) if i not in state]
        graph = Graph(
            module=module,
            examples=tuple(map(_stand_in, examples)),
            needs_grad=needs_grad,
            state=tuple(state),
            pattern=pattern,
            own=tuple(others.index(candidates[0]) for candidates in places[len(leaves) :]),
            outputs=outputs,
            problem=problem,
            layout=layout,
            autocast=AutocastState(layout.device),
        )
        graph._check()
        return graph

    def _check(self) -> None:
        """One run on the compiler's stand-ins, as are the tensors that it makes: what it writes to is seen."""
        tensors = [t for t in self.examples if isinstance(t, Tensor)]
        before = [t._version for t in tensors]
        with torch.no_grad(), detect_fake_mode(self.examples) or nullcontext():
            self.module(*self.examples)
        if [t._version for t in tensors] != before:
            raise Uncapturable(
                "the function writes to a tensor that it has not made (a buffer, as for batch statistics)"
            )

    def check_outputs(self, leaves: Sequence[Any], inputs: Sequence[Any]) -> None:
        """What the function returned, when the module was first run for it, must be the module's value, in order.

        Raises:
            Uncapturable: it is not.
        """
        rows = self._rows(inputs)
        outputs = list(leaves)
        if any(not isinstance(leaf, Tensor) for leaf in outputs):
            raise Uncapturable("the function's value holds what is no tensor")
        self.problem.flat_output(self.layout, self._output(outputs), rows, self.autocast.dtype is not None)
        with torch.no_grad():
            again = self.module(*inputs)
        if not all(
            torch.equal(a, b) | bool((a.isnan() & b.isnan()).any()) for a, b in zip(again, outputs, strict=True)
        ):
            raise Uncapturable("the function gives another value each time it is called (random numbers)")

    def without_state(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The inputs but for the leaves of the state."""
        return tuple(t for i, t in enumerate(inputs) if i not in self.state)

    @property
    def others(self) -> tuple[Any, ...]:
        """The examples of the inputs but for the state."""
        return self.without_state(self.examples)

    def flat(self) -> Tensor:
        """The example of the flat state."""
        leaves = [self.examples[i] for i in self.state]
        state = _put(leaves, self.pattern)
        if isinstance(self.problem, JointInference):
            state = self.problem.start((state.z, state.x))
        return self.layout.flatten(state, "the state").clone(memory_format=torch.contiguous_format)

    def system(self, others: Sequence[Any]) -> tuple[System, tuple[Tensor, ...]]:
        """The problem with the inputs but for the state, and those of them that are its parameters: all the tensors."""
        sizes = [None if isinstance(t, Tensor) else t for t in others]

        def value(z: Tensor | tuple[Tensor, ...], *params: Tensor) -> Any:
            remaining = iter(params)
            return self._value(z, [next(remaining) if size is None else size for size in sizes])

        params = tuple(t for t in others if isinstance(t, Tensor))
        system = self.problem.system(value, None, slice(0, 0), self.layout)
        where = [sum(isinstance(t, Tensor) for t in others[:i]) for i in self.own]

        def own(rows: int, *params: Tensor) -> tuple[Tensor, ...]:
            return tuple(params[i] for i in where)

        if isinstance(system, JointSystem):
            system = replace(system, own=own)
        elif isinstance(system, MinimumSystem) and where:
            # whose size would have to be read from the device; no equation is solved in which it matters
            system = replace(system, hyperplane=own, stiffness=Stiffness(1.0))
        return system, params

    def _value(self, z: Tensor | tuple[Tensor, ...], others: Sequence[Any]) -> Any:
        seen = self.problem.seen(self.layout, z) if isinstance(z, Tensor) else z
        given, tree = iter(others), pytree.tree_leaves(self.problem.state(self.layout, seen))
        leaves = [leaf for leaf in tree if isinstance(leaf, Tensor)]
        place = dict(zip(self.state, leaves, strict=True))
        inputs = [place[i] if i in place else next(given) for i in range(len(self.examples))]
        with self.autocast():
            output = list(self.module(*inputs))
        cast = self.autocast.dtype is not None
        if isinstance(z, tuple):
            return self.problem.flat_parts(self.layout, self._output(output), z[0].shape[0], cast)
        return self.problem.flat_output(self.layout, self._output(output), z.shape[0], cast)

    def _output(self, leaves: list[Any]) -> Any:
        """The function's value, of what the module gives."""
        leaves = leaves[: len(leaves) - len(self.own)]
        if isinstance(self.problem, Minimum):
            return leaves[0]
        if isinstance(self.problem, JointInference):
            state = self.pattern
            return pytree.tree_unflatten(leaves[:-1], pytree.tree_structure(state.z)), leaves[-1]
        return _put(leaves, self.pattern)

    def _rows(self, inputs: Sequence[Any]) -> int:
        return len(inputs[self.state[0]]) if self.layout.batched else 1


def _count(problem: Problem, pattern: Any) -> int:
    """How many leaves the function's value has."""
    if isinstance(problem, Minimum):
        return 1
    if isinstance(problem, JointInference):
        return len(pytree.tree_leaves(pattern.z)) + 1
    return len(pytree.tree_leaves(pattern))


def _put(leaves: Sequence[Any], pattern: Any) -> Any:
    """The leaves in the places of their numbers."""
    return pytree.tree_map_only(int, lambda i: leaves[i], pattern)


def _stand_in(example: Any) -> Any:
    """For a tensor that the compiler's backend is given, one without data; sizes that may vary are symbols."""
    context = TracingContext.get()
    if not isinstance(example, Tensor) or isinstance(example, FakeTensor):
        return example
    symbolic = context.tensor_to_context.get(example)
    assert context.fake_mode is not None
    if symbolic is None:
        return context.fake_mode.from_tensor(example)
    return context.fake_mode.from_tensor(example, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False)


def _unread(*_: Any) -> Any:
    raise AssertionError("the graph stands for the function")

"""A loop whose every step is one call of compiled code, its condition included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.captured.compiled import spelt


def while_loop(
    going: Callable[[Any], Tensor],
    body: Callable[[Any, Any, Any], Any],
    carried: Any,
    constants: Any,
    rings: tuple[Tensor, ...] = (),
) -> Any:
    """``while going(carried): carried = body(carried, constants, rings)``, as one operation of the graph that is being
    traced.

    Autograd must not see it: where the start does not require grad, it would give the derivative of one step alone, and
    say nothing. What calls it runs without grad; the derivative is that of the solution.

    Args:
        going: of the carried tensors, a bool scalar.
        body: may use no tensors but those that it is given.
        carried, constants: pytrees of tensors; the constants may hold integers, too.
        rings: tensors that the body writes to in place, which saves a copy of them in every step.
    """
    from torch._higher_order_ops.while_loop import while_loop_op

    leaves, spec = pytree.tree_flatten(carried)
    fixed, fixed_spec = pytree.tree_flatten(constants)
    count, kept = len(leaves), len(leaves) + len(fixed)
    leaves = apart(leaves, fixed)

    def flat_going(*flat: Any) -> Tensor:
        return going(pytree.tree_unflatten(list(flat[:count]), spec))

    def flat_body(*flat: Any) -> tuple[Tensor, ...]:
        carried = pytree.tree_unflatten(list(flat[:count]), spec)
        after = body(carried, pytree.tree_unflatten(list(flat[count:kept]), fixed_spec), flat[kept:])
        return tuple(apart(pytree.tree_leaves(after), flat))

    assert not torch.is_grad_enabled()
    written = {"mutated_arg_indices": ",".join(str(kept + i) for i in range(len(rings)))} if rings else {}
    outputs = while_loop_op(flat_going, spelt(flat_body), tuple(leaves), (*fixed, *rings), **written)
    return pytree.tree_unflatten(list(outputs), spec)


def apart(leaves: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The leaves, none of which is another one or one of ``others``: what goes into a loop, or comes out of it, must
    not share memory."""
    seen = {id(t) for t in others}
    copies = []
    for leaf in leaves:
        copies.append(leaf.clone() if id(leaf) in seen else leaf)
        seen.add(id(leaf))
    return copies
